"""Worker processes of `gpt2 prepare`. They end with the command, whatever ends it."""

import contextlib
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from engine import system
from engine.errors import BadInput

Item, Result = TypeVar("Item"), TypeVar("Result")
LONGEST_END = 5.0  # seconds that a killed worker may take to be gone
POLL = 1.0  # seconds between two checks that the pool's own threads are alive


def _exit_with_parent() -> None:
    """Exits this worker soon after its parent dies.

    A killed parent cannot stop its workers, and they would wait forever.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    try:
        threading.Thread(target=watch, daemon=True).start()
    except RuntimeError:  # no thread can be started: the parent sees a worker that is gone, and says so
        os._exit(1)


def max_pending(workers: int) -> int:
    """Batches under way, so many that no worker waits for this process, and so few that they fit into memory."""
    return max(2 * workers, min(16 * workers, 64))


def map_in_order(
    encode: Callable[[Item], Result], batches: Iterable[Item], workers: int, max_pending: int
) -> Iterator[Result]:
    """Yields encode(batch) for every batch, in order; at most max_pending are in memory.

    workers: processes; 1 is this one. Raises BadInput if they cannot be started, or one is killed.
    """
    if workers == 1:
        yield from map(encode, batches)
        return
    others, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    pending: deque[Future] = deque()
    pool = None
    try:
        with _starting(workers):
            pool = ProcessPoolExecutor(workers, initializer=_exit_with_parent)
        for batch in batches:
            with _starting(workers):
                pending.append(pool.submit(encode, batch))
            if len(pending) >= max_pending:
                yield _result(pending.popleft(), workers, threads)
        while pending:
            yield _result(pending.popleft(), workers, threads)
        pool.shutdown()
    except BaseException:  # GeneratorExit too: the caller failed
        ours = set(multiprocessing.active_children()) - others
        for child in ours:
            child.kill()  # Python would wait for one that waits for work
        for child in ours:
            child.join(LONGEST_END)
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        raise


def _result(future: Future, workers: int, others: set[threading.Thread]) -> Result:
    """Waits for a result, or until the pool's threads have died, without which none comes.

    others: threads of this process that are not the pool's.
    """
    while True:
        try:
            return future.result(timeout=POLL)
        except BrokenProcessPool as error:
            raise _refusal(workers, "one that was killed or could not start") from error
        except TimeoutError:
            pass
        if not future.done() and not set(threading.enumerate()) - others:
            raise _refusal(workers, "a thread of this process that could not start")


@contextlib.contextmanager
def _starting(workers: int) -> Iterator[None]:
    """Around what starts processes, and threads that serve them."""
    try:
        yield
    except BrokenProcessPool as error:
        raise _refusal(workers, "one that was killed or could not start") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
        raise _refusal(workers, system.reason(error)) from error


def _refusal(workers: int, got: str) -> BadInput:
    return BadInput(
        f"prepare: its {workers} worker processes must be able to run, got {got}; use --workers 1, free memory, or "
        "raise the limits on memory, processes and open files (ulimit -v, -u, -n)"
    )
