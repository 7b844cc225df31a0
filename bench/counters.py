"""How one call of a function is counted: operators, tensors' memory, calls, and instructions by callgrind.

For bench.counts. Everything but the instructions is exact: the same function in the same state gives the same numbers.
"""

import contextlib
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

from bench.machine import ROOT

CALLGRIND_LIMIT_S = 300


def counted(function: Callable[[], object], *, has_torch: bool) -> dict:
    """Every count of one call, and the operators by name. Each is taken in a call of its own."""
    found = {}
    if has_torch:
        ops = operators(function)
        allocations, allocated_bytes, peak_bytes = memory(function)
        found = {
            "op_calls": ops.total(),
            "op_calls_by_name": dict(sorted(ops.items())),
            "allocations": allocations,
            "allocated_bytes": allocated_bytes,
            "peak_bytes": peak_bytes,
        }
    python_calls, c_calls = calls(function)
    return found | {"python_calls": python_calls, "c_calls": c_calls}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without collections of garbage, which come when they like."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what libraries write to the standard error: PyTorch's profiler notes each of its starts there."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def operators(function: Callable[[], object]) -> Counter:
    """Calls of ATen operators and of registered ones, those of the backward pass among them, by name."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found[str(op)] += 1
            return op(*args, **(kwargs or {}))

    with undisturbed(), Count():
        function()
    return found


def memory(function: Callable[[], object]) -> tuple[int, int, int]:
    """Allocations of tensors, the bytes of all of them, and the most bytes at once above what was held before."""
    from torch.profiler import ProfilerActivity, profile

    with undisturbed(), silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    taken = [change for change in changes if change > 0]
    return len(taken), sum(taken), max(accumulate(changes, initial=0))


def calls(function: Callable[[], object]) -> tuple[int, int]:
    """Calls of Python functions and of C functions, made by this thread."""
    found = {"call": 0, "c_call": 0, "return": 0, "c_return": 0, "c_exception": 0}

    def note(frame, event: str, argument) -> None:
        found[event] += 1

    before = sys.getprofile()
    with undisturbed():
        sys.setprofile(note)
        try:
            function()
        finally:
            sys.setprofile(before)
    return found["call"], found["c_call"]


# ---- Instructions ---------------------------------------------------------------------------------------------------


def inside_ffi_call(function: Callable[[], object]) -> None:
    """Calls the function through libffi's ffi_call, at whose entry and exit callgrind switches counting on and off."""
    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    item, one = ctypes.create_string_buffer(8), ctypes.c_size_t(1)

    def found(key, element) -> int:
        function()
        return 0

    ctypes.CDLL(None).bsearch(item, item, one, one, signature(found))


def instructions(program: str, num_calls: int) -> tuple[list[int], str]:
    """Of each `inside_ffi_call` that the program makes, and nothing; or none, and why. program: Python's source."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return [], "valgrind is not installed"
    with tempfile.TemporaryDirectory(prefix="bench_counts_") as directory:
        options = ["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=ffi_call", "--dump-after=ffi_call"]
        command = [valgrind, *options, f"--callgrind-out-file={directory}/out", sys.executable, "-c", program]
        fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment = fixed | {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=CALLGRIND_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return [], f"callgrind took more than {CALLGRIND_LIMIT_S} s"
        if done.returncode != 0:
            return [], f"callgrind ended with {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}"
        return totals(Path(directory), num_calls)


def totals(directory: Path, num_calls: int) -> tuple[list[int], str]:
    """The instructions of callgrind's parts, the last of which belong to the calls."""
    parts = sorted(directory.glob("out.*"), key=lambda path: int(path.suffix[1:]))
    lines = [line for path in parts for line in path.read_text(encoding="utf-8").splitlines()]
    sums = [int(line.split()[1]) for line in lines if line.startswith("totals:")]
    sums = [total for total in sums if total]
    if len(sums) < num_calls:
        return [], "callgrind saw no ffi_call: this Python's libffi does not show its names"
    return sums[-num_calls:], ""
