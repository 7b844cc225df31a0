"""Emulator of an NVIDIA GPU: runs Triton's kernels on the CPU as the code that Triton compiles them to.

    with emulator.install("sm_90") as emulated:
        y = gelu_triton(torch.randn(7, dtype=torch.bfloat16))
    assert not emulated.problems

Inside, a launch on CPU tensors is compiled for the target, and its PTX is translated (translate.py) and interpreted
(runtime.h). Only sm_80 and sm_90, only in a process without TRITON_INTERPRET.

It covers the masks, addresses, layouts, pipelines and rounding of the compiled code. It reports
- accesses outside of the tensors or of shared memory, and misaligned ones;
- races of warps between two barriers, in shared and global memory, unless they store what is there already;
- programs that store one element, or store and load one;
- warps that end while others wait at a barrier, and cp.async that nothing waits for;
- lanes of a warp that part at a branch. A GPU runs them; here they do so only where log2 meets infinity or NaN.
Registers, shared memory and fresh tensors start as NaN. A cp.async lands as late as it may. Programs and warps run in
their order or in a shuffled one.

It does not cover ptxas and the machine code, launchers and drivers, time, caches, or a memory model weaker than
barriers. wgmma computes when it is issued, so a missing wgmma wait or proxy fence is not seen. Sums of tensor cores are
plain float32 in order of k, and ex2, lg2, rcp and sqrt are rounded correctly: a GPU is up to 2 ulp worse in these.
tf32 operands lose their low 13 bits. An access between the rows of a strided view is inside its tensor.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from translate import Program, handlers

CACHE = Path(os.environ.get("PTX_CACHE") or Path(tempfile.gettempdir()) / f"gpt2_ptx_{os.getuid()}")
HAS_COMPILER = shutil.which("g++") is not None
FLAGS = (
    *("-O2", "-ftree-vectorize", "-march=native", "-std=c++17", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fno-strict-aliasing"),
)
SHOWN = 8192  # bytes of text about the problems of a launch


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The interpreter, built once and kept in CACHE."""
    source = Path(__file__).with_name("runtime.h").read_text() + handlers()
    key = hashlib.sha256("\n".join((source, *FLAGS, platform.node())).encode()).hexdigest()[:20]
    library = CACHE / f"{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # moved when whole, since processes share the cache
            code, built = Path(folder) / "runtime.cpp", Path(folder) / "runtime.so"
            code.write_text(source)
            subprocess.run(["g++", *FLAGS, str(code), "-o", str(built)], check=True)
            built.replace(library)
    return ctypes.CDLL(str(library))


_program = functools.lru_cache(maxsize=256)(Program)  # of a kernel's PTX


class Emulator:
    """A target, how launches on it run, and what was noticed.

    order: 0 runs programs and warps in their order, any other number is the seed of a shuffle. edit:
    changes a kernel's PTX before it is translated. launches: the kernels' names, in time order.
    """

    def __init__(self, target: str):
        self.target = target
        self.order = 0
        self.edit: Callable[[str, str], str] = lambda kernel, ptx: ptx
        self.problems: list[str] = []
        self.launches: list[str] = []

    def execute(self, kernel: str, binary, arguments: dict, grid: tuple[int, ...]) -> None:
        """Runs one launch of a compiled kernel. `arguments` are those of its call, by name."""
        self.launches.append(kernel)
        program = _program(self.edit(kernel, binary.asm["ptx"]))
        passed = [(arguments[name], kind) for name, kind in binary.src.signature.items() if kind != "constexpr"]
        words = [_word(value, kind) for value, kind in passed] + [0, 0]  # two kinds of scratch memory, unused
        image = program.image(words)
        ranges = _merged([_extent(value) for value, _ in passed if isinstance(value, torch.Tensor)])
        tensors = (ctypes.c_uint64 * (2 * len(ranges)))(*(end for both in ranges for end in both))
        text = ctypes.create_string_buffer(SHOWN)
        count = _runtime().run(
            _pointer(program.instructions), _pointer(program.operands),
            image, len(image), tensors, len(ranges), (ctypes.c_int * 3)(*grid, *(1,) * (3 - len(grid))),
            program.threads // 32, binary.metadata.shared, self.order, text, SHOWN,
        )  # fmt: skip
        if count:
            self.problems += [f"{kernel}: {line}" for line in text.value.decode().splitlines()]


def _pointer(numbers: array) -> ctypes.Array:
    return (ctypes.c_int * len(numbers)).from_buffer(numbers)


def _word(value: object, kind: str) -> int:
    """Argument of a launch as the unsigned number in its 8 bytes."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    if kind.startswith(("fp", "bf")):
        raise NotImplementedError(f"emulator: an argument of type {kind}")
    return int(value) % 2**64


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last address of a tensor, which may be strided."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + size


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses in ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif begin < end:
            merged.append((begin, end))
    return merged


@contextlib.contextmanager
def install(target: str) -> Iterator[Emulator]:
    """Makes every Triton launch compile for `target` and run here, and lets the ops take CPU tensors.

    Triton's cache is in CACHE too, because the machine code, which is not needed, is not made.
    """
    from triton.backends.nvidia.compiler import CUDABackend

    from kernels import aot, dispatch
    from kernels.launch import INTERPRETED, triton

    if INTERPRETED:
        raise ValueError("emulator: TRITON_INTERPRET must be unset, it turns every kernel into plain Python")
    emulator, compile_kernel = Emulator(target), triton.runtime.JITFunction.run

    def launch(kernel, *args, grid, warmup, **options):
        binary = compile_kernel(kernel, *args, grid=grid, warmup=True, **options)
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        emulator.execute(kernel.fn.__name__, binary, arguments, grid(arguments) if callable(grid) else grid)
        return binary

    def replace(owner, name, new):
        patches.enter_context(mock.patch.object(owner, name, new))

    with contextlib.ExitStack() as patches:
        replace(triton.knobs.cache, "dir", str(CACHE / "triton"))
        replace(CUDABackend, "make_cubin", lambda *args, **options: b"")
        replace(triton.runtime.JITFunction, "run", launch)
        replace(dispatch, "triton_obstacle", lambda *args: None)
        for module in set(dispatch.MODULES.values()):
            replace(module, "check_triton", lambda *args, **tensors: None)
        triton.runtime.driver.set_active(aot._Driver(target))
        yield emulator
