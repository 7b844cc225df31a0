"""When a run stops before its last step: at a signal, or in time for a queue's limit.

A request is a flag on one rank until the sum that carries the logged loss shows it to all, so every rank saves at the
same step. The process is gone `grace_seconds` after a signal whatever happens, and at once after a second signal.
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
ECHO = 2.0  # seconds in which a signal again is the same one: a terminal and torchrun both hand on a Ctrl-C
COMPILING = 2  # steps at the start that say nothing of how long later ones take
MARGIN = 5.0  # seconds to say goodbye


def under_torchrun() -> bool:
    """Whether torchrun started this process, and would start it again if it ended badly."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_at(now: float | None = None) -> float:
    """When this run was launched, in time.time() seconds: torchrun's start, whatever it restarted since, or our own."""
    now = time.time() if now is None else now
    process = os.getppid() if under_torchrun() else os.getpid()
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        booted_for = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError):  # not Linux
        return now
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot: field 22 of proc(5), 20th after the name
    return now - (booted_for - started)


def time_is_up(elapsed: float, limit: float | None, step: float, save: float) -> bool:
    """Whether another step could miss the limit. All in seconds; step and save are what the slowest took so far.

    What is asked now is done two steps later, when all ranks know, and the save may take twice as long as before.
    """
    return limit is not None and elapsed + 3 * step + 2 * save + MARGIN >= limit


class Stop:
    """Listens for signals while it is entered, in a thread of its own: the main one may be stuck in a collective."""

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
        """(a signal came, the time is up). Call it once per step, with the seconds of the slowest save so far."""
        now = time.time()
        self._steps_begun += 1
        if self._steps_begun > COMPILING:
            self._slowest = max(self._slowest, now - self._last)  # with the evaluation and the save in between
        self._last = now
        return self.signal is not None, time_is_up(now - self.launched, self.limit, self._slowest, save_seconds)

    def _listen(self) -> None:
        first = 0.0
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
        """Ends the process without waiting for anything."""
        print(f"\ngpt2 train: {why}: leaving at once; the last checkpoint is whole", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED - signal.SIGINT + (self.signal or signal.SIGTERM))  # 128 + the signal's number
