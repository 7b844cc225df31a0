"""Early stops of a run: on a signal, or before a time limit such as a queue's.

A request is a flag on one rank. The all-reduce that sums the loss also sums the flags, so all ranks
learn of it together and save at the same step. The process exits within `grace_seconds` of a signal
in any case, and immediately at a second signal.
"""

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from engine.errors import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 2.0  # seconds in which repeated signals count as one: a terminal and torchrun both forward a Ctrl-C
COMPILING = 2  # first steps, left out of the slowest step's time because they compile
MARGIN = 5.0  # seconds reserved for the exit


def under_torchrun() -> bool:
    """Whether torchrun started this process.

    With --max-restarts torchrun starts all processes again after one exits with an error.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_at(now: float | None = None) -> float:
    """Launch time of this run, in time.time() seconds.

    That is the start of torchrun, before any restarts, or else of this process.
    """
    now = time.time() if now is None else now
    process = os.getppid() if under_torchrun() else os.getpid()
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError):  # not Linux
        return now
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot: field 22 of proc(5), 20th after the name
    return now - (uptime - started)


def time_is_up(elapsed: float, limit: float | None, step: float, save: float) -> bool:
    """Whether another step could exceed the limit. All in seconds; step, save: the slowest so far.

    A stop requested now happens two steps later, when all ranks know of it. The save may take twice
    as long as the slowest.
    """
    return limit is not None and elapsed + 3 * step + 2 * save + MARGIN >= limit


class Stop:
    """Context manager that listens for signals in a thread: the main one may be in a collective."""

    def __init__(self, grace_seconds: float, max_minutes: float | None):
        self.grace_seconds = grace_seconds
        self.limit = None if max_minutes is None else 60 * max_minutes
        self.launched = launched_at() if max_minutes is not None else 0.0
        self.signal: signal.Signals | None = None
        self._slowest, self._last, self._steps_begun = 0.0, 0.0, 0

    def __enter__(self) -> "Stop":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write)  # written by the C handler, even if Python is not running
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the thread

    def flags(self, save_seconds: float) -> tuple[bool, bool]:
        """(whether a signal came, whether time is up). Call it once per step.

        save_seconds: duration of the slowest save so far.
        """
        now = time.time()
        self._steps_begun += 1
        if self._steps_begun > COMPILING:
            self._slowest = max(self._slowest, now - self._last)  # includes evaluation and save
        self._last = now
        return self.signal is not None, time_is_up(now - self.launched, self.limit, self._slowest, save_seconds)

    def _listen(self) -> None:
        first = 0.0  # time.monotonic() of the first signal
        while True:
            left = None if self.signal is None else max(0.0, first + self.grace_seconds - time.monotonic())
            ready, _, _ = select.select([self._read], [], [], left)
            if not ready:
                self._leave(f"could not save within the {self.grace_seconds:g} s of --grace-seconds")
            numbers = os.read(self._read, 1)
            if not numbers:
                os.close(self._read)
                return
            number = numbers[0]
            if self.signal is None and number in SIGNALS:
                self.signal, first = signal.Signals(number), time.monotonic()
            elif number in SIGNALS and time.monotonic() - first > ECHO:
                self._leave("a second signal")

    def _leave(self, why: str) -> None:
        """Ends the process immediately."""
        print(f"\ngpt2 train: {why}: leaving at once; the last checkpoint is whole", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED - signal.SIGINT + (self.signal or signal.SIGTERM))  # 128 + the signal's number
