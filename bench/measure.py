"""The one timing loop, the clocks of a CPU and a GPU, and peak memory."""

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Prepare = Callable[[], Callable[[], object]]  # runs untimed and returns what is timed


def within(seconds: float, least: int = 5, most: int = 30) -> Callable[[int], bool]:
    """Whether a loop goes on after so many rounds: at least `least`, at most `most`, else until the time is over."""
    deadline = time.monotonic() + seconds
    return lambda done: done < least or (done < most and time.monotonic() < deadline)


def in_turns(samplers: dict[Name, Callable[[], float]], goes_on: Callable[[int], bool]) -> dict[Name, list[float]]:
    """Samples by name: one of each in every round, every second round in reverse, for as long as goes_on(rounds)."""
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    rounds = 0
    while goes_on(rounds):
        for name in [*samplers][:: -1 if rounds % 2 else 1]:
            samples[name].append(samplers[name]())
        rounds += 1
    return samples


class Stopwatch:
    """Measures seconds of calls on one device; a cold one first fills the caches with other data.

    On a GPU the filling, about two milliseconds of it, also gives the CPU time to queue the whole timed region, so that
    the device's work is timed and not its launches.
    """

    def __init__(self, device: torch.device, *, is_cold: bool = True):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.calls = 4 if self.on_gpu else 1  # of a sample: recording an event costs microseconds
        size = 2**30 if self.on_gpu else 2**26
        self.filler = torch.empty(size, dtype=torch.int8, device=device) if is_cold else None

    def __call__(self, prepare: Prepare, calls: int | None = None) -> float:
        """Seconds of one call of what prepare() returns. Waits for the device."""
        prepared = [prepare() for _ in range(calls or self.calls)]
        for _ in range(6 if self.on_gpu else 1):
            if self.filler is not None:
                self.filler.zero_()
        if self.on_gpu:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for call in prepared:
                call()
            ended.record()
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3 / len(prepared)
        start = time.perf_counter()
        for call in prepared:
            call()
        return (time.perf_counter() - start) / len(prepared)


@dataclass
class Peak:
    """Memory of a region in bytes: the most while it ran, and what was held when it began."""

    before: int = 0
    most: int = 0

    @property
    def above(self) -> int:
        return self.most - self.before


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Fills a Peak when the region ends: allocated memory on a GPU, which it waits for, else resident memory."""
    peak = Peak()
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        peak.before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.most = torch.cuda.max_memory_allocated()
        return
    status, can_ask = Path("/proc/self/status"), False
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        peak.before, can_ask = 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]), True
    yield peak
    if can_ask:
        peak.most = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def release_freed_memory() -> None:
    """Returns the memory of freed tensors to the system, so that the next peak counts what is taken again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Ceiling:
    """What the machine reaches at most: a large matrix product, in FLOP/s, or a large copy, in B/s.

    A sample is the best of four. Raises AssertionError if the result is wrong.
    """

    def __init__(self, kind: str, device: torch.device, dtype: torch.dtype, *, is_small: bool = False):
        on_gpu = device.type == "cuda"
        n, elements = (64, 4096) if is_small else (8192, 2**30) if on_gpu else (2048, 2**26)
        self.watch = Stopwatch(device, is_cold=False)
        if kind == "matmul":
            left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            self.amount, out = 2 * n**3, torch.empty_like(left)
            self.call = lambda: torch.mm(left, right, out=out)
            exact = left[:64].double() @ right.double()
            torch.testing.assert_close(self.call()[:64].double(), exact, rtol=2e-2, atol=2e-2 * n**0.5)
        else:
            source = torch.randn(elements, device=device, dtype=dtype)
            self.amount, target = 2 * source.nbytes, torch.empty_like(source)  # read and written
            self.call = lambda: target.copy_(source)
            torch.testing.assert_close(self.call(), source, rtol=0, atol=0)

    def sample(self) -> float:
        """FLOPs or bytes per second."""
        return self.amount / min(self.watch(lambda: self.call, calls=1) for _ in range(4))
