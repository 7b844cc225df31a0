"""Progress of `gpt2 prepare`, on standard error: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

LINE_EVERY = 10.0  # seconds between lines if standard error is not a terminal
BAR_AFTER = 0.5  # seconds until the bar appears: a short preparation has none


class Progress:
    """Bytes of the sources that are done, and the tokens made of them.

    total: bytes of all sources. clock: seconds, for tests.
    """

    def __init__(
        self, total: int, note: str = "", stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.total, self.note, self.stream, self.clock = max(total, 1), note, stream or sys.stderr, clock
        self.done = self.tokens = 0
        self._began = self._printed = clock()
        self._bar = None

    def advance(self, num_bytes: int, tokens: int) -> None:
        """Adds what a batch has read and made, and shows it if it is time."""
        self.done += num_bytes
        self.tokens += tokens
        now = self.clock()
        if self.stream.isatty():
            self._show(now)
        elif now - self._printed >= LINE_EVERY:
            self._printed = now
            print(f"prepare: {self.line(now)}", file=self.stream, flush=True)

    def line(self, now: float) -> str:
        """Text such as "12 of 48 MB, 5.8 MB/s, 0:06 left, 3.5M tokens". The most wanted comes first."""
        rate = self.done / max(now - self._began, 1e-9)  # bytes/s
        left = round(max(self.total - self.done, 0) / max(rate, 1.0))
        hours, minutes = left // 3600, left // 60 % 60
        time_left = f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
        unit, digits, name = (1e9, 1, "GB") if self.total >= 1e10 else (1e6, 0, "MB")
        done, total = (f"{size / unit:,.{digits}f}" for size in (min(self.done, self.total), self.total))
        tokens = f"{self.tokens / 1e9:,.2f}B" if self.tokens >= 1e9 else f"{self.tokens / 1e6:,.1f}M"
        return f"{done} of {total} {name}, {rate / 1e6:,.1f} MB/s, {time_left} left, {tokens} tokens{self.note}"

    def _show(self, now: float) -> None:
        if self._bar is None:
            if now - self._began < BAR_AFTER:
                return
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            console = Console(file=self.stream, highlight=False)
            columns = TextColumn("prepare"), BarColumn(bar_width=None), TextColumn("{task.description}", markup=False)
            self._bar = RichProgress(*columns, console=console, transient=True, expand=True)
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=min(self.done, self.total), description=self.line(now))

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
