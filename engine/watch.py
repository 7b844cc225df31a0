"""Whether a run is alive: a file for a supervisor, and an end to waiting for a rank that will not come.

OUT/heartbeat is JSON: step, num_steps, time (of the last progress, seconds since 1970), state (running, stopped, done
or failed) and reason. Each rank has a thread that tells the others, through the store of torchrun, where it is; when
one of several makes no progress for `timeout_minutes`, it says who is behind, leaves its stacks in OUT and exits.
"""

import contextlib
import errno
import faulthandler
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from engine import memory
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import LOST, BadInput, Lost

HEARTBEAT = "heartbeat"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
EVERY = 1.0  # seconds between two reports of a rank
STALE = 5.0  # seconds after which a rank that does not report is said to be silent
# Gloo's errors have no type of their own, but begin with the place in its source.
_GLOO_SAID = re.compile(
    r"gloo/(transport|rendezvous)/|Connection closed by peer \[|Timed out waiting \d+ms for (send|recv) operation"
)


def write_heartbeat(out: str | Path, **fields: object) -> None:
    """Replaces OUT/heartbeat as a whole, so that no reader sees half of it."""
    path = Path(out) / HEARTBEAT
    temporary = path.with_name(f".{HEARTBEAT}.writing")
    temporary.write_text(json.dumps(fields) + "\n")
    temporary.replace(path)


Place = tuple[int, str, float]  # of a rank: the step it is at, what it does there, when it last reported


def account(rank: int, world_size: int, places: dict[int, Place], now: float) -> str:
    """Which ranks the others wait for, in words, as `rank` sees it. places: of every rank that was heard of."""
    furthest = max((step for step, _, _ in places.values()), default=0)
    here = places.get(rank)
    late = []
    for other in range(world_size):
        if other not in places:
            late.append(f"rank {other} was not heard of")
            continue
        step, doing, seen = places[other]
        is_elsewhere = here is not None and (step, doing) != here[:2]
        if other != rank and (step < furthest or now - seen > STALE or is_elsewhere):
            late.append(f"rank {other} was at step {step} ({doing}) and last heard of {now - seen:.0f} s ago")
    return "; ".join(late) or "no other rank is behind"


class Watch:
    """This rank's thread. Enter it around the loop and call `at` where the loop gets to."""

    def __init__(self, config: TrainConfig, ranks: Ranks, start: int, micro_batch_size: int):
        self.config, self.ranks, self.micro_batch_size = config, ranks, micro_batch_size
        self.timeout = 60 * config.timeout_minutes
        self.step, self.doing, self.since = start, "starting", time.time()
        self.ends = ("failed", "")  # state and reason of the last heartbeat, until the loop knows better
        self._ended = threading.Event()
        self._store = ranks.connect_store()  # a connection of its own: the main thread may be blocked on the other
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._reporter = threading.Thread(target=self._report, name="reports", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        if self._store is not None:
            self._reporter.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Writes the last heartbeat. What is another rank's fault or the memory's becomes a sentence that says so."""
        self._ended.set()
        self._thread.join()
        if error is None:
            self._beat(*self.ends)
            return
        told = self._explain(error)
        self._beat("failed", str(told or error) or repr(error))
        if told is not None:
            raise told from error

    def _explain(self, error: BaseException) -> BadInput | Lost | None:
        """The sentence for whoever must act, where an exception is not a bug of ours."""
        if memory.out_of_memory(error):
            return BadInput(memory.sentence(error, self.config, self.micro_batch_size, self.ranks))
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            if isinstance(error.__context__, BadInput):  # a save that found no room either, and says how much it needs
                return error.__context__
            return BadInput(
                f"train: --out must have room for the run's record, got {error.strerror} in {self.config.out}; make "
                "room there; the same command goes on from the last checkpoint"
            )
        if is_lost_peer(error):
            return Lost(
                f"train: all {self.ranks.world_size} processes must answer within the {self.config.timeout_minutes:g} "
                f"min of --timeout-minutes, got {_first_line(error)} at {self.account()}; check hosts and network "
                "(NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the interface); the same command goes on from the last "
                "checkpoint"
            )
        return None

    def at(self, step: int, doing: str) -> None:
        """This rank begins something: progress."""
        self.step, self.doing, self.since = step, doing, time.time()

    def account(self) -> str:
        """Where this rank is and who is behind, in words."""
        here = self.step, self.doing, time.time()
        return f"rank {self.ranks.rank} at step {self.step} ({self.doing}): " + account(
            self.ranks.rank, self.ranks.world_size, self._places() | {self.ranks.rank: here}, time.time()
        )

    def _run(self) -> None:
        while True:
            self._beat("running", "")
            waited = time.time() - self.since
            # After the collectives' own timeout. One process alone holds nobody up: its steps may take hours.
            if self.ranks.world_size > 1 and waited > self.timeout + 2 * EVERY:
                self._leave(waited)
            if self._ended.wait(min(EVERY, self.timeout / 4)):
                return

    def _beat(self, state: str, reason: str) -> None:
        if self.ranks.is_first:
            with contextlib.suppress(OSError):  # a full disk is the checkpoints' to report
                write_heartbeat(
                    self.config.out,
                    step=self.step,
                    num_steps=self.config.num_steps,
                    time=self.since,
                    state=state,
                    reason=reason,
                )

    def _report(self) -> None:
        """A thread apart: if the store's host is cut off, a request may stay without an answer for minutes."""
        while not self._ended.is_set():
            with contextlib.suppress(RuntimeError):  # the store is gone with its host: the collectives will tell
                self._store.set(f"place/{self.ranks.rank}", json.dumps([self.step, self.doing, time.time()]))
            self._ended.wait(min(EVERY, self.timeout / 4))

    def _places(self) -> dict[int, Place]:
        """What the ranks reported, as far as the store answers at once."""
        places: dict[int, Place] = {}

        def ask() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                for rank in range(self.ranks.world_size if self._store is not None else 0):
                    if self._store.check([f"place/{rank}"]):
                        places[rank] = tuple(json.loads(self._store.get(f"place/{rank}")))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(STALE)
        return dict(places)

    def _leave(self, waited: float) -> None:
        """Ends a process that hangs, from outside its main thread."""
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


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception is a collective's, that a peer did not answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and _GLOO_SAID.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    """The cause without gloo's file name in front and its advice behind."""
    line = re.sub(r"^\[\S+?\] ", "", str(error).strip().partition("\n")[0])
    return line.partition(". This is typically")[0] or repr(error)
