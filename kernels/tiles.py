"""Launch configurations: tile sizes, warps and pipeline stages of every kernel, per architecture.

No entry was chosen by timing. Each is the first of a list, from the largest tile down, that
compiles without spilled registers and within the architecture's shared memory (`python -m
kernels.aot` shows both). `gpt2 tune` times an entry's neighbours on the GPU in use; what it found
faster is set with `use`.
"""

import functools
from collections.abc import Callable, Mapping

import torch

from kernels.launch import HAS_TRITON, INTERPRETED, triton

# Names of the numbers in a kernel's entries, in order.
FIELDS = {
    "attention_fwd": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "attention_bwd_dq": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "attention_bwd_dkdv": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "attention_bwd": ("BLOCK_ROWS", "BLOCK_STEP", "num_warps", "num_stages"),  # used with ONE_LAUNCH only
    "layer_norm_fwd": ("num_warps",),
    "layer_norm_bwd": ("programs_per_multiprocessor", "num_warps"),
    "gelu_fwd": ("BLOCK_SIZE", "num_warps"),
    "gelu_bwd": ("BLOCK_SIZE", "num_warps"),
    "bias_gelu_fwd": ("BLOCK_ROWS", "BLOCK_COLS", "num_warps"),
    "bias_gelu_bwd": ("programs_per_multiprocessor", "BLOCK_ROWS", "BLOCK_COLS", "num_warps"),
    "cross_entropy": ("BLOCK_V", "num_warps"),
    "column_sum": ("BLOCK_P", "BLOCK_C", "num_warps"),
}
# Options that select another way to compute the same, with the values to try: kernel/kind -> option
# -> values. 0 is off, as is an option that is not given. No entry of TABLE has one, since none is
# known to be faster. A tuner times {**lookup(...), option: value}; a GPU may lack registers for it.
#   EXP2_POLYNOMIAL  half of the exponentials by multiply-adds, beside the units for exponentials
#   PAIR_BLOCKS      a program computes a heavy and a light block: equal work under a causal mask
#   maxnreg          registers per thread at most; at 128, two programs of 8 warps fit at once
#   ONE_LAUNCH       dq beside dk and dv in one launch, after a small one for delta
VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "attention_fwd/16bit": {"EXP2_POLYNOMIAL": (0, 1), "PAIR_BLOCKS": (0, 1), "maxnreg": (0, 128)},
    "attention_bwd_dq/16bit": {"EXP2_POLYNOMIAL": (0, 1), "PAIR_BLOCKS": (0, 1)},
    "attention_bwd_dkdv/16bit": {"EXP2_POLYNOMIAL": (0, 1), "PAIR_BLOCKS": (0, 1)},
    "attention_bwd/16bit": {"ONE_LAUNCH": (0, 1)},
}
TILE_NEEDS = {"attention_bwd/16bit": "ONE_LAUNCH"}  # an option without which a tile has no effect

# kernel/kind -> architecture -> size -> entry. A size that is not listed takes the entry of the
# next larger size, or of the largest. An architecture that is not listed takes "default", whose
# tiles are the smallest. What shared memory a tile needs depends on the architecture: that of
# attention_bwd_dq at 64 needs 64 KiB on sm_80 and 89 KiB on sm_100.
TABLE: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {
    # size: head width, rounded up to a power of two
    "attention_fwd/16bit": {
        "sm_80": {32: (128, 64, 4, 2), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 64, 8, 2)},
        "sm_86": {32: (128, 64, 4, 2), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "sm_89": {32: (128, 64, 4, 2), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "sm_90": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "sm_100": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "sm_103": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "sm_120": {32: (128, 64, 4, 2), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "default": {32: (128, 64, 4, 2), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (32, 32, 4, 2)},
    },
    "attention_fwd/tf32": {
        "sm_80": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "sm_86": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (16, 32, 4, 1)},
        "sm_89": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (16, 32, 4, 1)},
        "sm_90": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
        "sm_100": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
        "sm_103": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
        "sm_120": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (16, 32, 4, 1)},
        "default": {32: (128, 64, 8, 3), 64: (64, 64, 4, 2), 128: (32, 32, 4, 2), 256: (16, 32, 4, 1)},
    },
    "attention_fwd/ieee": {
        "sm_80": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 256: (32, 32, 16, 1)},
        "sm_86": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 256: (32, 32, 16, 1)},
        "sm_89": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 256: (32, 32, 16, 1)},
        "sm_90": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 256: (32, 32, 16, 1)},
        "sm_100": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 256: (32, 32, 16, 1)},
        "sm_103": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 256: (32, 32, 16, 1)},
        "sm_120": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 256: (32, 32, 16, 1)},
        "gfx942": {64: (64, 32, 8, 2), 128: (64, 64, 4, 1), 256: (64, 32, 4, 1)},
        "default": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (32, 32, 16, 1), 256: (16, 16, 16, 1)},
    },
    "attention_bwd_dq/16bit": {
        "sm_80": {32: (64, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 64, 8, 2)},
        "sm_86": {32: (64, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "sm_89": {32: (64, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "sm_90": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 64, 8, 2)},
        "sm_100": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 64, 8, 2)},
        "sm_103": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 64, 8, 2)},
        "sm_120": {32: (64, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "gfx942": {64: (128, 64, 8, 3), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
        "default": {32: (64, 64, 4, 3), 64: (128, 64, 8, 3), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)},
    },
    "attention_bwd_dq/tf32": {
        "sm_80": {32: (128, 64, 8, 3), 64: (64, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        "sm_86": {32: (128, 64, 8, 3), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 32, 4, 1)},
        "sm_89": {32: (128, 64, 8, 3), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 32, 4, 1)},
        "sm_90": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        "sm_100": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        "sm_103": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        "sm_120": {32: (128, 64, 8, 3), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 32, 4, 1)},
        "default": {32: (128, 64, 8, 3), 64: (64, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    "attention_bwd_dq/ieee": {
        "sm_80": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
        "sm_86": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
        "sm_89": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
        "sm_90": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
        "sm_100": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
        "sm_103": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
        "sm_120": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
        "gfx942": {64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 32, 4, 1)},
        "default": {32: (64, 64, 8, 2), 64: (64, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 16, 2)},
    },
    "attention_bwd_dkdv/16bit": {
        "sm_80": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 2)},
        "sm_86": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (16, 64, 8, 1)},
        "sm_89": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (16, 64, 8, 1)},
        "sm_90": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
        "sm_100": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
        "sm_103": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
        "sm_120": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (16, 64, 8, 1)},
        "gfx942": {128: (64, 64, 4, 1), 256: (32, 32, 4, 1)},
        "default": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    },
    "attention_bwd_dkdv/tf32": {
        "sm_80": {32: (64, 64, 4, 2), 64: (32, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        "sm_86": {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "sm_89": {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "sm_90": {32: (64, 128, 8, 3), 64: (32, 64, 4, 2), 128: (32, 32, 4, 1), 256: (32, 32, 8, 1)},
        "sm_100": {32: (64, 128, 8, 3), 64: (32, 64, 4, 2), 128: (32, 32, 4, 1), 256: (32, 32, 8, 1)},
        "sm_103": {32: (64, 128, 8, 3), 64: (32, 64, 4, 2), 128: (32, 32, 4, 1), 256: (32, 32, 8, 1)},
        "sm_120": {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "default": {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    "attention_bwd_dkdv/ieee": {
        "sm_80": {32: (32, 64, 4, 2), 64: (32, 32, 8, 2), 256: (32, 32, 16, 1)},
        "sm_86": {32: (32, 64, 4, 2), 64: (32, 32, 8, 2), 128: (32, 32, 16, 1), 256: (16, 32, 16, 1)},
        "sm_89": {32: (32, 64, 4, 2), 64: (32, 32, 8, 2), 128: (32, 32, 16, 1), 256: (16, 32, 16, 1)},
        "sm_90": {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 16, 1), 256: (32, 32, 8, 1)},
        "sm_100": {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 16, 1), 256: (16, 32, 16, 1)},
        "sm_103": {32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 16, 1), 256: (16, 32, 16, 1)},
        "sm_120": {32: (32, 64, 4, 2), 64: (32, 32, 8, 2), 128: (32, 32, 16, 1), 256: (16, 32, 16, 1)},
        "gfx942": {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
        "default": {32: (32, 64, 4, 2), 64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 16, 1)},
    },
    "attention_bwd/16bit": {  # 64, sm_86's 128 and sm_90's 128 and 256 were compiled; for ONE_LAUNCH
        "sm_80": {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        "sm_86": {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 16, 8, 1)},
        "sm_89": {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 16, 8, 1)},
        "sm_90": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        "default": {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)},
    },
    # size: row width
    "layer_norm_fwd": {"default": {1024: (1,), 2048: (2,), 4096: (4,), 8192: (8,), 16384: (16,)}},
    "layer_norm_bwd": {
        **{arch: {1024: (8, 4), 4096: (4, 8), 16384: (2, 16)} for arch in ("sm_100", "sm_103", "sm_120")},
        "default": {1024: (8, 4), 2048: (4, 8), 16384: (2, 16)},
    },
    # one entry for all sizes
    "gelu_fwd": {"default": {1: (1024, 4)}},
    "gelu_bwd": {"default": {1: (1024, 4)}},
    "bias_gelu_fwd": {"default": {1: (4, 256, 4)}},
    "bias_gelu_bwd": {"default": {1: (8, 4, 256, 4)}},
    "cross_entropy": {"sm_103": {1: (4096, 8)}, "default": {1: (8192, 16)}},
    "column_sum": {"default": {1: (32, 32, 4)}},
}

_tuned: dict[str, dict[str, int]] = {}  # what `use` was given
_used: dict[str, dict[str, int]] = {}  # configurations that were looked up since then, by the same keys


def architecture(device: torch.device) -> str:
    """Name of the GPU's architecture: "sm_90", "gfx942", ...; "default" in the interpreter."""
    if INTERPRETED or not HAS_TRITON:
        return "default"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    arch = triton.runtime.driver.active.get_current_target().arch
    return f"sm_{arch}" if isinstance(arch, int) else arch


def lookup(name: str, arch: str, size: int) -> dict[str, int]:
    """Table entry as keyword arguments of a launch. name: "kernel" or "kernel/kind"."""
    entry = _by_size(name, arch)[_entry_size(name, arch, size)]
    return dict(zip(FIELDS[name.partition("/")[0]], entry, strict=True))


def _by_size(name: str, arch: str) -> dict[int, tuple[int, ...]]:
    return TABLE[name].get(arch, TABLE[name]["default"])


def _entry_size(name: str, arch: str, size: int) -> int:
    by_size = _by_size(name, arch)
    return min((s for s in by_size if s >= size), default=max(by_size))


def use(tuned: Mapping[str, Mapping[str, int]]) -> None:
    """From now on launches with these configurations, and else with the table's.

    tuned: "kernel/kind size" -> keyword arguments of a launch; size: that of the entry it replaces.
    """
    _tuned.clear()
    _tuned.update({key: dict(config) for key, config in tuned.items()})
    _used.clear()
    _configuration.cache_clear()


def used() -> dict[str, dict[str, int]]:
    """The configurations launched since the last `use`, by the keys that `use` takes."""
    return dict(_used)


def fields(key: str, config: Mapping[str, int]) -> list[str]:
    """Fields in which a configuration may differ from others: its options first, then its numbers."""
    return list(dict.fromkeys([*VARIANTS.get(key.split()[0], {}), *config]))


def neighbours(key: str, config: Mapping[str, int], field: str) -> list[dict[str, int]]:
    """Configurations that differ from this one in one field: a number doubled or halved, stages one
    more or fewer, an option at its other values.
    """
    name = key.split()[0]
    if field in VARIANTS.get(name, {}):
        value, values = config.get(field, 0), VARIANTS[name][field]
    elif name in TILE_NEEDS and not config.get(TILE_NEEDS[name]):
        return []
    else:
        value = config[field]
        values = (value + 1, value - 1) if field == "num_stages" else (value * 2, value // 2)
        values = tuple(other for other in values if other >= 1 and (field != "num_warps" or other <= 32))
    return [{**config, field: other} for other in values if other != value]


def with_config(name: str, size: int, device: torch.device, start: Callable) -> None:
    """Calls start(**config) with the configuration of kernel `name` for this device and size."""
    start(**_configuration(name, size, device))


@functools.cache  # a launch costs microseconds, and so would this
def _configuration(name: str, size: int, device: torch.device) -> dict[str, int]:
    arch = architecture(device)
    key = f"{name} {_entry_size(name, arch, size)}"
    _used[key] = _tuned.get(key) or lookup(name, arch, size)
    return _used[key]
