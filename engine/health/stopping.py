"""Early stops of a run: on a signal, or before a time limit such as a queue's.

A request is a flag on one rank. It is answered at once, between two micro-batches, or after the
update where ranks or accumulation leave no such place. The all-reduce that sums the loss also sums
the flags, so all ranks learn of it together and save at the same step. The process exits within
`grace_seconds` of a signal in any case, and immediately at a second one. A Ctrl-C of a terminal has
no limit: nobody kills the process soon after it, and a second Ctrl-C leaves.

A program that calls training gives an event in place of signals: then no handler is touched, and
setting the event is the request, from any thread or from a handler of the program's own.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine.errors import INTERRUPTED, STOPPED, warn

# Requests to stop. Queues and hosts also warn with HUP (a terminal closed), USR1 and USR2 (time runs
# out) and XCPU (CPU time runs out, sent each second).
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
ORDERS = SIGNALS[:3]  # the second of these means: at once
ECHO = 2.0  # seconds in which repeated signals count as one: a terminal and torchrun both forward a Ctrl-C
TERMINAL_ECHO = 0.5  # the same where no torchrun stands between: make and others forward it too
COMPILING = 2  # first steps, left out of the slowest step's time because they compile
MARGIN = 5.0  # seconds reserved for the exit


def now() -> float:
    """Seconds since the machine started, suspended ones included, which no change of its clock moves."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def under_torchrun() -> bool:
    """Whether torchrun started this process.

    With --max-restarts torchrun starts all processes again after one exits with an error.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_at() -> float:
    """When this run was launched, in seconds of now().

    That is the start of torchrun, before any restarts, or else of this process.
    """
    return started_at(os.getppid() if under_torchrun() else os.getpid())


def started_at(process: int) -> float:
    """When a process started, in seconds of now(); where that is not known, now()."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not Linux
        return now()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot: field 22 of proc(5), 20th after the name


def time_is_up(elapsed: float, limit: float | None, step: float, save: float) -> bool:
    """Whether another step could exceed the limit. All in seconds; step, save: the slowest so far.

    A stop requested now happens two steps later, when all ranks know of it. The save may take twice
    as long as the slowest.
    """
    return limit is not None and elapsed + 3 * step + 2 * save + MARGIN >= limit


class Stop:
    """Context manager that listens for signals in a thread: the main one may be in a collective.

    asked: the caller's request to stop, in place of signals. Only Python's main thread can have
    handlers, so elsewhere signals are not heeded either.

    Meanwhile may be set: last_saved, what of the run is saved, in words; on_leave, what to call with
    the reason before the process leaves at once; is_over, whether all is saved that will be; is_quiet,
    since an error ends the run anyway.
    """

    def __init__(self, grace_seconds: float, max_minutes: float | None, asked: threading.Event | None = None):
        self.grace_seconds, self.asked = grace_seconds, asked
        self.limit = None if max_minutes is None else 60 * max_minutes
        self.launched = 0.0 if max_minutes is None else launched_at() if asked is None else now()
        self.signal: signal.Signals | None = None
        self._forget()
        self._slowest, self._last, self._steps_begun = 0.0, 0.0, 0

    def __enter__(self) -> "Stop":
        self._listens = self.asked is None and threading.current_thread() is threading.main_thread()
        if not self._listens:
            if self.asked is None:
                warn("gpt2 train: no signal stops a run outside the main thread; engine.run_training takes an event")
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # nohup starts a process that ignores HUP, and so does the run then. torchrun takes HUP itself and hands it on.
        heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, _ignored) for number in heeded}
        self._wakeup = signal.set_wakeup_fd(self._write)  # written by the C handler, even if Python is not running
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            self._end_listening()
        self._forget()

    def _end_listening(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        if self.signal is not None:  # a second one must not change the exit code of a run that has saved
            atexit.register(_ignore, list(self._handlers))
        else:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        os.close(self._write)  # ends the thread
        self._thread.join(5.0)  # it may be printing to a stderr that nobody reads

    def _forget(self) -> None:
        """Drops the hooks: they hold the model, which no thread may free while Python ends."""
        self.last_saved: Callable[[], str] = lambda: "nothing was saved"
        self.on_leave: Callable[[str], None] | None = None
        self.is_over: Callable[[], bool] = lambda: False
        self.is_quiet = False

    def is_requested(self) -> bool:
        """Whether this process has received a signal, or its caller asks it to stop."""
        return self.signal is not None or (self.asked is not None and self.asked.is_set())

    @property
    def source(self) -> str:
        """Whose request stops the run, in words."""
        return "a signal" if self.asked is None else "its caller"

    def flags(self, save_seconds: float) -> tuple[bool, bool]:
        """(whether a request came, whether time is up). Call it once per step.

        save_seconds: duration of the slowest save so far.
        """
        moment = now()
        self._steps_begun += 1
        if self._steps_begun > COMPILING:
            self._slowest = max(self._slowest, moment - self._last)  # includes evaluation and save
        self._last = moment
        return self.is_requested(), time_is_up(moment - self.launched, self.limit, self._slowest, save_seconds)

    def _listen(self) -> None:
        deadline: float | None = None  # of time.monotonic()
        ordered: float | None = None  # when the first of ORDERS came
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._read], [], [], left)
            if not ready:
                self._leave(
                    "saved"
                    if self.is_over()
                    else f"could not save within the {self.grace_seconds:g} s of --grace-seconds"
                )
            numbers = os.read(self._read, 1)
            if not numbers:
                os.close(self._read)
                return
            number, moment = numbers[0], time.monotonic()
            if number not in self._handlers:
                continue
            is_typed = number == signal.SIGINT and _in_foreground()
            if ordered is not None and number in ORDERS and moment - ordered > (TERMINAL_ECHO if is_typed else ECHO):
                self._leave("a second signal")
            if number in ORDERS and ordered is None:
                ordered = moment
            if deadline is None and not is_typed:
                deadline = moment + self.grace_seconds
            if self.signal is None:
                self.signal = signal.Signals(number)
                with contextlib.suppress(OSError, ValueError):  # a stderr that is closed must not end this thread
                    self._answer(is_typed)

    def _answer(self, is_typed: bool) -> None:
        """Prints, on rank 0, what will happen now."""
        if os.environ.get("RANK", "0") != "0" or self.is_quiet or self.is_over():
            return
        line = f"{self.signal.name}: stopping after this micro-batch, then saving; at the latest "
        line += f"{self.grace_seconds:g} s from now (--grace-seconds) it leaves"
        line = "stopping after this micro-batch; Ctrl-C again leaves" if is_typed else line
        print(f"\ngpt2 train: {line}", file=sys.stderr, flush=True)

    def _leave(self, why: str) -> None:
        """Ends the process immediately."""
        with contextlib.suppress(Exception):  # whatever fails here, the process must end
            if self.on_leave is not None:
                self.on_leave(why)
            saved = f"; {self.last_saved()}" if os.environ.get("RANK", "0") == "0" else ""  # others do not know
            print(f"\ngpt2 train: {why}: leaving at once{saved}", file=sys.stderr, flush=True)
        if self.is_over():
            os._exit(STOPPED)
        os._exit(INTERRUPTED - signal.SIGINT + (self.signal or signal.SIGTERM))  # 128 + the signal's number


def _ignored(*_: object) -> None:
    """Handler that leaves a signal to the thread that listens."""


def _ignore(numbers: list[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _in_foreground() -> bool:
    """Whether a terminal's Ctrl-C would reach this process. torchrun's workers get theirs from torchrun."""
    if under_torchrun():
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
