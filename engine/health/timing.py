"""Where the wall time of a run goes: the clock behind metrics.jsonl, and the trace of `--profile START:STOP`.

    step = data + communication + compute        milliseconds per update
    wall = updates * step + eval + checkpoint    of the loop, but for a few microseconds

Communication is what the backward pass could not hide: from this rank's last gradient to the moment when the gradients
of all ranks are averaged. So it includes waiting for slower ranks. On a GPU it is measured with events on the GPU's
own clock, without a synchronisation.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from engine.config import parse_profile
from engine.distributed import Ranks

Part = Literal["data", "update", "evaluation", "checkpoint"]
FIELDS = {"evaluation": "eval_ms", "checkpoint": "checkpoint_ms"}  # of metrics.jsonl
Moment = float | torch.cuda.Event  # seconds of time.perf_counter, or a point in the GPU's work


class Clock:
    """Splits the wall time between two readings. Only read() waits for the GPU."""

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"
        self._last_gradient: Moment | None = None
        self._forget()

    def _forget(self) -> None:
        self._steps, self._step_seconds, self._data_seconds = 0, 0.0, 0.0
        self._communications: list[tuple[Moment, Moment]] = []
        self._parts: list[tuple[str, Moment, Moment, float]] = []  # field, begin, end, seconds on the CPU's clock

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Counts the time inside as one of these. A step is its data and its update; the others stand apart.

        An update ends when the CPU has issued it. The GPU may still work, until a step that waits for it.
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
        """Measures communication from the last gradient of these parameters; give the raw model's first layers.

        Without torch.compile the embedding's gradient is the last of all, since the head shares it. A compiled
        backward pass hands out all gradients at its end, in any order: so watch the first block too.
        For DDP only: FSDP hands out a gradient after it is summed, which leaves nothing to measure.
        """
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient_is_here)

    def _gradient_is_here(self, parameter: Tensor) -> None:
        if self._is_gpu and self._last_gradient is not None:
            self._last_gradient.record()  # an event keeps its newest recording only
        else:
            self._last_gradient = self._mark(time.perf_counter())

    def synchronized(self) -> None:
        """Marks the end of the backward pass that averages gradients. No-op where no gradient is watched."""
        if self._last_gradient is not None:
            self._communications.append((self._last_gradient, self._mark(time.perf_counter())))
            self._last_gradient = None

    def read(self) -> dict[str, float]:
        """Milliseconds since the last reading. Call it between updates, after waiting for the GPU.

        step_ms, data_ms, compute_ms and, if gradients are watched, communication_ms: means per update, absent without
        one. eval_ms, checkpoint_ms: totals, absent where no time was spent.
        """
        apart: dict[str, float] = {}
        for name, began, ended, seconds in self._parts:
            spent = self._seconds(began, ended)
            apart[name] = apart.get(name, 0.0) + 1e3 * spent
            self._step_seconds += seconds - spent  # the GPU was still working on queued updates
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
        ended.synchronize()  # the GPU may not have reached it yet
        return began.elapsed_time(ended) / 1e3


# ---- Trace --------------------------------------------------------------------------------------------------------

_is_recording = False  # whether a trace is being made; record_function costs microseconds otherwise too


def phase(name: str) -> AbstractContextManager:
    """Names what is done inside in the trace. No-op when none is being made."""
    if not _is_recording:
        return nullcontext()
    from torch.profiler import record_function

    return record_function(name)


class Trace:
    """Traces steps START to STOP - 1 of rank 0 into OUT/trace_START_STOP.json.gz, to be opened in ui.perfetto.dev.

    It shows what CPU and GPU did, under the names of the phases. Traced steps are slower than others, the first one by
    seconds. Without `--profile`, and on other ranks, every call is a no-op. Raises ValueError as parse_profile does.
    """

    def __init__(self, profile: str | None, out: str | Path, ranks: Ranks):
        self._start, self._stop = (0, 0) if profile is None else parse_profile(profile)
        self._path = Path(out) / f"trace_{self._start}_{self._stop}.json.gz"
        self._print0 = ranks.print0
        self._is_done = profile is None or not ranks.is_first
        self._profiler = None
        self._first = self._last = 0  # steps in the trace

    def step(self, step: int) -> None:
        """Marks the beginning of a step: starts the trace or, waiting for the GPU, ends and writes it."""
        if self._is_done:
            return
        if self._profiler is not None and step >= self._stop:
            self._finish()
        elif self._start <= step < self._stop:
            if self._profiler is None:
                self._begin(step)
            self._last = step

    def close(self) -> None:
        """Writes a trace that is not complete, or says that there is none."""
        if self._profiler is not None:
            self._finish()
        elif not self._is_done:
            self._print0(f"no trace: this run did none of the steps {self._start} to {self._stop - 1}")

    def _begin(self, step: int) -> None:
        global _is_recording
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
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
        except (OSError, RuntimeError) as error:  # training is worth more than its trace
            writing.unlink(missing_ok=True)
            self._print0(f"no trace: {self._path} could not be written: {error}")
            return
        steps = f"step {self._first}" if self._first == self._last else f"steps {self._first} to {self._last}"
        self._print0(f"trace of {steps}: {self._path}; open it at https://ui.perfetto.dev")
