"""Heartbeat file and hang watchdog.

OUT/heartbeat is JSON: step, num_steps, time (of the last progress, seconds since 1970), state
(running, stopped, done or failed) and reason. A thread of each rank reports its step and phase to
the others through torchrun's store, whatever the main thread does: a compile or a save of minutes
does not silence it. A rank of several exits with code 4

    after `timeout_minutes` without progress of its own: it prints which ranks are behind and writes
        its stacks to OUT;
    after SILENT seconds without a report of another rank: its process or host is gone. Under NCCL
        no exception would say so, since the main thread waits for the GPU.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import LOST
from engine.health import failures

HEARTBEAT = "heartbeat"
EVERY = 1.0  # seconds between reports of a rank
LISTEN = 5.0  # seconds between readings of all ranks' reports
SILENT = 60.0  # seconds without a new report after which a rank counts as lost
SPARE = 5.0  # seconds after the timeout of a collective, which may say more
STALE = 5.0  # seconds without a report after which a rank counts as late


def write_heartbeat(out: str | Path, **fields: object) -> None:
    """Replaces OUT/heartbeat atomically, so that no reader sees half of it."""
    path = Path(out) / HEARTBEAT
    temporary = path.with_name(f".{HEARTBEAT}.writing")
    temporary.write_text(json.dumps(fields) + "\n")
    temporary.replace(path)


Place = tuple[int, str, float]  # where a rank is: step, phase, time of its last report


def account(rank: int, world_size: int, places: dict[int, Place], now: float) -> str:
    """Describes the ranks that are behind, as `rank` sees it.

    places: of every rank that has reported.
    """
    last_step = max((step for step, _, _ in places.values()), default=0)
    here = places.get(rank)
    late = []
    for other in range(world_size):
        if other not in places:
            late.append(f"rank {other} was not heard of")
            continue
        step, phase, reported = places[other]
        is_elsewhere = here is not None and (step, phase) != here[:2]
        if other != rank and (step < last_step or now - reported > STALE or is_elsewhere):
            late.append(f"rank {other} was at step {step} ({phase}) and last heard of {now - reported:.0f} s ago")
    return "; ".join(late) or "no other rank is behind"


class Silence:
    """Seconds for which each other rank has sent no new report, by this process's own clock.

    Hosts' clocks may differ, so only a change of a report counts, not the time in it. A rank that
    has not reported yet may still be starting and is not counted. Nor is time in which this process
    itself was suspended, as with SIGSTOP: between two calls at most `longest_step` counts.
    """

    def __init__(self, longest_step: float):
        self._longest_step, self._now = longest_step, time.monotonic()
        self._last: dict[int, Place] = {}
        self.seconds: dict[int, float] = {}

    def update(self, places: dict[int, Place], now: float) -> None:
        """Takes the newest report of each rank, at `now` of time.monotonic()."""
        passed, self._now = min(now - self._now, self._longest_step), now
        for rank, place in places.items():
            is_new = self._last.get(rank) != place
            self._last[rank] = place
            self.seconds[rank] = 0.0 if is_new else self.seconds[rank] + passed


@contextlib.contextmanager
def limited(ranks: Ranks, timeout_minutes: float) -> Iterator[None]:
    """Ends this process with exit code 4 if what is inside takes longer, as when another rank is lost.

    For what comes before the heartbeat. One process has no limit.
    """

    def leave() -> None:
        print(
            f"train: the ranks must be ready within the {timeout_minutes:g} min of --timeout-minutes, rank "
            f"{ranks.rank} still waits: a process or host is gone, or the network; the same command starts again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)

    timer = threading.Timer(60 * timeout_minutes + SPARE, leave)
    timer.daemon = True
    if ranks.world_size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Heartbeat:
    """Context manager around the loop.

    The loop calls `at` when it begins a phase. Runs this rank's threads.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, start: int, micro_batch_size: int):
        self.config, self.ranks, self.micro_batch_size = config, ranks, micro_batch_size
        self.timeout = 60 * config.timeout_minutes
        self.silent = SILENT
        self._heard: dict[int, Place] = {}  # newest report of each other rank; replaced, never changed
        self.step, self.phase, self.since = start, "starting", time.time()
        self.ends = ("failed", "")  # state and reason of the final heartbeat; the loop sets it before it ends
        self._ended = threading.Event()
        self._store = ranks.connect_store()  # a second connection: the main thread may be blocked on the first
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._reporter = threading.Thread(target=self._report, name="reports", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        if self._store is not None:
            self._reporter.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Writes the final heartbeat.

        Turns a lost peer, out of memory or a full disk into an error message.
        """
        self._ended.set()
        self._thread.join()
        if error is None:
            self._beat(*self.ends)
            return
        explained = failures.explain(error, self.config, self.micro_batch_size, self.ranks, self.account)
        self._beat("failed", str(explained or error) or repr(error))
        if explained is not None:
            raise explained from error

    def at(self, step: int, phase: str) -> None:
        """Marks progress: this rank begins a phase of a step."""
        self.step, self.phase, self.since = step, phase, time.time()

    def account(self) -> str:
        """Describes this rank's step and phase, and the ranks that are behind."""
        here = self.step, self.phase, time.time()
        return f"rank {self.ranks.rank} at step {self.step} ({self.phase}): " + account(
            self.ranks.rank, self.ranks.world_size, self._places() | {self.ranks.rank: here}, time.time()
        )

    def _run(self) -> None:
        silence = Silence(longest_step=2 * EVERY)
        while True:
            self._beat("running", "")
            silence.update(self._heard, time.monotonic())
            if lost := [rank for rank, seconds in silence.seconds.items() if seconds > self.silent]:
                self._lose(lost)
            waited = time.time() - self.since
            # Later than the timeout of collectives. A single process has no limit: a step may take
            # hours.
            if self.ranks.world_size > 1 and waited > self.timeout + 2 * EVERY:
                self._leave(waited)
            if self._ended.wait(min(EVERY, self.timeout / 4)):
                return

    def _beat(self, state: str, reason: str) -> None:
        if self.ranks.is_first:
            with contextlib.suppress(OSError):  # saving a checkpoint reports a full disk
                write_heartbeat(
                    self.config.out,
                    step=self.step,
                    num_steps=self.config.num_steps,
                    time=self.since,
                    state=state,
                    reason=reason,
                )

    def _report(self) -> None:
        """Runs in its own thread: a request to an unreachable host's store may hang for minutes."""
        others = [rank for rank in range(self.ranks.world_size) if rank != self.ranks.rank]
        next_reading = 0.0
        while not self._ended.is_set():
            try:
                self._store.set(f"place/{self.ranks.rank}", json.dumps([self.step, self.phase, time.time()]))
                if time.monotonic() >= next_reading:
                    next_reading = time.monotonic() + min(LISTEN, self.silent / 4)
                    self._heard = self._read(others)
            except (RuntimeError, ValueError):  # if the store's host is gone, all ranks fall silent
                with contextlib.suppress(RuntimeError, ValueError):  # it may be this connection alone
                    self._store = self.ranks.connect_store()
            self._ended.wait(min(EVERY, self.timeout / 4))

    def _read(self, ranks: Iterable[int]) -> dict[int, Place]:
        """The newest report of each of these ranks that has sent one. Two requests if all have."""
        keys = {rank: f"place/{rank}" for rank in ranks}
        if not self._store.check([*keys.values()]):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        reports = self._store.multi_get([*keys.values()]) if keys else []
        return {rank: tuple(json.loads(report)) for rank, report in zip(keys, reports, strict=True)}

    def _places(self) -> dict[int, Place]:
        """The ranks' reports that the store returns within STALE seconds."""
        places: dict[int, Place] = {}

        def ask() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                if self._store is not None:
                    places.update(self._read(range(self.ranks.world_size)))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(STALE)
        return dict(places)

    def _lose(self, lost: list[int]) -> None:
        """Ends this process because other ranks are gone, for which its main thread may wait for ever."""
        who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, sorted(lost)))}"
        print(
            f"train: every rank must report each {EVERY:g} s, got no report of {who} for {self.silent:g} s at rank "
            f"{self.ranks.rank} at step {self.step} ({self.phase}): a process or host is gone, or the network; the "
            "same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._beat("failed", f"no report of {who}")
        os._exit(LOST)

    def _leave(self, waited: float) -> None:
        """Ends this process because its main thread hangs."""
        stacks = Path(self.config.out) / f"hang_rank{self.ranks.rank}.txt"
        where = f"its stacks are in {stacks}"
        try:
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            where = f"its stacks could not be written to {stacks}: {error.strerror}"
        print(
            f"train: a step must make progress within the {self.config.timeout_minutes:g} min of --timeout-minutes, "
            f"got none for {waited:.0f} s: {self.account()}; {where}; the same command goes on from the last "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._beat("failed", "hang")
        os._exit(LOST)
