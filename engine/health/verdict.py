"""Shared verdict: the first rank that fails ends every rank with its exit code, and alone says why.

    verdict          rank, code and sentence of the first rank that failed, as JSON
    verdict/read/R   set by rank R, which has read it and is about to leave

Both are keys of torchrun's store. Without them a rank that waits in a collective for one that ended
with an error message would report a fault of the network. The rank that failed waits until the
others have read its verdict, because torchrun kills them once one has exited.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from engine.distributed import Ranks

KEY = "verdict"
LOOK = 0.05  # seconds between looks at the store
HEAD_START = 0.5  # seconds that rank 0 has to say first what all ranks say alike
CAUSE = 2.0  # seconds in which a peer that is gone may have said why
READERS = 10.0  # seconds in which the others must have read a verdict
LONGEST = 20.0  # seconds for all of settle, if the store does not answer
SHORTEST = 5.0  # the same for a rank that has lost a peer, whose host may be the store's
ACCOUNTS = 5.0  # seconds in which all ranks must have said where they hang


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: an error of one rank."""

    rank: int
    code: int
    sentence: str


def read(store: dist.Store) -> Verdict | None:
    """The verdict, or None while no rank has failed. Does not wait."""
    return Verdict(**json.loads(store.get(KEY))) if store.check([KEY]) else None


def publish(store: dist.Store, verdict: Verdict) -> Verdict:
    """Publishes a verdict unless there is one; returns the one that holds."""
    return Verdict(**json.loads(store.compare_set(KEY, "", json.dumps(asdict(verdict)))))


def acknowledge(store: dist.Store, ranks: Ranks) -> None:
    """Tells the rank that failed that this one has read its verdict."""
    store.set(f"{KEY}/read/{ranks.rank}", "")


def settle(ranks: Ranks, own: Verdict | None) -> Verdict | None:
    """Another rank's verdict, by which this one must end, or None if this rank's own error holds.

    own: None if this rank lost a peer, which may have said why. If own holds, waits until the other
    ranks have read it, at most READERS seconds.
    """
    with contextlib.suppress(RuntimeError, ValueError):  # no store, no verdict: each rank speaks for itself
        if (store := ranks.connect_store()) is None:
            return None
        patience = CAUSE if own is None else 0.0 if ranks.is_first else HEAD_START
        found = _wait(lambda: read(store), patience)
        if found is None and own is not None:
            found = publish(store, own)
        if found is None:
            return None
        if found != own:
            acknowledge(store, ranks)
            return found
        others = [f"{KEY}/read/{rank}" for rank in range(ranks.world_size) if rank != ranks.rank]
        _wait(lambda: store.check(others), READERS)
    return None


def within(seconds: float, ask: Callable[[], Verdict | None]) -> Verdict | None:
    """What a request to the store returns, or None after these seconds: over a cut link it may never return."""
    answers: list[Verdict | None] = []
    asking = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def wait_for_accounts(store: dist.Store, ranks: Ranks) -> None:
    """Waits until every rank has come here: torchrun kills the others once one has exited."""
    with contextlib.suppress(RuntimeError, ValueError):
        store.set(f"account/{ranks.rank}", "")
        _wait(lambda: store.check([f"account/{rank}" for rank in range(ranks.world_size)]), ACCOUNTS)


def _wait(look: Callable, seconds: float):
    """What `look` returns once it is true, or after these seconds."""
    until = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < until:
        time.sleep(LOOK)
    return found
