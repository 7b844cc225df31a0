"""Timing of a run: the times in metrics.jsonl, and the trace of `--profile START:STOP`.

    step = data + communication + compute        milliseconds per update
    wall = updates * step + eval + checkpoint    of the loop, to within a few microseconds

Communication is the part that the backward pass did not hide: from this rank's last gradient until
the gradients of all ranks are averaged. So it includes waiting for slower ranks. On a GPU it is
measured with events, without a synchronisation.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from engine import device
from engine.config import parse_profile
from engine.distributed import Ranks

Part = Literal["data", "update", "evaluation", "checkpoint"]
FIELDS = {"evaluation": "eval_ms", "checkpoint": "checkpoint_ms"}  # part: field of metrics.jsonl
Moment = float | torch.Event  # on a GPU with events: one of them; else seconds of time.perf_counter


class Clock:
    """Splits the wall time between two calls of read() into parts.

    Only read() waits for the GPU.
    """

    def __init__(self, on: torch.device):
        self._event = device.events(on)
        self._last_gradient: Moment | None = None
        self._reset()

    def _reset(self) -> None:
        self._steps, self._step_seconds, self._data_seconds = 0, 0.0, 0.0
        self._communications: list[tuple[Moment, Moment]] = []
        self._parts: list[tuple[str, Moment, Moment, float]] = []  # field, begin, end, seconds by the CPU's clock

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Context manager that counts the time inside for a part.

        A step consists of data and update. Evaluation and checkpoint are counted separately.
        An update ends when the CPU has issued it. The GPU may still be working on it.
        """
        since = time.perf_counter()
        began = self._mark(since) if name in FIELDS else since
        try:
            yield
        finally:
            now = time.perf_counter()
            if name in FIELDS:
                self._parts.append((FIELDS[name], began, self._mark(now), now - since))
            else:
                self._step_seconds += now - since
                self._data_seconds += now - since if name == "data" else 0.0
                self._steps += name == "update"

    def watch(self, *parameters: nn.Parameter) -> None:
        """Measures communication from the last gradient of these parameters.

        Pass the parameters of the raw model's first layers.
        Without torch.compile the last gradient is the embedding's, because the head shares its
        weight. A compiled graph is cut at DDP's buckets, and each part of its backward pass returns
        its gradients at its end, in any order, so watch the first block too. For DDP only: FSDP
        produces a gradient after it is summed, so there is nothing to measure.
        """
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._event is not None and self._last_gradient is not None:
            self._last_gradient.record()  # an event keeps only its newest recording
        else:
            self._last_gradient = self._mark(time.perf_counter())

    def synchronized(self) -> None:
        """Marks the end of the backward pass that averages gradients.

        No-op if no gradient is watched.
        """
        if self._last_gradient is not None:
            self._communications.append((self._last_gradient, self._mark(time.perf_counter())))
            self._last_gradient = None

    def read(self) -> dict[str, float]:
        """Times in milliseconds since the last call.

        Call it between updates, after waiting for the GPU.
        step_ms, data_ms, compute_ms and, if gradients are watched, communication_ms: means per
        update; absent if there was no update. eval_ms, checkpoint_ms: totals; absent if zero.
        """
        totals: dict[str, float] = {}
        for name, began, ended, seconds in self._parts:
            spent = self._seconds(began, ended)
            totals[name] = totals.get(name, 0.0) + 1e3 * spent
            self._step_seconds += seconds - spent  # in which the GPU was still working on queued updates
        fields = {}
        if self._steps:
            step_ms, data_ms = (1e3 * total / self._steps for total in (self._step_seconds, self._data_seconds))
            fields = {"step_ms": step_ms, "data_ms": data_ms, "compute_ms": step_ms - data_ms}
            if self._communications:
                waited = sum(self._seconds(began, ended) for began, ended in self._communications)
                fields["communication_ms"] = 1e3 * waited / self._steps
                fields["compute_ms"] -= fields["communication_ms"]
        self._reset()
        return fields | {name: total for name, total in totals.items() if total}

    def _mark(self, now: float) -> Moment:
        if self._event is None:
            return now
        event = self._event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: Moment, ended: Moment) -> float:
        if self._event is None:
            return ended - began
        ended.synchronize()  # the GPU may not have reached the event yet
        return began.elapsed_time(ended) / 1e3


# ---- Trace --------------------------------------------------------------------------------------------------------

_is_recording = False  # whether a trace is being made; without one, record_function would still cost microseconds


def phase(name: str) -> AbstractContextManager:
    """Names the code inside in the trace. No-op if no trace is being made."""
    if not _is_recording:
        return nullcontext()
    from torch.profiler import record_function

    return record_function(name)


class Trace:
    """Traces steps START to STOP - 1 of rank 0 into OUT/trace_START_STOP.json.gz, for Perfetto.

    It shows the work of CPU and GPU under the names of the phases. Traced steps are slower, the
    first one by seconds. Without `--profile`, and on other ranks, every call is a no-op. Raises
    ValueError as parse_profile does.
    """

    def __init__(self, profile: str | None, out: str | Path, ranks: Ranks):
        self._start, self._stop = (0, 0) if profile is None else parse_profile(profile)
        self._path = Path(out) / f"trace_{self._start}_{self._stop}.json.gz"
        self._print0, self._kind = ranks.print0, ranks.device.type.upper()
        self._is_done = profile is None or not ranks.is_first
        self._profiler = None
        self._first = self._last = 0  # steps in the trace

    def step(self, step: int) -> None:
        """Marks the beginning of a step.

        Starts the trace, or ends and writes it, which waits for the GPU.
        """
        if self._is_done:
            return
        if self._profiler is not None and step >= self._stop:
            self._finish()
        elif self._start <= step < self._stop:
            if self._profiler is None:
                self._begin(step)
            self._last = step

    def close(self) -> None:
        """Writes an incomplete trace, or prints that the run reached none of the steps."""
        if self._profiler is not None:
            self._finish()
        elif not self._is_done:
            self._print0(f"no trace: this run did none of the steps {self._start} to {self._stop - 1}")

    def _begin(self, step: int) -> None:
        global _is_recording
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._kind != "CPU" and hasattr(ProfilerActivity, self._kind):  # MPS has none
            activities.append(getattr(ProfilerActivity, self._kind))
        self._profiler = profile(activities=activities, record_shapes=False)
        self._profiler.start()
        self._first, _is_recording = step, True

    def _finish(self) -> None:
        global _is_recording
        profiler, self._profiler, self._is_done, _is_recording = self._profiler, None, True, False
        profiler.stop()
        writing = self._path.with_name(f".writing_{self._path.name}")
        try:
            profiler.export_chrome_trace(str(writing))
            writing.replace(self._path)
        except (OSError, RuntimeError) as error:  # a failed trace must not end the run
            writing.unlink(missing_ok=True)
            self._print0(f"no trace: {self._path} could not be written: {error}")
            return
        steps = f"step {self._first}" if self._first == self._last else f"steps {self._first} to {self._last}"
        self._print0(f"trace of {steps}: {self._path}; open it at https://ui.perfetto.dev")
