"""A trace of some steps, `--profile START:STOP`: OUT/trace_START_STOP.json.gz, to be opened in ui.perfetto.dev.

It shows what the CPU and the GPU did in the steps START to STOP - 1 of rank 0, under the names of the phases. The
traced steps are slower than others, the first one by seconds. Nothing of PyTorch is imported until tracing starts.
"""

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import TrainConfig
    from engine.distributed import Ranks

_is_recording = False  # whether phases are wanted; without a trace each would cost microseconds for nothing


def parse(text: str) -> tuple[int, int]:
    """(START, STOP) of "START:STOP". Raises ValueError, with a sentence, if it is not two steps in order."""
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(
            "--profile must be START:STOP, the first step to trace and the one after the last, such as 10:13, got "
            f"{text!r}"
        )
    return int(found[1]), int(found[2])


def phase(name: str) -> AbstractContextManager:
    """Names what is done inside, in the trace; does nothing when none is being made."""
    if not _is_recording:
        return nullcontext()
    from torch.profiler import record_function

    return record_function(name)


class Trace:
    """The trace that a config asks for, made on rank 0; without --profile and on other ranks every call does nothing.

    Raises ValueError as parse does.
    """

    def __init__(self, config: "TrainConfig", ranks: "Ranks"):
        self._start, self._stop = (0, 0) if config.profile is None else parse(config.profile)
        self._path = Path(config.out) / f"trace_{self._start}_{self._stop}.json.gz"
        self._say = ranks.say
        self._is_done = config.profile is None or not ranks.is_first
        self._profiler = None
        self._first = self._last = 0  # of the steps in the trace

    def step(self, step: int) -> None:
        """Step `step` begins. Starts the trace or, waiting for the GPU, ends and writes it."""
        if self._is_done:
            return
        if self._profiler is not None and step >= self._stop:
            self._finish()
        elif self._start <= step < self._stop:
            if self._profiler is None:
                self._begin(step)
            self._last = step

    def close(self) -> None:
        """The run ends: writes a trace that is not complete, or says that there is none."""
        if self._profiler is not None:
            self._finish()
        elif not self._is_done:
            self._say(f"no trace: this run did none of the steps {self._start} to {self._stop - 1}")

    def _begin(self, step: int) -> None:
        global _is_recording
        import torch
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
            self._say(f"no trace: {self._path} could not be written: {error}")
            return
        steps = f"step {self._first}" if self._first == self._last else f"steps {self._first} to {self._last}"
        self._say(f"trace of {steps}: {self._path}; open it at https://ui.perfetto.dev")
