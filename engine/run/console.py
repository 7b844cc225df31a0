"""Console output of a run: plain lines, and on a terminal a bar below them.

A terminal shows whole figures, the most wanted first, as many as fit its width at the moment. A
pipe gets all of them.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.text import Text

from engine import output
from engine.run.progress import Pace

PLAIN_EVERY = 5.0  # seconds between lines
SLOW = 20.0  # seconds without a line after which one tells of a step in progress, before the first has ended
RARELY = 300.0  # the same later
SOON = 60.0  # seconds; of a run that takes less no line says how long it takes
DUMB = ("dumb", "unknown")  # values of TERM, as rich has them

TASKS = ("hellaswag_acc_norm", "lambada_acc")
SHOWN = ("loss", "val_loss", *TASKS, "lr", "tokens_per_s", "mfu", "peak_gib", "skipped")  # in this order
WANTED = ("step", "loss", "left", "doing", "skipped", "tokens_per_s", "val_loss", *TASKS, "lr", "peak_gib", "mfu")
SHORTEST_BAR, LONGEST_BAR = 5, 20  # columns


def format_field(name: str, value: float, unit: str) -> str:
    """A figure with its name or unit."""
    forms: dict[str, Callable[[float], str]] = {
        "loss": lambda v: f"loss {v:.3f}",
        "val_loss": lambda v: f"val loss {v:.4f}",
        "hellaswag_acc_norm": lambda v: f"HellaSwag acc_norm {100 * v:.1f}%",
        "lambada_acc": lambda v: f"LAMBADA {100 * v:.1f}%",
        "lr": lambda v: f"lr {v:.2e}",
        "tokens_per_s": lambda v: f"{v:,.0f} {unit}s/s",
        "mfu": lambda v: f"MFU {100 * v:.1f}%",
        "peak_gib": lambda v: f"{v:.2f} GiB",
        "skipped": lambda v: f"{v} skipped",
    }
    return forms[name](value)


def fitted(figures: dict[str, str], width: int | None) -> list[str]:
    """The most wanted of some figures that fit on a line, in the order given. width None: all."""
    if width is None:
        return list(figures.values())
    kept, room = set(), width + 2  # two spaces before each but the first
    for name in sorted(figures, key=WANTED.index):
        room -= len(figures[name]) + 2
        if room < 0:
            break
        kept.add(name)
    return [text for name, text in figures.items() if name in kept]


def open_console(num_steps: int, unit: str, pace: Pace) -> "Lines":
    """A bar on a terminal that can move its cursor, else lines."""
    is_bar = sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in DUMB
    return (Bar if is_bar else Lines)(num_steps, unit, pace)


class Lines:
    """Console output for pipes and log files: a plain line every few seconds."""

    def __init__(self, num_steps: int, unit: str, pace: Pace):
        self.num_steps, self.unit, self.pace = num_steps, unit, pace
        self._began = self._printed = time.monotonic()
        self._has_said_time = False

    def update(self, step: int, fields: dict[str, float]) -> None:
        """Prints the fields: a validation loss always, others at most every PLAIN_EVERY seconds."""
        now = time.monotonic()
        if fields.get("val_loss") is None and now - self._printed < PLAIN_EVERY:
            return
        figures = self._figures(fields)
        if step < self.num_steps and (left := self.pace.left()) is not None:
            figures["left"] = str(left)
        self._print_figures(step, figures)

    def advance(self, step: int) -> None:
        """Says once how long the run takes, when some steps have shown it."""
        if self._has_said_time or self.pace.made < 3:
            return
        if time.monotonic() - self._began >= PLAIN_EVERY and step < self.num_steps:
            self._has_said_time = True
            if self.pace.left().seconds >= SOON:
                self.print_line(self.pace.expected())

    def tick(self) -> None:
        """Prints a line now and then while a step or an evaluation takes long, with the time left."""
        is_first = self.pace.made == 0
        if time.monotonic() - self._printed < (SLOW if is_first and not self._has_said_time else RARELY):
            return
        if (doing := self.pace.doing()) is not None:
            self._has_said_time |= is_first and self.pace.step_seconds() is not None
            left = self.pace.left()
            self._print_figures(self.pace.step, {"doing": doing} | ({"left": str(left)} if left is not None else {}))

    def print_line(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True)

    def close(self) -> None:
        """No-op: there is no bar to stop."""

    def width(self) -> int | None:
        """Columns of a line of figures; None: any number."""
        return output.columns(sys.stdout) if sys.stdout.isatty() else None

    def _figures(self, fields: dict[str, float]) -> dict[str, str]:
        return {name: format_field(name, fields[name], self.unit) for name in SHOWN if fields.get(name) is not None}

    def _count(self, step: int) -> str:
        return f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}"

    def _print_figures(self, step: int, figures: dict[str, str]) -> None:
        self._printed = time.monotonic()
        self.print_line("  ".join(fitted({"step": self._count(step)} | figures, self.width())))


class Bar(Lines):
    """Console output for a terminal: the same lines, and below them one that is always up to date."""

    def __init__(self, num_steps: int, unit: str, pace: Pace):
        super().__init__(num_steps, unit, pace)
        self._fields: dict[str, float] = {}
        self._step, self._drawn = pace.start, 0  # _drawn: columns of the line on the terminal
        self._console = rich.console.Console(highlight=False)
        # A stderr that goes elsewhere must stay there.
        self._live = _Live(self, console=self._console, redirect_stderr=sys.stderr.isatty())
        self._live.start()
        self._console.show_cursor(True)  # a process that is killed leaves it as it is

    def update(self, step: int, fields: dict[str, float]) -> None:
        """Keeps the newest value of each field, and prints a line as in a pipe."""
        self._fields |= {name: value for name, value in fields.items() if name in SHOWN and value is not None}
        super().update(step, fields)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._step = step
        super().advance(step)

    def tick(self) -> None:
        """No-op: the bar shows it."""

    def print_line(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Stops the bar, and leaves its last state on the terminal."""
        self._live.stop()

    def width(self) -> int:
        """Columns of the terminal now."""
        return min(self._console.width, output.columns(self._console.file) or self._console.width)

    def reflowed(self) -> int:
        """Rows above the last that the line takes since the terminal has become narrower."""
        return max(0, -(-self._drawn // max(1, self.width())) - 1)

    def __rich_console__(self, console: rich.console.Console, options: Any) -> Iterator[Text | ProgressBar]:
        figures, width = {"step": self._count(self._step)}, min(options.max_width, self.width())
        if self._live.is_started:
            now = {"left": self.pace.left(), "doing": self.pace.doing()}
            figures |= {name: str(value) for name, value in now.items() if value is not None}
        first, *rest = fitted(figures | self._figures(self._fields), width) or [""]
        self._drawn = len("  ".join([first, *rest]))
        yield Text(first, end="", no_wrap=True)
        if (room := min(LONGEST_BAR, width - self._drawn - 1)) >= SHORTEST_BAR:
            self._drawn += room + 1
            yield Text(" ", end="")
            yield ProgressBar(max(1, self.num_steps), self._step, width=room)
        yield Text("".join(f"  {text}" for text in rest), end="", no_wrap=True)


class _Live(Live):
    """Redraws the bar. Terminals break a line that no longer fits into rows: all of them are erased."""

    def process_renderables(self, renderables: list) -> list:
        """Called by rich around everything it prints."""
        bar, rows = self.get_renderable(), 0
        if self.console.is_interactive:
            rows = bar.reflowed()
        up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * rows
        return [*([Control(*up)] if rows else []), *super().process_renderables(renderables)]
