"""Where the wall time of a run goes: updates, and inside them data and communication; evaluation; checkpoints.

    step = data + communication + compute        milliseconds per update
    wall = updates * step + eval + checkpoint    of the loop, but for a few microseconds

Communication is what the backward pass could not hide: from this rank's last gradient to the moment when the gradients
of all ranks are averaged. It therefore holds the wait for slower ranks too. On a GPU it is taken from events on the
GPU's own clock, which cost no waiting.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Moment = float | torch.cuda.Event  # seconds of time.perf_counter, or a point in the GPU's work


class Clock:
    """Splits the time between two readings. Nothing but read() waits for the GPU."""

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"
        self._step_began: float | None = None
        self._last_gradient: Moment | None = None
        self._forget()

    def _forget(self) -> None:
        self._steps, self._step_seconds, self._data_seconds = 0, 0.0, 0.0
        self._communications: list[tuple[Moment, Moment]] = []
        self._parts: list[tuple[str, Moment, Moment, float]] = []  # name, begin, end, seconds on the CPU's clock

    @contextmanager
    def part(self, name: Literal["data", "eval", "checkpoint"]) -> Iterator[None]:
        """Time spent on one of these. data belongs to an update, called inside or before it; the others stand apart."""
        since = time.perf_counter()
        began = self._mark(since)
        try:
            yield
        finally:
            now = time.perf_counter()
            if name == "data":
                self._data_seconds += now - since
                if self._step_began is None:
                    self._step_seconds += now - since
            else:
                self._parts.append((name, began, self._mark(now), now - since))

    def start_step(self) -> None:
        """An update begins."""
        self._step_began = time.perf_counter()

    def end_step(self) -> None:
        """The update is over, as far as the CPU can tell: a GPU may still work, until a step that waits for it."""
        self._step_seconds += time.perf_counter() - self._step_began
        self._steps += 1
        self._step_began = None

    def watch(self, *parameters: nn.Parameter) -> None:
        """Measures communication from the last gradient of any of these; give the raw model's first layers.

        Without torch.compile the embedding's gradient is the last of all, since the head shares it. A compiled
        backward pass hands out all gradients at its end, in an order of its own: there watch the first block too.
        For DDP alone: FSDP hands out a gradient only when it is summed, which leaves nothing to measure.
        """
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient_is_here)

    def _gradient_is_here(self, parameter: Tensor) -> None:
        if self._is_gpu and self._last_gradient is not None:
            self._last_gradient.record()  # an event holds its newest recording
        else:
            self._last_gradient = self._mark(time.perf_counter())

    def synchronized(self) -> None:
        """Right after the backward pass that averages gradients. Does nothing where no gradient was watched."""
        if self._last_gradient is not None:
            self._communications.append((self._last_gradient, self._mark(time.perf_counter())))
            self._last_gradient = None

    def read(self) -> dict[str, float]:
        """Milliseconds since the last reading. Call it after waiting for the GPU, with the update ended.

        step_ms, data_ms, compute_ms and, if it was watched, communication_ms: means per update, absent without one.
        eval_ms, checkpoint_ms: totals, absent where nothing was spent on them.
        """
        apart: dict[str, float] = {}
        for name, began, ended, seconds in self._parts:
            spent = self._seconds(began, ended)
            apart[f"{name}_ms"] = apart.get(f"{name}_ms", 0.0) + 1e3 * spent
            self._step_seconds += seconds - spent  # meanwhile the GPU still finished updates that had been queued
        fields = {}
        if self._steps:
            step_ms, data_ms = (1e3 * total / self._steps for total in (self._step_seconds, self._data_seconds))
            fields = {"step_ms": step_ms, "data_ms": data_ms, "compute_ms": step_ms - data_ms}
            if self._communications:
                waited = sum(self._seconds(began, ended) for began, ended in self._communications)
                fields["communication_ms"] = 1e3 * waited / self._steps
                fields["compute_ms"] -= fields["communication_ms"]
        self._forget()
        return fields | {name: spent for name, spent in apart.items() if spent}

    def _mark(self, now: float) -> Moment:
        if not self._is_gpu:
            return now
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: Moment, ended: Moment) -> float:
        if not self._is_gpu:
            return ended - began
        ended.synchronize()  # an event recorded a moment ago may not have been reached yet
        return began.elapsed_time(ended) / 1e3
