"""Shards as they grow: tokens are appended to the file of an unfinished shard, and its header is written last.

What waits for the disk is done by a thread of its own, so that the tokens of the workers do not wait.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine import system
from engine.tokens.shards import HEADER_BYTES, sha256, shard_header

MOST_WAITING = 2  # works that wait for the disk; then the writing waits too, and the workers with it


class Behind:
    """A thread that does what waits for the disk, in order. An error of it is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "prepare's disk")
        self._pool.submit(int).result()  # starts the thread
        self._waiting: deque[Future] = deque()

    def do(self, work: Callable[..., None], *args: Any) -> None:
        """Does the work after all that came before it."""
        self._waiting.append(self._pool.submit(work, *args))
        while len(self._waiting) > MOST_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Waits until all is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Ends the thread, without the works that it has not begun."""
        self._pool.shutdown(cancel_futures=True)


class ShardWriter:
    """Writer of one split's shards. Each has shard_tokens tokens, except the last, which may have fewer.

    total: tokens that an earlier start has written. records: manifest entries of its finished shards.
    Raises OSError or ValueError if the unfinished one is not there as it was.
    """

    def __init__(self, stem: Path, shard_tokens: int, behind: Behind, total: int = 0, records: tuple[dict, ...] = ()):
        self.stem, self.shard_tokens, self.behind = stem, shard_tokens, behind  # stem: as out/.building/name_train
        self.total, self.records = total, list(records)
        self.num_finished = len(self.records)  # in `records` as soon as the thread has done it
        self.written = total - sum(record["tokens"] for record in self.records)  # tokens of the unfinished shard
        self.file: BinaryIO | None = None
        if self.written:
            self.file = self._path().open("r+b")
            if self.file.seek(0, os.SEEK_END) < HEADER_BYTES + 2 * self.written:
                raise ValueError(f"{self._path()} is too short")
            self.file.truncate(HEADER_BYTES + 2 * self.written)
            self.file.seek(0, os.SEEK_END)

    def _path(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}_{self.num_finished:06d}.bin")

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens (n,) uint16, and finishes each shard that becomes full."""
        self.total += len(tokens)
        while len(tokens):
            piece, tokens = np.split(tokens, [self.shard_tokens - self.written])
            with system.naming(self._path()):
                if self.file is None:
                    self.file = self._path().open("wb")
                    self.file.write(bytes(HEADER_BYTES))
                self.file.write(piece.astype("<u2", copy=False).data)
            self.written += len(piece)
            if self.written == self.shard_tokens:
                self.finish()

    def flush(self) -> None:
        """Gives the system what is buffered here."""
        with system.naming(self._path()):
            if self.file is not None:
                self.file.flush()

    def finish(self) -> None:
        """Ends the unfinished shard, if there is one."""
        if self.file is not None:
            self.flush()
            self.behind.do(self._finish, self.file, self._path(), self.written)
            self.file, self.written, self.num_finished = None, 0, self.num_finished + 1

    def _finish(self, file: BinaryIO, path: Path, count: int) -> None:
        with system.naming(path), file:
            file.seek(0)
            file.write(shard_header(count))
            file.flush()
            os.fsync(file.fileno())
        size = path.stat().st_size
        split = self.stem.name.rpartition("_")[2]
        self.records.append({"file": path.name, "split": split, "tokens": count, "bytes": size, "sha256": sha256(path)})

    def close(self) -> None:
        """Closes the file of an unfinished shard, which stays."""
        if self.file is not None:
            self.file.close()
