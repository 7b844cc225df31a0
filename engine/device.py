"""The device: which one this machine has, its precision, compiler, memory and peak FLOP/s.

The other modules ask this one what a kind of device can do. PyTorch calls both CUDA and ROCm "cuda";
"xpu" is Intel's, "mps" Apple's. Nothing has been run on ROCm, XPU or MPS: what is written for them
follows PyTorch's documentation and sources.

Precision is that of activations and matrix products. bf16: bfloat16. fp16: float16, with the loss
scaled so that small gradients survive. tf32: float32 activations, products rounded to 10-bit
mantissas on tensor cores. fp32: float32 throughout. Parameters, their gradients, optimizer state
and statistics are float32 in all four.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from engine import speed
from engine.chips import PEAK_TFLOPS
from engine.config import TrainConfig
from engine.errors import BadInput
from kernels.dispatch import has_c_compiler
from kernels.launch import HAS_TRITON
from model.presets import GPT2Config, num_parameters

COMPUTE_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
BUILD_LIMIT = 60.0  # seconds for the build of an empty library
WORTHWHILE = 1.1  # least speedup of a training step in bf16 over fp32 for which a CPU takes bf16

OTHER_CARD = r"(?! (?:Ti|SUPER|D)\b)"  # after a name: another card than the one named
NOT_THE_WHOLE_CARD = re.compile(r"\bMIG\b|Laptop|Max-Q|-\d+[ABCQ]$")  # the last: a share that a hypervisor gives


ACCELERATORS = ("cuda", "xpu", "mps")  # types that a run may be on, besides "cpu"
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # of collectives between devices; RCCL, of ROCm, goes by NCCL's name
HAS_STREAMS = ("cuda", "xpu")  # whose copies and events run beside the host; Triton compiles for these


# ---- Which device -------------------------------------------------------------------------------------------------


def current() -> torch.device:
    """This machine's accelerator, without an index, or the CPU. GPT2_DEVICE=cpu asks for the CPU.

    Raises BadInput for another value of the variable.
    """
    asked = os.environ.get("GPT2_DEVICE", "")
    if asked not in ("", "cpu"):
        raise BadInput(f"gpt2: the variable GPT2_DEVICE must be cpu, got {asked!r}; unset it to use an accelerator")
    found = None if asked else torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type in ACCELERATORS else torch.device("cpu")


def is_nvidia(device: torch.device) -> bool:
    """Whether the device is NVIDIA's, whose capability is a number such as (9, 0)."""
    return device.type == "cuda" and torch.version.hip is None


def name(device: torch.device) -> str:
    """An accelerator's name, such as "NVIDIA H200"."""
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return torch.get_device_module(device).get_device_name(device)


def events(device: torch.device) -> type | None:
    """The class of the device's events; None on a CPU and on MPS, where copies wait and the host keeps the time."""
    return torch.get_device_module(device).Event if device.type in HAS_STREAMS else None


def send(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """CPU tensors copied to the device, from pinned memory without waiting."""
    return [tensor.to(device, non_blocking=device.type in HAS_STREAMS) for tensor in tensors]


def heeds_found_inf(device: torch.device) -> bool:
    """Whether fused AdamW heeds `found_inf` on the device; on MPS it reads no such number."""
    return device.type != "mps"


@functools.cache
def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type of the device: float32 on MPS and on an XPU without float64, else float64."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def check_can_train(config: TrainConfig, device: torch.device) -> None:
    """Raises BadInput for what the device cannot do, whatever its memory."""
    wrong = None
    if config.parallel != "ddp":
        wrong = f"--parallel {config.parallel} needs collectives"
    elif config.recompute != "none" and config.model.dropout:  # PyTorch restores no random state of MPS
        wrong = f"--recompute {config.recompute} with dropout must draw the same numbers twice"
    if device.type == "mps" and wrong is not None:
        raise BadInput(f"train: {wrong}, which PyTorch cannot do on mps; leave it out")


# ---- Precision ----------------------------------------------------------------------------------------------------


def choose_precision(
    asked: str, device: torch.device, who: str = "train", model: GPT2Config = speed.USUAL
) -> tuple[str, str]:
    """(precision, why) for a device. Raises BadInput, from `who`, if it cannot do what was asked.

    On a CPU with fast bf16 products, auto tunes malloc as a run does, and times a small step of this model's width.
    """
    has_tensor_cores = is_nvidia(device) and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked == "tf32" and not has_tensor_cores:
        got = "an AMD GPU" if device.type == "cuda" and not is_nvidia(device) else device.type
        raise BadInput(f"{who}: --precision tf32 needs an NVIDIA GPU from 2020 on (sm_80), got {got}; use fp32")
    if asked == "bf16" and is_nvidia(device) and not has_tensor_cores:
        raise BadInput(f"{who}: --precision bf16 needs an NVIDIA GPU from 2020 on (sm_80); use fp16 or fp32")
    if asked == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise BadInput(f"{who}: --precision bf16 needs macOS 14 on mps; use fp16 or fp32")
    if asked != "auto":
        return asked, "asked for"
    if has_tensor_cores:
        return "bf16", "this GPU has bf16 tensor cores"
    if is_nvidia(device):
        return "fp32", "this GPU has no bf16 tensor cores"
    if device.type == "cuda":  # a ROCm capability is another number: (9, 0) is an MI100 or an MI200
        return "bf16", "PyTorch has bf16 on every AMD GPU"
    if device.type == "xpu":
        return ("bf16", "this XPU has bf16") if torch.xpu.is_bf16_supported() else ("fp32", "this XPU has no bf16")
    if device.type == "mps":
        return "fp32", "the default on mps"
    what, advice = "matrix product", ""
    ratio = speed.matmul_seconds(torch.float32) / speed.matmul_seconds(torch.bfloat16)
    if ratio >= WORTHWHILE:  # emulated bf16 is not worth a step, which would take seconds
        tune_malloc()
        what, ratio = "training step", speed.step_speedup(speed.small_like(model))
    precision = "bf16" if ratio >= WORTHWHILE else "fp32"
    if 1 < ratio < WORTHWHILE:
        advice = f"; auto takes bf16 from {WORTHWHILE}x on"
    return precision, f"a bf16 {what} ran at {ratio:.3g}x the speed of fp32 on this CPU{advice}"


def apply_precision(precision: str) -> torch.dtype:
    """Sets PyTorch's mode for float32 matrix products and returns the dtype of the activations."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    return COMPUTE_DTYPES[precision]


@contextmanager
def modes_kept() -> Iterator[None]:
    """Context manager that puts back what a run sets for the whole process.

    These are PyTorch's random state, threads, precision of matrix products, and CUDA graphs.
    """
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    gpus, graphs = [], nullcontext()
    if torch.cuda.is_available():
        import torch._inductor.config as inductor

        gpus, graphs = [torch.cuda.current_device()], inductor.patch("triton.cudagraphs", inductor.triton.cudagraphs)
    try:
        with torch.random.fork_rng(gpus), graphs:
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(products)


@contextmanager
def deterministic(is_asked: bool) -> Iterator[None]:
    """Context manager in which PyTorch's own ops give the same bits in every run, if asked.

    Our kernels do so anyway. Inductor then leaves the embeddings' gradients to an op that sorts,
    in place of atomics, and chooses nothing by timing. Enter it before the first matrix product on
    a GPU, where cuBLAS reads its variable. New memory is not filled: every op of ours writes all of
    its outputs.
    """
    if not is_asked:
        yield
        return
    import torch._inductor.config as inductor

    variable, is_ours = "CUBLAS_WORKSPACE_CONFIG", "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    os.environ.setdefault(variable, ":4096:8")  # a workspace of its own for each stream
    were, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(were)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        if is_ours:
            os.environ.pop(variable, None)


# ---- Compiler -----------------------------------------------------------------------------------------------------


def wants_compile(asked: bool | None, device: torch.device) -> tuple[bool, str]:
    """(whether to compile the training step, why).

    asked: --compile, or None for the default: on CUDA and ROCm only.
    """
    wanted = device.type == "cuda" if asked is None else asked
    if not wanted:
        return False, "off, as asked" if asked is False else f"off, the default on a {device.type}"
    obstacle = compile_obstacle(device)
    return obstacle is None, "on" if obstacle is None else f"skipped, {obstacle}: steps run uncompiled"


def use_cuda_graphs(device: torch.device, is_compiled: bool) -> None:
    """Has Inductor record what it compiles from now on as CUDA graphs, and replay those.

    Raises BadInput on a CPU or without torch.compile.
    """
    if device.type != "cuda" or not is_compiled:
        got = f"a {device.type}" + ("" if is_compiled else " without torch.compile")
        raise BadInput(f"train: --cuda-graphs needs a GPU and torch.compile, got {got}; leave it out")
    import torch._inductor.config as inductor

    inductor.triton.cudagraphs = True


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot run here, or None.

    A GPU needs Triton and a C compiler, a CPU a C++ compiler.
    """
    if device.type == "mps":
        return "PyTorch's compiler for mps is a prototype"
    if device.type in HAS_STREAMS:
        if not HAS_TRITON:
            return "Triton is not installed"
        if not has_c_compiler():
            return "there is no C compiler here"
        if is_nvidia(device) and torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs sm_70"
        return _build_obstacle(os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang"))
    # PyTorch takes the compiler that CXX names and tries no other if that one is missing.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return _build_obstacle(compiler) if shutil.which(compiler) else "there is no C++ compiler here"


def _build_obstacle(compiler: str) -> str | None:
    """Why a library cannot be built and opened where Inductor and Triton keep theirs, or None.

    Builds an empty one: finds a compiler that fails, and a directory that is full, noexec, read-only or
    cannot be made.
    """
    try:
        folders = [
            os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(),
            os.environ.get("TRITON_CACHE_DIR"),
        ]
        for folder in filter(None, folders):
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                source, library = os.path.join(inside, "empty.c"), os.path.join(inside, "empty.so")
                Path(source).write_text("int gpt2_empty(void) { return 0; }\n")
                command = [compiler, "-shared", "-fPIC", source, "-o", library]
                done = subprocess.run(command, capture_output=True, timeout=BUILD_LIMIT, text=True, errors="replace")
                if done.returncode != 0:
                    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                    return f"the compiler {compiler} fails in {folder} ({said[0][:150]})"
                ctypes.CDLL(library)
    except subprocess.TimeoutExpired:
        return f"the compiler {compiler} hangs"
    except OSError as error:
        return f"compiled code cannot be kept and opened ({error})"
    return None


# ---- Memory and speed ---------------------------------------------------------------------------------------------


def tune_malloc() -> None:
    """Makes glibc reuse the memory of freed tensors; does nothing without glibc, as on macOS.

    By default glibc returns every freed megabyte to the kernel, which hands it back page by page. A
    step of `tiny` on 512 bytes with AdamW took 48 ms without this and 42 ms with it (medians of 4
    interleaved runs, 2 cores of an AMD EPYC Milan, torch 2.13).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes: smaller allocations come from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes: free memory at the top of the heap is kept below this


def check_memory(config: TrainConfig, device: torch.device) -> None:
    """Raises BadInput if the host's memory cannot hold the model of each of its processes, which is built there."""
    count, memory = num_parameters(config.model), cpu_memory_bytes()
    processes, each, what = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 4, "weights"  # float32
    if device.type == "cpu" and config.parallel == "ddp":
        each, what = 12, "weights, gradients and moments"  # at least one moment
    if memory is not None and (needed := each * count * processes) > memory:
        raise BadInput(
            f"train: the model of each process must fit into this host's memory, got {count:,} parameters, whose "
            f"{what} take at least {format_bytes(needed)} in {processes} process{'es' * (processes > 1)}, and "
            f"{format_bytes(memory)} of memory; choose a smaller preset, or lower --model.n-layer or --model.n-embd"
        )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Data-sheet peak of the device in FLOP/s for bf16 and fp16, or None where it is not known."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    card = name(device)
    if NOT_THE_WHOLE_CARD.search(card):
        return None
    return next((t * 1e12 for known, t in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b{OTHER_CARD}", card)), None)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Free memory of an accelerator, of all that any process may take."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return torch.accelerator.get_memory_info(device)[0]


def forget_memory(device: torch.device) -> None:
    """Gives the allocator's cache back, and begins its peak anew. No-op on a CPU."""
    if device.type == "mps":
        torch.mps.empty_cache()
    elif device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Highest memory use so far in GiB: allocated by PyTorch on a GPU, resident on a CPU.

    PyTorch keeps no peak on MPS: there it is what Metal holds for it now, with its cache.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def alloc_retries(device: torch.device) -> int | None:
    """Times that the GPU's allocator had to free its cache, which is slow; None on a CPU and on MPS."""
    if device.type not in HAS_STREAMS:
        return None
    return torch.accelerator.memory_stats(device).get("num_alloc_retries", 0)  # empty before the first allocation


def describe(device: torch.device) -> str:
    """Name and memory of the device."""
    if device.type in HAS_STREAMS:
        gpu = torch.get_device_module(device).get_device_properties(device)
        return f"{device}, {gpu.name}, {format_bytes(gpu.total_memory)}"
    memory, unit = cpu_memory_bytes(), "CPU" if device.type == "cpu" else name(device)
    return f"this machine's {unit}" if memory is None else f"this machine's {unit}, {format_bytes(memory)}"


def format_bytes(count: int) -> str:
    """A number of bytes in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def cpu_memory_bytes() -> int | None:
    """Memory of this machine in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not Linux
        return None
