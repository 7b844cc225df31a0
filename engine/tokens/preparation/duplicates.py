"""Documents that are equal to one before them, by 16 bytes of BLAKE2b of their text.

The digests are a hash table in memory of 16 bytes a slot, of which 50 to 75% are taken: 21 to 32
bytes a document. They are also a file, from which the table is made when it grows and when a
preparation goes on. The last bit of a digest is not compared: it says whether the document is of
the validation sources.
"""

import os
from pathlib import Path

import numpy as np

from engine import system

FIRST_SLOTS, MOST_FULL, GROWTH = 1 << 12, 0.75, 1.5
READ = 1 << 16  # digests read from the file at once
BIT = np.uint64(1)


class Seen:
    """Digests of the documents that are kept. count: those that an earlier start has written, all of them."""

    def __init__(self, path: Path, count: int = 0):
        self.path, self.count, self.was_kept = path, count, True
        self.file = path.open("r+b" if count else "w+b", buffering=0)
        if self.file.seek(0, os.SEEK_END) < 16 * count:
            raise ValueError(f"{path} must have {16 * count} bytes, got {self.file.tell()}")
        self.file.truncate(16 * count)
        self.table = np.zeros((0, 2), dtype=np.uint64)
        self._make_room(0)

    def add(self, digests: np.ndarray, is_val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds documents: digests (n, 2) uint64, is_val (n,) bool.

        Returns two (n,) bool: which are new, and which are equal to one of the other split.
        """
        if not len(digests):
            return np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)
        marked = digests.copy()
        marked[:, 1] = (marked[:, 1] & ~BIT) | is_val
        marked[~marked[:, 0].astype(bool), 0] = 1  # 0 is a free slot
        _, first, group = np.unique(
            marked & np.array([~np.uint64(0), ~BIT]), axis=0, return_index=True, return_inverse=True
        )
        self._make_room(len(first))
        order = np.sort(first)
        found = self._insert(marked[order])
        is_new = np.zeros(len(marked), dtype=bool)
        is_new[order[found < 0]] = True
        self._append(marked[is_new])
        bits = np.zeros(len(marked), dtype=np.int64)
        bits[order] = np.where(found < 0, marked[order, 1] & BIT, found)
        of_first = bits[first][group.reshape(-1)]  # of the first document with the same text
        return is_new, ~is_new & (of_first != is_val)

    def _append(self, digests: np.ndarray) -> None:
        with system.naming(self.path):
            self.file.seek(16 * self.count)
            content = memoryview(digests.astype("<u8", copy=False).tobytes())
            while content:
                content = content[self.file.write(content) :]
        self.count += len(digests)

    def _make_room(self, more: int) -> None:
        """Makes a larger table if this one may become too full, from the file: the old one is gone by then."""
        slots = max(FIRST_SLOTS, len(self.table))
        while self.count + more > MOST_FULL * slots:
            slots = int(GROWTH * slots)
        if slots == len(self.table):
            return
        self.table = None
        self.table = np.zeros((slots, 2), dtype=np.uint64)
        with system.naming(self.path):
            for start in range(0, self.count, READ):
                self.file.seek(16 * start)
                content = self.file.read(16 * min(READ, self.count - start))
                self._insert(np.frombuffer(content, dtype="<u8").reshape(-1, 2).astype(np.uint64))

    def _insert(self, digests: np.ndarray) -> np.ndarray:
        """Inserts digests that differ from each other. Returns (n,) int64: -1 if new, else the bit of the one there."""
        found = np.full(len(digests), -1, dtype=np.int64)
        slots = ((digests[:, 0] >> np.uint64(32)) * np.uint64(len(self.table))) >> np.uint64(32)
        pending = np.arange(len(digests))
        while len(pending):
            mine, at = digests[pending], slots[pending]
            there = self.table[at]
            is_free = there[:, 0] == 0
            is_same = (there[:, 0] == mine[:, 0]) & ((there[:, 1] ^ mine[:, 1]) <= BIT)
            found[pending[is_same]] = there[is_same, 1] & BIT
            self.table[at[is_free]] = mine[is_free]  # of several the last has it
            has_it = is_free & (self.table[at] == mine).all(axis=1)
            pending = pending[~is_same & ~has_it]
            slots[pending] = (slots[pending] + np.uint64(1)) % np.uint64(len(self.table))
        return found

    def sync(self) -> None:
        """Gives the disk what was written."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file, which stays."""
        self.file.close()
