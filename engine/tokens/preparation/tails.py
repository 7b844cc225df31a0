"""The tail of every document as validation set, for a corpus whose documents all fell into one split, as a single book.

The tokens are those of the shards that were written: nothing is tokenised again. Memory is bounded.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.tokens.preparation.writer import ShardWriter
from engine.tokens.shards import HEADER_BYTES, open_shard

PIECE = 1 << 22  # tokens that are looked at or copied at once


class _Shards:
    """Shards as one array of tokens, read piece by piece. Mapped, all of them would stay in memory."""

    def __init__(self, paths: list[Path]):
        self.paths, self.sizes = paths, [len(open_shard(path)) for path in paths]
        self.ends = np.cumsum(self.sizes)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (position, tokens) of pieces of [start, end)."""
        while start < end:
            index = int(np.searchsorted(self.ends, start, side="right"))
            first = start - int(self.ends[index] - self.sizes[index])
            count = min(PIECE, end - start, self.sizes[index] - first)
            piece = np.fromfile(self.paths[index], "<u2", count, offset=HEADER_BYTES + 2 * first)
            yield start, piece
            start += len(piece)


def cut(paths: list[Path], val_fraction: float, end_of_text: int, writers: dict[str, ShardWriter]) -> Counter:
    """Writes the documents of the shards again, the last val_fraction of each one's tokens for validation.

    Returns the number of documents of each split.
    """
    shards, documents = _Shards(paths), Counter()
    separator = np.array([end_of_text], dtype=np.uint16)
    for start, end in _documents(shards, end_of_text):
        at = end - int((end - start - 1) * val_fraction)  # the end of text is no part of the document
        for split, first, last in (("train", start + 1, at), ("val", at, end)):
            if first < last:
                writers[split].add(separator)
                documents[split] += 1
                for _, piece in shards.pieces(first, last):
                    writers[split].add(piece)
    return documents


def _documents(shards: _Shards, end_of_text: int) -> Iterator[tuple[int, int]]:
    """Yields where each document begins, at its end-of-text token, and ends."""
    before, total = 0, int(shards.ends[-1])
    for position, piece in shards.pieces(0, total):
        for start in (np.flatnonzero(piece == end_of_text) + position).tolist():
            if start:
                yield before, start
            before = start
    yield before, total
