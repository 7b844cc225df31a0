"""Compiles every kernel, with its shipped configuration, for GPUs that need not be present.

`python -m kernels.aot --target sm_90` prints a row per kernel: registers per thread, spilled bytes,
shared memory, tensor-core instructions and 128-bit loads from global memory. Exit code 1 if a
kernel spills, exceeds the GPU's shared memory or does not compile; 2 on bad input.

The ops are called as usual, on small CPU tensors. A stand-in for Triton's driver reports the
target, and each launch is turned into Triton's warm-up, which compiles a kernel without running it.
So signatures, alignment and constants are those of real launches and are not repeated here.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from kernels import attention, cross_entropy, gelu, layer_norm, tiles
from kernels.launch import HAS_TRITON, INTERPRETED, triton

SHARED_LIMIT = {  # KiB per program
    **{"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99},
    "gfx942": 64,
}
TENSOR_CORE = ("UTCHMMA", "HGMMA", "HMMA")  # SASS of tcgen05.mma (sm_100, sm_103), wgmma (sm_90) and mma
HEADER = f"{'kernel':<27} {'case':<28} {'registers':>9} {'spilled B':>9} {'shared KiB':>10} {'tensor core':>11} loads"


@dataclass(frozen=True)
class Row:
    """Result of compiling one kernel for one target. Instruction counts are static."""

    target: str
    kernel: str
    case: str
    registers: int = 0  # per thread
    spilled_bytes: int = 0  # per thread
    shared_bytes: int = 0  # per program
    tensor_core: str = ""  # "24 HGMMA"
    wide_loads: int = 0  # 128 bits each, from global memory
    failure: str = ""

    @property
    def problem(self) -> str:
        """Reason that this row fails, or an empty string."""
        if self.failure:
            return self.failure
        if self.spilled_bytes:
            return "spills"
        return "too much shared memory" if self.shared_bytes > 1024 * SHARED_LIMIT[self.target] else ""

    def __str__(self) -> str:
        if self.failure:
            return f"{self.kernel:<27} {self.case:<28} {self.failure}"
        return (
            f"{self.kernel:<27} {self.case:<28} {self.registers:>9} {self.spilled_bytes:>9} "
            f"{self.shared_bytes / 1024:>10.1f} {self.tensor_core:>11} {self.wide_loads:>5}"
            + (f"  {self.problem}" if self.problem else "")
        )


def _attention(D: int, dtype: torch.dtype, dropout_p=0.0, is_causal=True, tf32=False, has_documents=False) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    qkv = torch.zeros(1, 1024, 3, 2, D, dtype=dtype, requires_grad=True)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    starts = torch.zeros(1, 1024, dtype=torch.int32) if has_documents else None
    attention._attention(qkv, seed, is_causal, dropout_p, D**-0.5, starts)[0].sum().backward()


def _layer_norm(C: int, dtype: torch.dtype) -> None:
    x, residual = (torch.zeros(32, C, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.zeros(C, requires_grad=True) for _ in range(2))  # float32, as the model has them
    y, summed, _, _ = layer_norm._add_layer_norm(x, residual, weight, bias, 1e-5)
    (y + summed).sum().backward()
    layer_norm._layer_norm(x, weight, bias, 1e-5)[0].sum().backward()


def _gelu(F: int, dtype: torch.dtype) -> None:
    x, bias = torch.zeros(32, F, dtype=dtype, requires_grad=True), torch.zeros(F, requires_grad=True)
    gelu._gelu(x).sum().backward()
    gelu._bias_gelu(x, bias).sum().backward()


def _cross_entropy(Vp: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.zeros(16, 16, dtype=dtype), torch.zeros(Vp, 16, dtype=dtype)
    for needs_grad in (True, False):
        cross_entropy._triton_op(hidden, weight, torch.zeros(16, dtype=torch.int64), Vp - 47, -100, needs_grad)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable] = {
    **{f"attention D={D} bf16": functools.partial(_attention, D, BF16) for D in (16, 32, 64, 80, 96, 128, 256)},
    "attention D=64 fp16": functools.partial(_attention, 64, FP16),
    "attention D=64 bf16 full": functools.partial(_attention, 64, BF16, is_causal=False),
    "attention D=64 bf16 dropout": functools.partial(_attention, 64, BF16, dropout_p=0.1),
    "attention D=64 bf16 documents": functools.partial(_attention, 64, BF16, has_documents=True),
    **{f"attention D={D} tf32": functools.partial(_attention, D, FP32, tf32=True) for D in (64, 128, 256)},
    **{f"attention D={D} fp32": functools.partial(_attention, D, FP32) for D in (64, 128, 256)},
    **{f"layer_norm C={C} bf16": functools.partial(_layer_norm, C, BF16) for C in (768, 1600, 4096, 12288)},
    "layer_norm C=768 fp32": functools.partial(_layer_norm, 768, FP32),
    "gelu F=3072 bf16": functools.partial(_gelu, 3072, BF16),
    "gelu F=3072 fp32": functools.partial(_gelu, 3072, FP32),
    "cross_entropy V=50257 bf16": functools.partial(_cross_entropy, 50304, BF16),
    "cross_entropy V=50257 fp32": functools.partial(_cross_entropy, 50304, FP32),
}


class _Driver:
    """The part of Triton's driver interface that compilation needs."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.target = (
            GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
            if target.startswith("sm_")
            else GPUTarget("hip", target, 64)
        )

    def get_current_device(self) -> str:
        return str(self.target.arch)  # Triton caches compiled kernels by device, so each target has its own

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self):
        return self.target


def compile_case(target: str, case: str) -> list[Row]:
    """Compiles the kernels that one case launches, and returns a row for each.

    Raises ValueError under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if INTERPRETED:
        raise ValueError("kernels.aot: TRITON_INTERPRET must be unset, it turns every kernel into plain Python")
    compiled: dict[tuple, object] = {}
    run = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled[kernel.fn.__name__, len(compiled)] = run(kernel, *args, grid=grid, warmup=True, **options)

    precision = torch.get_float32_matmul_precision()
    triton.runtime.driver.set_active(_Driver(target))
    tiles.use({})  # forgets the tiles of the target before
    triton.runtime.JITFunction.run = compile_only
    failure = ""
    try:
        CASES[case]()
    except Exception as error:  # the compiler raises many types
        failure = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    finally:
        triton.runtime.JITFunction.run = run
        torch.set_float32_matmul_precision(precision)
    rows = {}  # one per kernel and binary, since layer_norm and add_layer_norm share some
    for (name, _), binary in compiled.items():
        rows.setdefault(
            (name, binary.hash), _read(target, name.removeprefix("_").removesuffix("_kernel"), case, binary)
        )
    return [*rows.values(), *([Row(target, "", case, failure=failure)] if failure else [])]


def _read(target: str, kernel: str, case: str, binary) -> Row:
    """Row of one compiled kernel, read from its machine code."""
    if target.startswith("sm_"):
        usage, code = _disassemble(binary.asm["cubin"])
        counts = {name: len(re.findall(rf"\b{name}", code)) for name in TENSOR_CORE}
        registers, spilled = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
        tensor_core = " ".join(f"{count} {name}" for name, count in counts.items() if count)
        wide_loads = len(re.findall(r"\bLDG[.A-Z0-9]*\.128|\bLDGSTS[.A-Z0-9]*\.128", code))
    else:
        code = binary.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{field}:\s+(\d+)", code)[1]) for field in ("vgpr_count", "private_segment_fixed_size")
        )
        mfma = len(re.findall(r"\bv_mfma", code))
        tensor_core = f"{mfma} MFMA" if mfma else ""
        wide_loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx4", code))
    return Row(target, kernel, case, registers, spilled, binary.metadata.shared, tensor_core, wide_loads)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS of a binary, from the NVIDIA tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([tools / "cuobjdump", "-res-usage", file.name], [tools / "nvdisasm", file.name])
        usage, code = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands
        )
    return usage, code


def compile_all(targets: list[str], cases: list[str], jobs: int) -> Iterator[list[Row]]:
    """Yields the rows of every case for every target, in order.

    `jobs` is the number of compiling processes; 1 compiles in this process.
    """
    pairs = [(target, case) for target in targets for case in cases]
    if jobs == 1:
        yield from (compile_case(*pair) for pair in pairs)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, *zip(*pairs, strict=True))


def main(args: list[str]) -> int:
    """Prints the rows. Exit code: 0 if all kernels fit, 1 if one does not, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT), metavar="GPU")
    parser.add_argument("--only", default="", help='only cases whose name contains this, such as "D=64 bf16"')
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    options = parser.parse_args(args)
    cases = [case for case in CASES if options.only in case]
    if INTERPRETED or not HAS_TRITON or not cases:
        message = "Triton must be installed" if not HAS_TRITON else "TRITON_INTERPRET must be unset"
        if not cases:
            message = f"--only must be part of a case, got {options.only!r}; the cases are: {', '.join(CASES)}"
        print(f"kernels.aot: {message}", file=sys.stderr)
        return 2
    problems, shown = 0, None
    for rows in compile_all(options.target, cases, max(1, options.jobs)):
        for row in rows:
            if row.target != shown:
                print(f"\n{row.target}: at most {SHARED_LIMIT[row.target]} KiB of shared memory\n{HEADER}")
                shown = row.target
            print(row, flush=True)
            problems += bool(row.problem)
    print(f"\n{problems} of the kernels do not fit" if problems else "\nevery kernel fits, with no spilled register")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
