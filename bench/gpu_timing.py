"""How bench.gpu runs an op and how it times one: CUDA events, head start for the CPU, cold L2, round robin."""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

ROUNDS = 6  # of which the first is warm-up
MOST_SAMPLES = 30  # per contestant and phase
BUDGET_MS = 700.0  # of timed work per contestant and phase: slow ones get fewer samples


def outputs_of(fn: Callable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The op's outputs, as a tuple even if there is one."""
    outputs = fn(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of sum(outputs * douts) in every floating input, dense: what the layer before can use."""
    leaves = [t for t in inputs if t.is_floating_point()]
    return [gradient.contiguous() for gradient in torch.autograd.grad(outputs, leaves, douts)]


def values(fn: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then gradients."""
    outputs = outputs_of(fn, inputs)
    return [*(output.detach() for output in outputs), *gradients(outputs, inputs, douts)]


def with_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as leaves: the floating ones ask for their gradient."""
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def random_douts(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Incoming gradients: standard normal, and 1 for a loss."""
    return [torch.randn_like(output) if output.ndim else torch.ones_like(output) for output in outputs]


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||, in float64; NaN or infinite where `got` is. Raises ValueError if shapes differ."""
    if got.shape != truth.shape:
        raise ValueError(f"the shape must be {tuple(truth.shape)}, got {tuple(got.shape)}")
    truth = truth.double()
    return ((got.double() - truth).norm() / truth.norm()).item()


class Timer(AbstractContextManager):
    """Times the device's work inside `with`, as milliseconds between two events.

    A spacer goes first: it writes a buffer larger than any L2, and while the device is at it the CPU queues the whole
    timed region, so that what is measured is the device's time and not the launches'. It leaves L2 as another kernel
    would: full of other data, and not all of it written back yet. Without a spacer the region also waits for its
    launches, as a training step does.
    """

    def __init__(self, spacer: Tensor | None):
        self.spacer = spacer
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> "Timer":
        self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        if self.spacer is not None:
            for _ in range(6):  # about two milliseconds
                self.spacer.zero_()
        self.events[-1][0].record()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.events[-1][1].record()

    def read_ms(self) -> list[float]:
        """Waits for the device and gives every region's time since the last reading."""
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in self.events]
        self.events.clear()
        return times


def spacer() -> Tensor:
    """1 GiB on the GPU."""
    return torch.empty(2**30, dtype=torch.int8, device="cuda")


def run(fn: Callable, sets: Sequence[tuple], phase: str, timer: AbstractContextManager) -> None:
    """One phase of an op, once on every (inputs, douts), with only that phase inside the timer."""
    if phase == "backward":
        forwards = [outputs_of(fn, inputs) for inputs, _ in sets]
        with timer:
            for outputs, (inputs, douts) in zip(forwards, sets, strict=True):
                gradients(outputs, inputs, douts)
        return
    with torch.set_grad_enabled(phase != "forward_no_grad"), timer:
        for inputs, douts in sets:
            outputs = outputs_of(fn, inputs)
            if phase == "both":
                gradients(outputs, inputs, douts)
            del outputs


def round_robin(
    contestants: dict[str, Callable], sets: Sequence[tuple], phases: Sequence[str], timer: Timer, is_over: Callable
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds per call of every sample, by contestant and phase; contestants take turns, and so do input sets.

    sets: (inputs, douts) pairs. Stops early, after a whole round, once is_over().
    """
    samples: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in phases} for name in contestants}
    plans: dict[tuple[str, str], tuple[int, int]] = {}
    turn = 0
    for round_ in range(ROUNDS):
        for name, fn in contestants.items():
            for phase in phases:
                count, calls = plans.get((name, phase), (2, 1))
                for _ in range(count):
                    run(fn, [sets[(turn + i) % len(sets)] for i in range(calls)], phase, timer)
                    turn += 1
                times = [ms / calls for ms in timer.read_ms()]
                if round_ == 0:
                    plans[name, phase] = plan(times[-1])
                else:
                    samples[name][phase] += times
        if round_ > 0 and is_over():
            break
    return samples


def plan(estimate_ms: float) -> tuple[int, int]:
    """Samples in each of the counted rounds, at least one, and calls per sample.

    Events cost microseconds, which a call of less than a millisecond shares with others.
    """
    calls = 4 if estimate_ms < 1.0 else 1
    count = min(MOST_SAMPLES, BUDGET_MS / max(estimate_ms * calls, 1e-3)) / (ROUNDS - 1)
    return max(1, math.floor(count)), calls


def summary(times_ms: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many samples they are of."""
    cuts = statistics.quantiles(times_ms, n=5, method="inclusive") if len(times_ms) > 1 else [times_ms[0]] * 4
    return {
        "median_ms": statistics.median(times_ms),
        "p20_ms": cuts[0],
        "p80_ms": cuts[3],
        "samples": len(times_ms),
    }
