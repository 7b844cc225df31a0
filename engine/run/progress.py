"""Pace of a run: the time that is left, and the time that it took.

    left = steps left * step + evaluations left * evaluation + saves left * save

A step's time is a running mean, in which a stall counts little. Until a step has ended it is
estimated: from the micro-batches done, or from the batches of an evaluation, whose forward pass costs
a third of training per token. --max-minutes may end the run before. Durations are of time.monotonic.
All of it is two readings of the clock per part of a step.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

from engine.config import TrainConfig
from engine.evaluation import num_batches
from engine.health import stopping
from engine.health.timing import Part
from engine.run import rows

WINDOW, LAST = 50, 5  # steps, and evaluations or saves, that tell of those to come
CLIP = 2.0  # times the median, at which a step counts in the running mean at most
STALL = (5.0, 10.0)  # times the usual, and seconds beyond it, from which a step's time is not one of training
FORWARD = 1 / 3  # cost of a forward pass over that of forward and backward
WARM_UP = 1.0  # seconds; an evaluation of one batch that takes less tells nothing of a step
SHOWN_AFTER = 2.0  # seconds after which a part of a step is worth showing
UNITS = ((86_400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s")))  # seconds of two units each
PIECES = {"update": "micro-batch", "evaluation": "evaluating"}


def clock(seconds: float) -> str:
    """A duration that a bar shows: 1:55, 2:03:04, 3 d 4 h, 2.7 years."""
    if seconds < 86_400:
        minutes, rest = divmod(int(max(0.0, seconds)), 60)
        return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    return words(seconds)


def words(seconds: float) -> str:
    """A duration in a sentence: 8.2 s, 1 min 55 s, 2 h 3 min, 3 d 4 h, 2.7 years."""
    if seconds < 59.95:
        if seconds >= 0.995:
            return f"{seconds:.1f} s"
        return f"{seconds:.2g} s" if seconds >= 1e-3 or seconds == 0 else "under 0.001 s"
    if (years := seconds / (365.25 * 86_400)) >= 2:
        return f"{years:,.1f} years" if years < 100 else f"{years:,.0f} years"
    unit, rest, names = next(units for units in UNITS if round(seconds / units[1]) * units[1] >= units[0])
    large, small = divmod(round(seconds / rest), unit // rest)
    return f"{large} {names[0]} {small} {names[1]}" if small and large < 100 else f"{large} {names[0]}"


def launched() -> float:
    """When this process started, in seconds of time.monotonic(); where that is not known, now."""
    return time.monotonic() - max(0.0, stopping.now() - stopping.started_at(os.getpid()))


class Left(NamedTuple):
    """Time to the end of a run."""

    seconds: float
    is_measured: bool  # from whole steps; if not, from less than that

    def __str__(self) -> str:
        return f"{'' if self.is_measured else 'about '}{clock(self.seconds)} left"


@dataclass
class Doing:
    """A part of a step in progress. One piece is a micro-batch, or a batch of an evaluation."""

    part: Part
    began: float
    pieces: int = 0  # 0: not known
    done: int = 0
    first: float = 0.0  # when the first piece was done
    last: float = 0.0  # when the last was

    def piece(self) -> float | None:
        """Seconds per piece, without the first, which may compile, once there are more."""
        if self.done == 0 or self.pieces == 0:
            return None
        done = min(self.done, self.pieces)
        if done > 1:
            return (self.last - self.first) / (done - 1)
        alone = self.last - self.began
        return None if self.part == "evaluation" and alone < WARM_UP else alone


class Pace:
    """Times of this launch, and what they say of the rest. Every rank has one."""

    def __init__(self, config: TrainConfig, start: int):
        now = time.monotonic()
        self.config, self.start, self.step, self.made = config, start, start, 0  # made: steps ended in this launch
        self.began = now  # of the launch
        self._eval_tokens, self._pieces = config.eval_tokens, {}  # of a part: how often it calls tick on this rank
        self.train_seconds = 0.0  # of steps, without evaluations, checkpoints, compiling and stalls
        self.stalled_seconds = 0.0
        self._limit = None if config.max_minutes is None else stopping.launched_at() + 60 * config.max_minutes
        self._step_began, self._elsewhere = now, 0.0  # seconds of this step in those
        self._steps, self._evaluations, self._saves = deque(maxlen=WINDOW), deque(maxlen=LAST), deque(maxlen=LAST)
        self._step, self._save = 0.0, 0.0  # seconds, as the last ones tell
        self._evaluation: float | None = None  # the same, with its sample and plots
        self._batches: float | None = None  # seconds of an evaluation's batches alone
        self._update: float | None = None  # of the first update, until its step has ended
        self._doing: Doing | None = None

    def sized(
        self, began: float, windows: int, accumulation: int, processes: int, tasks: tuple[int, int] = (0, 0)
    ) -> None:
        """Takes what is known once the data is: launched(), windows of an evaluation, batches and tokens of its tasks.

        Evaluations that leave out --hellaswag are taken to be as long as the others.
        """
        self.began, self._eval_tokens = began, windows * self.config.sequence_length + tasks[1]
        batches = num_batches(windows, self.config.sequence_length) + tasks[0]
        self._pieces = {"update": accumulation, "evaluation": -(-batches // processes)}

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Around a part of a step."""
        self._doing = doing = Doing(part, time.monotonic(), self._pieces.get(part, 0))
        try:
            yield
        finally:
            seconds, self._doing = time.monotonic() - doing.began, None
            if part == "evaluation":
                self._evaluations.append(seconds)
                self._evaluation = median_low(self._evaluations)  # of two the shorter: the other has warmed up
                self._batches = None if (piece := doing.piece()) is None else piece * doing.pieces
            elif part == "checkpoint":
                self._saves.append(seconds)
                self._save = median_low(self._saves)
            elif part == "update" and self.made == 0:
                self._update = seconds  # without compiling, which moved doing.began
            self._elsewhere += seconds if part in ("evaluation", "checkpoint") else 0.0

    def tick(self) -> None:
        """Counts a piece of the part in progress."""
        if (doing := self._doing) is not None:
            doing.done += 1
            if doing.done <= doing.pieces:  # then come the tokens of a sample
                doing.last = time.monotonic()
                doing.first = doing.last if doing.done == 1 else doing.first

    def evaluated(self) -> None:
        """Marks the end of an evaluation's batches, for which a GPU was waited: it runs behind their ticks."""
        if (doing := self._doing) is not None and doing.part == "evaluation" and doing.done:
            doing.last = time.monotonic()

    def compiled(self) -> None:
        """Leaves out of the step's time what the part in progress has taken so far."""
        if (doing := self._doing) is not None:
            now = time.monotonic()
            self._elsewhere += now - doing.began
            doing.began, doing.done = now, 0

    def end_step(self, step: int) -> None:
        """Counts a step, of which `step` are done now."""
        now = time.monotonic()
        seconds = now - self._step_began - self._elsewhere
        self._step_began, self._elsewhere = now, 0.0
        self.step, self.made = step, self.made + 1
        usual, beyond = self._step, seconds - self._step
        is_stall = self.made > 2 and seconds > STALL[0] * usual and beyond > STALL[1]  # the process was suspended, say
        self.train_seconds += usual if is_stall else seconds
        self.stalled_seconds += beyond if is_stall else 0.0
        if self.made == 2:  # the first may have compiled
            self._steps.clear()
        self._steps.append(seconds)
        most = CLIP * median_low(self._steps)
        self._step = sum(min(seconds, most) for seconds in self._steps) / len(self._steps)

    def step_seconds(self) -> float | None:
        """Time of a step, the best that is known."""
        if self.made:
            return self._step
        if self._update is not None:
            return self._update
        doing, ratio = self._doing, self._evaluation_ratio()
        if doing is not None and (piece := doing.piece()) is not None:
            return piece * doing.pieces / (ratio if doing.part == "evaluation" else 1.0)
        return self._batches / ratio if self._batches else None

    def evaluation_seconds(self) -> float | None:
        """Time of an evaluation, the best that is known."""
        if self._evaluation is not None:
            return self._evaluation
        step = self.step_seconds()
        return None if step is None else step * self._evaluation_ratio()

    def left(self) -> Left | None:
        """Time to the end or to --max-minutes, or None if nothing is known yet."""
        step, evaluation, doing = self.step_seconds(), self.evaluation_seconds(), self._doing
        if step is None or evaluation is None:
            return None
        now, seconds = time.monotonic(), (self.config.num_steps - self.step) * step
        seconds += self._times_left(self.config.eval_every) * evaluation
        seconds += self._times_left(self.config.save_every) * self._save
        if doing is not None and doing.part == "evaluation":
            seconds += max(0.0, evaluation - (now - doing.began))
        elif self.step < self.config.num_steps:
            seconds -= min(step, now - self._step_began - self._elsewhere)
        return Left(max(0.0, min(seconds, self._until_limit())), self.made > 1)

    def doing(self) -> str | None:
        """The part of a step in progress, if it takes long: micro-batch 3/64."""
        doing = self._doing
        if doing is None or time.monotonic() - doing.began < SHOWN_AFTER:
            return None
        if doing.pieces == 0:
            return "saving" if doing.part == "checkpoint" else None
        if doing.done >= doing.pieces and doing.part == "evaluation":
            return "sampling"
        return f"{PIECES[doing.part]} {min(doing.done, doing.pieces)}/{doing.pieces}"

    def expected(self) -> str:
        """What the rest of the run takes, in a sentence. Call it after a step."""
        left, evaluation = self.left(), self.evaluation_seconds()
        of = f"{words(self._step)} a step, {words(evaluation)} an evaluation"
        end = "--max-minutes" if left.seconds >= self._until_limit() - 1.0 else "the end"
        return f"time: about {words(left.seconds)} to {end} ({of})"

    def report(self, unit: str, past: "Past", tokens_before: int) -> str:
        """How long the run took and how fast it was, in a line. past: of the launches before."""
        took, trained = time.monotonic() - self.began, self.made * self.config.tokens_per_step
        if not self.made:
            return f"this launch took {words(took)}"
        text = f"{words(took)}, {_rate(trained, self.train_seconds, unit)}"
        text += f" without {words(self.stalled_seconds)} of standing still" if self.stalled_seconds else ""
        if self.start == 0:
            return f"took {text}"
        text = f"this launch: {self.made:,} steps in {text}"
        if (before := past.train_seconds(self.start)) is None:
            return text
        rate = _rate(tokens_before + trained, before + self.train_seconds, unit)
        return f"{text}; all launches: about {words(before + past.other_seconds + took)}, {rate}"

    def _until_limit(self) -> float:
        """Seconds until --max-minutes."""
        return math.inf if self._limit is None else self._limit - stopping.now()

    def _evaluation_ratio(self) -> float:
        return FORWARD * self._eval_tokens / self.config.tokens_per_step

    def _times_left(self, every: int | None) -> int:
        """How often something that is done every so many steps, and at the end, is still to be done."""
        last = self.config.num_steps
        if self.step >= last:
            return 0
        return 1 if every is None else last // every - self.step // every + (last % every > 0)


class Past:
    """Times of the launches before this one, as the rows that are kept tell them."""

    def __init__(self) -> None:
        self.other_seconds = 0.0  # of evaluations and checkpoints
        self._steps, self._seconds, self._last = 0, 0.0, -1

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row of metrics.jsonl. Its step_ms is the mean since the row before that has one."""
        for name in ("eval_ms", "checkpoint_ms"):
            self.other_seconds += max(0.0, rows.number(row.get(name)) or 0.0) / 1e3
        step, step_ms = row.get("step"), rows.number(row.get("step_ms"))
        if type(step) is int and step_ms is not None and step > self._last and step_ms > 0:
            self._seconds += (step - self._last) * step_ms / 1e3
            self._steps, self._last = self._steps + step - self._last, step

    def train_seconds(self, steps: int) -> float | None:
        """Seconds of so many steps, at the mean time of those known; None if none is."""
        return self._seconds / self._steps * steps if self._steps and math.isfinite(self._seconds) else None


def _rate(tokens: int, seconds: float, unit: str) -> str:
    return f"{tokens / max(seconds, 1e-9):,.0f} {unit}s/s in training"
