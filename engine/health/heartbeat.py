"""Heartbeat file, hang watchdog, and the end that all ranks share when one fails.

OUT/heartbeat is JSON: step, num_steps, time (of the last progress, seconds since 1970), state
(running, stopped, done or failed) and reason. A thread of each rank reports its step, phase and
progress to the others through torchrun's store, whatever the main thread does: a compile or a save
of minutes does not silence it. A rank of several exits

    with code 4 after `timeout_minutes` in which no rank made progress: it prints which ranks are
        behind and writes its stacks to OUT. A rank that waits for one that works is no hang.
    with code 4 after SILENT seconds without a report of another rank: its process or host is gone.
        Under NCCL no exception would say so, since the main thread waits for the GPU.
    with the code of another rank that failed and has published its error: see verdict.py.

Only time in which the watching thread runs counts, so a suspended machine or process is no hang and
no lost rank, and no clock that is set matters.
"""

import contextlib
import faulthandler
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import LOST, BadInput, PeerFailed, exit_code, warn
from engine.health import failures, verdict
from engine.health.verdict import Verdict
from model.files import read_json

HEARTBEAT = "heartbeat"
WIDTH = 2048  # bytes of the file, always: it can be overwritten in place, for which a full disk has room
EVERY = 1.0  # seconds between reports of a rank
LISTEN = 5.0  # seconds between readings of all ranks' reports
SILENT = 60.0  # seconds without a new report after which a rank counts as lost; at most the timeout of progress
LEAST = 5.0  # seconds that a rank may be silent, however short the timeout is
STALE = 5.0  # seconds without a report after which a rank counts as late
SAVING = 5.0  # seconds for a save in progress when another rank has failed

# Phases in which Python sees no progress, however long they take: the compiler works in one call, a
# file of many GB is written or digested in one. They hang after PATIENCE, if the timeout is shorter.
LONG_PHASES = ("compiling", "checkpoint")
PATIENCE = 3600.0  # seconds


def write_heartbeat(out: str | Path, **fields: object) -> None:
    """Replaces OUT/heartbeat as a whole, by WIDTH bytes: JSON, spaces, newline.

    Where there is no room for a second file it overwrites the first, of which a reader may then see
    half. Cuts a reason that does not fit. Raises OSError.
    """
    path, reason = Path(out) / HEARTBEAT, str(fields.get("reason", ""))[:WIDTH]
    while len(line := json.dumps(fields | {"reason": reason})) >= WIDTH:
        reason = reason[:-50]
    data = line.ljust(WIDTH - 1).encode() + b"\n"
    temporary = path.with_name(f".{HEARTBEAT}.writing")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        with contextlib.suppress(FileNotFoundError), path.open("r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_size == WIDTH:
                file.write(data)
                return
        raise


Report = tuple[str | int, ...]  # step, phase, marks of progress so far, number of the report
Place = tuple[int, str, float]  # where a rank is: step, phase, time.monotonic() of its last report


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
    """Seconds for which each rank has sent no new report, by this process's own clock.

    Hosts' clocks may differ, so only a change of a report counts, not the time in it. A rank that
    has not reported yet may still be starting and is not counted. Nor is time in which this process
    itself was suspended, as with SIGSTOP: between two calls at most `longest_step` counts.
    """

    def __init__(self, longest_step: float):
        self._longest_step, self._now = longest_step, time.monotonic()
        self._last: dict[int, tuple] = {}
        self.seconds: dict[int, float] = {}

    def update(self, reports: dict[int, tuple], now: float) -> None:
        """Takes the newest report of each rank, at `now` of time.monotonic()."""
        passed, self._now = min(now - self._now, self._longest_step), now
        for rank, report in reports.items():
            self.seconds[rank] = self.seconds[rank] + passed if self._last.get(rank) == report else 0.0
            self._last[rank] = report

    def of(self, rank: int, report: tuple) -> float:
        """Seconds since a rank's last report, of which this is the newest."""
        return self.seconds.get(rank, 0.0) if self._last.get(rank) == report else 0.0


class Heartbeat:
    """Context manager around a run, from the process group on. Runs this rank's threads.

    `open` allows it to write OUT, `begin` starts the loop, `at` and `progress` mark progress.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.micro_batch_size: int | None = None  # known once the model fits into memory
        self.timeout = 60 * config.timeout_minutes
        self.silent = min(SILENT, max(self.timeout, LEAST))
        self._heard: dict[int, Report] = {}  # newest report of each other rank; replaced, never changed
        self.step, self.phase, self.since, self.marks = 0, "starting", time.time(), 0
        self.ends = ("failed", "")  # state and reason of the final heartbeat; the loop sets it before it ends
        self._is_open = self._has_begun = self._was_running = self._is_final = False
        self._writing = threading.Lock()
        self._silence, self._stillness = Silence(2 * EVERY), Silence(2 * EVERY)
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
        """Writes the final heartbeat, and settles with the other ranks why the run ends.

        Turns a lost peer, out of memory or a full disk into an error message, and the end of a rank
        whose peer failed into PeerFailed.
        """
        self._ended.set()
        self._thread.join(SAVING)  # it may be writing to a disk that hangs
        if self._store is not None:  # inside a request when Python ends, it would abort the process
            self._reporter.join(STALE)
        if error is None:
            if self._has_begun or self._was_running:
                self.ends_with(*self.ends)
            return
        is_lost, raised, own = failures.is_lost_peer(error), error, None
        if not is_lost:
            raised = self._explain(error)
            own = Verdict(self.ranks.rank, exit_code(raised), str(raised) or repr(raised))
            is_refused = isinstance(error, BadInput) or self.ends[0] == "done"  # or a complete run, whose report failed
            if self._has_begun or self._was_running or not is_refused:
                self.ends_with("failed", own.sentence)
        limit = verdict.SHORTEST if is_lost else verdict.LONGEST
        other = verdict.within(limit, lambda: verdict.settle(self.ranks, own))
        if other is not None and (is_lost or own.code != 1):  # a bug keeps its traceback
            raised = PeerFailed(other.rank, other.code, other.sentence)
            self._refer_to(other)
        elif is_lost:
            raised = self._explain(error)
        if is_lost:
            self.ends_with("failed", str(raised))
        if raised is not error:
            raise raised from error

    def open(self, step: int) -> None:
        """Allows this process to write OUT/heartbeat, since --out is its own.

        Before the loop begins it writes only that the start failed, not that input was refused. A
        file left at "running" by a process that was killed is corrected in any case.
        """
        self.step = step
        if self.ranks.is_first:
            with contextlib.suppress(OSError, ValueError):
                there = read_json(Path(self.config.out) / HEARTBEAT, {"state": str})
                self._was_running = there["state"] == "running"
            self._is_open = True

    def begin(self, micro_batch_size: int) -> None:
        """Marks the beginning of the loop, from which on the file says that the run goes on."""
        self.micro_batch_size, self._has_begun = micro_batch_size, True
        self.progress()

    def at(self, step: int, phase: str) -> None:
        """Marks progress: this rank begins a phase of a step."""
        self.step, self.phase = step, phase
        self.progress()

    def progress(self) -> None:
        """Marks progress inside a phase, such as a micro-batch or a batch of the validation."""
        self.since = time.time()  # for the file's readers alone
        self.marks += 1

    def ends_with(self, state: str, reason: str) -> None:
        """Writes the final heartbeat; the first call holds. Returns after seconds even if the disk hangs."""
        writing = threading.Thread(target=self._beat, args=(state, reason, True), daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be started
            writing.start()
            writing.join(SAVING)

    def account(self) -> str:
        """Describes this rank's step and phase, and the ranks that are behind."""
        now, rank = time.monotonic(), self.ranks.rank
        reports = self._reports()
        places = {other: (*report[:2], now - self._silence.of(other, report)) for other, report in reports.items()}
        return f"rank {rank} at step {self.step} ({self.phase}): " + account(
            rank, self.ranks.world_size, places | {rank: (self.step, self.phase, now)}, now
        )

    def _explain(self, error: BaseException) -> BaseException:
        return failures.explain(error, self.config, self.micro_batch_size, self.ranks, self.account) or error

    def _run(self) -> None:
        while True:
            if self._has_begun:
                self._beat("running", "")
            heard, now = self._heard, time.monotonic()
            self._silence.update(heard, now)
            if lost := [rank for rank, seconds in self._silence.seconds.items() if seconds > self.silent]:
                self._lose(lost)
            reports = {self.ranks.rank: (self.step, self.phase, self.marks)} | heard
            self._stillness.update({0: tuple(report[:3] for report in reports.values())}, now)
            waited, phases = self._stillness.seconds[0], {report[1] for report in reports.values()}
            limit = max(self.timeout, PATIENCE) if phases & {*LONG_PHASES} else self.timeout
            # A single process has no limit: a step may take hours.
            if self.ranks.world_size > 1 and waited > limit + 2 * EVERY:
                self._leave(waited)
            if self._ended.wait(min(EVERY, self.timeout / 4)):
                return

    def _beat(self, state: str, reason: str, is_final: bool = False) -> None:
        with self._writing:
            if not self._is_open or self._is_final:
                return
            self._is_final = is_final
            with contextlib.suppress(OSError, MemoryError):  # saving a checkpoint reports a full disk
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
        next_reading, number = 0.0, 0
        while not self._ended.is_set():
            number += 1
            try:
                report = self.step, self.phase, self.marks, number
                self._store.set(f"place/{self.ranks.rank}", json.dumps(report))
                if time.monotonic() >= next_reading:
                    next_reading = time.monotonic() + min(LISTEN, self.silent / 4)
                    self._heard = self._read(others)
                if (found := verdict.read(self._store)) is not None:
                    self._obey(found)
            except (RuntimeError, ValueError):  # if the store's host is gone, all ranks fall silent
                with contextlib.suppress(RuntimeError, ValueError):  # it may be this connection alone
                    self._store = self.ranks.connect_store()
            self._ended.wait(min(EVERY, self.timeout / 4))

    def _read(self, ranks: Iterable[int]) -> dict[int, Report]:
        """The newest report of each of these ranks that has sent one. Two requests if all have."""
        keys = {rank: f"place/{rank}" for rank in ranks}
        if not self._store.check([*keys.values()]):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        reports = self._store.multi_get([*keys.values()]) if keys else []
        return {rank: tuple(json.loads(report)) for rank, report in zip(keys, reports, strict=True)}

    def _reports(self) -> dict[int, Report]:
        """The ranks' reports that the store returns within STALE seconds."""
        reports: dict[int, Report] = {}

        def ask() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                if self._store is not None:
                    reports.update(self._read(range(self.ranks.world_size)))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(STALE)
        return dict(reports)

    def _lose(self, lost: list[int]) -> None:
        """Ends this process because other ranks are gone, for which its main thread may wait for ever."""
        who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, sorted(lost)))}"
        warn(
            f"train: every rank must report each {EVERY:g} s, got no report of {who} for {self.silent:g} s at rank "
            f"{self.ranks.rank} at step {self.step} ({self.phase}): a process or host is gone, or the network; the "
            "same command goes on from the last checkpoint"
        )
        self.ends_with("failed", f"no report of {who}")
        self._finish_saving()
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
        warn(
            f"train: a step must make progress within the {self.config.timeout_minutes:g} min of --timeout-minutes, "
            f"got none for {waited:.0f} s: {self.account()}; {where}; the same command goes on from the last "
            "checkpoint"
        )
        self.ends_with("failed", "hang")
        if self._store is not None:
            store = self._store
            verdict.within(verdict.ACCOUNTS + 1, lambda: verdict.wait_for_accounts(store, self.ranks))
        self._finish_saving()
        os._exit(LOST)

    def _refer_to(self, found: Verdict) -> None:
        """Says on rank 0, whose host may have another log, which rank says why the run ends."""
        if self.ranks.is_first:
            warn(f"train: ends because rank {found.rank} failed, which says why")

    def _obey(self, found: Verdict) -> None:
        """Ends this process as another rank's verdict says: its main thread may wait for that rank for ever."""
        with contextlib.suppress(RuntimeError, ValueError):  # first: the rank that failed waits for it
            verdict.acknowledge(self._store, self.ranks)
        self._finish_saving()
        if self._ended.is_set():  # the main thread has failed too, or has found out itself
            return
        self.ends_with("failed", f"rank {found.rank}: {found.sentence}")
        self._refer_to(found)
        os._exit(found.code)

    def _finish_saving(self) -> None:
        """Waits for a save that this rank makes alone. One that others take part in may never end."""
        is_alone = self.config.parallel == "ddp" and self.phase != "checkpoint"
        for thread in threading.enumerate():
            if thread.name == "saver":
                thread.join(PATIENCE if is_alone else SAVING)
