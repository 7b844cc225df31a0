"""Progress of a long reading, on standard error: a bar on a terminal, else a line now and then.

A thread shows it also while nothing comes, with what is waited for.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

LINE_EVERY = 10.0  # seconds between lines if standard error is not a terminal
BAR_AFTER = 0.5  # seconds until the bar appears: a short preparation has none
RATE_OVER = 30.0  # seconds over which the rate is measured: what came before is no sign of what comes
SAMPLE_EVERY = 1.0  # seconds between the samples that it is measured from
DRAW_EVERY = 0.1  # seconds between two drawings of the bar
TICK = 0.5  # seconds after which the thread looks whether something is to be shown
QUIET = 2.0  # seconds without progress after which it says what is waited for
DUMB = ("dumb", "unknown")  # values of TERM that cannot draw a bar

# Held while something is shown, and while a worker is forked: else the worker might get a lock of the stream that
# nobody releases.
_showing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_showing.acquire, after_in_parent=_showing.release, after_in_child=_showing.release)


class Progress:
    """Bytes of the sources that are done, and the tokens made of them.

    total: bytes of all sources; None: not known, as of standard input. clock: seconds, for tests.
    done: of them, bytes that an earlier start has done, which are in no rate. name: what it begins with.
    It is to be closed, which ends the thread.
    """

    def __init__(
        self,
        total: int | None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        done: int = 0,
        name: str = "prepare",
    ):
        self.total, self.stream, self.clock = total, stream or sys.stderr, clock
        self.done, self.tokens, self.name = done, 0, name
        self._began = self._printed = self._drawn = self._moved = clock()
        self._doing = ""
        self._samples = deque([(self._began, done)])
        self._is_bar = self.stream.isatty() and os.environ.get("TERM", "").lower() not in DUMB
        self._bar = None
        self._is_closed = threading.Event()
        with suppress(RuntimeError):  # no thread can be started: then it is shown as it advances
            threading.Thread(target=self._watch, daemon=True).start()

    def doing(self, what: str) -> None:
        """Says what begins now, such as "downloads a.parquet". It is shown if it takes long."""
        self._doing = what

    def advance(self, num_bytes: int, tokens: int) -> None:
        """Adds what a batch has read and made, and shows it if it is time."""
        with _showing:
            self.done += num_bytes
            self.tokens += tokens
            self._moved = self.clock()
            self._tell(self._moved)

    def _watch(self) -> None:
        while not self._is_closed.wait(TICK):
            with _showing, suppress(OSError, ValueError):  # a stream that is gone
                if not self._is_closed.is_set():
                    self._tell(self.clock())

    def _tell(self, now: float) -> None:
        if now - self._samples[-1][0] >= SAMPLE_EVERY:
            self._samples.append((now, self.done))
            while now - self._samples[1][0] >= RATE_OVER:
                self._samples.popleft()
        if self._is_bar:
            self._show(now)
        elif now - self._printed >= LINE_EVERY:
            self._printed = now
            print(f"{self.name}: {self.line(now)}", file=self.stream, flush=True)

    def line(self, now: float) -> str:
        """Text such as "12 of 48 MB, 5.8 MB/s, 0:06 left, 3.5M tokens". The most wanted comes first."""
        since, before = self._samples[0]
        rate = (self.done - before) / max(now - since, 1e-9)  # bytes/s
        unit, digits, name = (1e9, 1, "GB") if max(self.total or 0, self.done) >= 1e10 else (1e6, 0, "MB")
        parts = [f"{self._size(self.done, unit, digits)} {name}", f"{rate / 1e6:,.1f} MB/s"]
        if self.total is not None:
            whole = max(self.total, 1)
            done = self._size(min(self.done, whole), unit, digits)
            parts[0] = f"{done} of {self._size(whole, unit, digits)} {name}"
            if rate >= 1:
                parts.append(f"{_clock(max(whole - self.done, 0) / rate)} left")
        tokens = f"{self.tokens / 1e9:,.2f}B" if self.tokens >= 1e9 else f"{self.tokens / 1e6:,.1f}M"
        parts.append(f"{tokens} tokens")
        if self._doing and now - self._moved >= QUIET:
            parts.append(self._doing)
        return ", ".join(parts)

    def _size(self, num_bytes: int, unit: float, digits: int) -> str:
        return f"{num_bytes / unit:,.{digits}f}"

    def _show(self, now: float) -> None:
        if self._bar is None:
            if now - self._began < BAR_AFTER:
                return
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress
            from rich.table import Column

            console = Console(file=self.stream, highlight=False)
            words = TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            )
            columns = TextColumn(self.name, markup=False), BarColumn(bar_width=None), words
            self._bar = RichProgress(*columns, console=console, transient=True, expand=True, auto_refresh=False)
            self._task = self._bar.add_task("", total=self.total and max(self.total, 1))
            self._bar.start()
        done = self.done if self.total is None else min(self.done, self.total)
        self._bar.update(self._task, completed=done, description=self.line(now))
        if now - self._drawn >= DRAW_EVERY:
            self._drawn = now
            self._bar.refresh()

    def close(self) -> None:
        """Removes the bar and ends the thread."""
        with _showing:
            self._is_closed.set()
            if self._bar is not None:
                self._bar.stop()


def _clock(seconds: float) -> str:
    left = round(seconds)
    hours, minutes = left // 3600, left // 60 % 60
    return f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
