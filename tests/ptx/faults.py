"""Planted faults: a line of a kernel, or of its PTX, made wrong, the case that shows it, and by what sign."""

import contextlib
import importlib.util
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

from emulator import Emulator

from kernels import dispatch, launch  # noqa: F401  (dispatch imports every op)


class Fault(NamedTuple):
    """Match number n of `right` becomes `wrong`, in the source of an op's kernels or in the PTX of a kernel."""

    where: str  # "gelu" or "_gelu_fwd_kernel"
    right: str  # a regular expression for PTX, plain text for a source
    wrong: str
    n: int
    case: str
    sign: str  # a regular expression, found in what is reported or in the comparison's failure


OUTSIDE, NUMBERS, RACE = "out of bounds", "error|not finite", "race"
CAUSAL, FULL = "attention T=100 D=64 bf16", "attention T=300 D=64 bf16"
SMALL_NORM, NORM = "layer_norm 9x33 bf16", "layer_norm 6x768 bf16"
GELU, BIAS_GELU = "gelu 5x77 bf16", "bias_gelu 5x77 bf16"
PADDED, VOCABULARY = "cross_entropy 5x1000 bf16", "cross_entropy 4x50257 bf16"

SEEN = "_is_seen(starts_ptr, rows[:, None], cols"
BEFORE, AFTER = (f"_is_seen(starts_ptr, rows[:, None] {shift}, cols" for shift in ("- 1", "+ 1"))
END = "tl.minimum(start_m + BLOCK_M, T) if IS_CAUSAL"
SHORT = "tl.minimum(start_m + BLOCK_M - BLOCK_N, T) if IS_CAUSAL"
AT_END = "tl.where((full_end * BLOCK_M < T) & (full_start <= full_end), 1, 0)"
LSE = 'lse_ptr + stats + rows, mask=rows < T, other=float("inf")'
HEAD, SWAPPED = "(head // H).to(tl.int64), (head % H)", "(head % H).to(tl.int64), (head // H)"
LAST_ROW = "tl.minimum(first + rows_per_program, N)"
WAIT = r"cp\.async\.wait_group\s+\d+;"
BARRIER = r"(?<=\d;)\s*bar\.sync\s+0;"  # the one after a wait
FORWARD, DQ, DKDV = (f"_attention_{name}_kernel" for name in ("fwd", "bwd_dq", "bwd_dkdv"))
LEAVES = "setp.lt.u32 %scratch1, %tid.x, 32;\n@%scratch1 ret;\nbar.sync 0;"

SOURCE_FAULTS = {
    "forward: a row does not see its own key": Fault("attention", SEEN, BEFORE, 0, CAUSAL, NUMBERS),
    "forward: a row sees the next key": Fault("attention", SEEN, AFTER, 0, CAUSAL, NUMBERS),
    "dq: a row sees the next key": Fault("attention", SEEN, AFTER, 1, CAUSAL, NUMBERS),
    "forward: a block of keys short": Fault("attention", END, SHORT, 0, CAUSAL, NUMBERS),
    "dq: a block of keys short": Fault("attention", END, SHORT, 1, CAUSAL, NUMBERS),
    "dk, dv: a block of queries short": Fault("attention", AT_END, "0", 0, FULL, NUMBERS),
    "dk, dv: lse of rows past the end": Fault("attention", LSE, "lse_ptr + stats + rows", 0, CAUSAL, OUTSIDE),
    "forward: batch and head mixed up": Fault("attention", HEAD, SWAPPED, 0, CAUSAL, OUTSIDE),
    "forward: values in place of keys": Fault(
        "attention", "q_ptr + part_stride", "q_ptr + 2 * part_stride", 0, CAUSAL, NUMBERS
    ),
    "attention: a row too many is stored": Fault("attention", "(rows < limit) & (dims < HEAD_DIM))",
        "(rows <= limit) & (dims < HEAD_DIM))", 0, CAUSAL, "store out of bounds"),
    "layer_norm: a column too many": Fault("layer_norm", "mask = cols < C", "mask = cols <= C", 0, SMALL_NORM, OUTSIDE),
    "layer_norm: variance of columns past the end": Fault(
        "layer_norm", "tl.where(mask, x - mean, 0.0)", "x - mean", 0, SMALL_NORM, NUMBERS
    ),
    "layer_norm: programs share a row": Fault(
        "layer_norm", LAST_ROW, LAST_ROW.replace(", N", " + 1, N"), 0, SMALL_NORM, "two programs store"
    ),
    "layer_norm: programs share a partial sum": Fault("layer_norm", "dweight_ptr + program * C",
        "dweight_ptr + program // 2 * C", 0, SMALL_NORM, "two programs store"),
    "column_sum: a row too many": Fault("column_sum", "(rows < P)", "(rows <= P)", 0, SMALL_NORM, OUTSIDE),
    "gelu: an element too many": Fault("gelu", "offsets < n_elements", "offsets <= n_elements", 1, GELU, OUTSIDE),
    "bias_gelu: a wrong row stride": Fault("gelu", "rows[:, None] * F", "rows[:, None] * (F - 1)", 0, BIAS_GELU, RACE),
    "bias_gelu: a row is left out": Fault(
        "gelu", "= first.to(tl.int64) +", "= first.to(tl.int64) + 1 +", 0, BIAS_GELU, NUMBERS
    ),
    "cross_entropy: the padding takes part": Fault(
        "cross_entropy", "tl.where(cols < vocab_size, z,", "tl.where(cols < padded_size, z,", 0, PADDED, NUMBERS
    ),
    "cross_entropy: a logit too many is stored": Fault("cross_entropy", "cols, dz, mask=cols < padded_size",
        "cols, dz, mask=cols <= padded_size", 0, VOCABULARY, "another program|two programs|bounds"),
    "cross_entropy: a row overlaps the next": Fault("cross_entropy", "* row_stride", "* (row_stride - 8)", 0, PADDED,
        "load of what another program stores"),
}  # fmt: skip
PTX_FAULTS = {
    "forward: no barrier after cp.async": Fault(FORWARD, BARRIER, "", 0, FULL, RACE),
    "dq: no barrier after cp.async": Fault(DQ, BARRIER, "", 0, FULL, RACE),
    "dk, dv: no barrier after cp.async": Fault(DKDV, BARRIER, "", 0, FULL, RACE),
    "forward: a loosened wait for cp.async": Fault(FORWARD, WAIT, "cp.async.wait_group 8;", 0, FULL, NUMBERS),
    "dq: a loosened wait for cp.async": Fault(DQ, WAIT, "cp.async.wait_group 8;", 0, FULL, NUMBERS),
    "dk, dv: a loosened wait for cp.async": Fault(DKDV, WAIT, "cp.async.wait_group 8;", 0, FULL, NUMBERS),
    "layer_norm: no barrier in a sum over warps": Fault("_layer_norm_bwd_kernel", r"bar\.sync\s+0;", "", 1, NORM, RACE),
    "forward: a warp misses the barriers": Fault(FORWARD, r"bar\.sync\s+0;", LEAVES, 0, FULL, "some warps ended"),
}
FAULTS = SOURCE_FAULTS | PTX_FAULTS


@contextlib.contextmanager
def planted(emulator: Emulator, name: str) -> Iterator[None]:
    """Launches have the fault inside."""
    fault = FAULTS[name]
    if fault.where.startswith("_"):

        def edit(kernel: str, ptx: str) -> str:
            return _replaced(ptx, fault.right, fault.wrong, fault.n, name) if kernel == fault.where else ptx

        with mock.patch.object(emulator, "edit", edit):
            yield
        return
    modules = _modules("kernels.")
    sources = {module: inspect.getsource(module) for module in _modules(f"kernels.{fault.where}")}
    right = next((module for module, source in sources.items() if fault.right in source), next(iter(sources)))
    with contextlib.ExitStack() as patches:
        faulty = _loaded(_replaced(sources[right], re.escape(fault.right), fault.wrong, fault.n, name))
        patches.callback(Path(faulty.__file__).unlink)
        for module in modules:
            for attribute, value in [*vars(module).items()]:
                if isinstance(value, launch.triton.runtime.JITFunction) and value.fn.__module__ == right.__name__:
                    patches.enter_context(mock.patch.object(module, attribute, getattr(faulty, value.fn.__name__)))
        yield


def _modules(prefix: str) -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith(prefix)]


def _loaded(source: str) -> ModuleType:
    """A module with this source, in a file, because Triton reads a kernel's source from one."""
    with tempfile.NamedTemporaryFile("w", prefix="faulty_", suffix=".py", delete=False) as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location(Path(file.name).stem, file.name)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(launch, "register"):  # the operators exist already
        spec.loader.exec_module(module)
    return module


def _replaced(text: str, pattern: str, wrong: str, n: int, name: str) -> str:
    """The text with match number n replaced."""
    matches = list(re.finditer(pattern, text))
    if len(matches) <= n:
        raise LookupError(f"{name}: the kernel has {len(matches)} times {pattern!r}, so plant the fault anew")
    return text[: matches[n].start()] + wrong + text[matches[n].end() :]
