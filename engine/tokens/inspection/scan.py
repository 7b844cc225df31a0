"""One pass over the tokens of a split: its documents, their lengths, and how many are copies.

A document is what lies between two end-of-text tokens, across shards, or between one and an end of
the split. So a set has as many whether the token begins a document, as here, or ends it, as in
nanoGPT's data.

Copies are found by a 64-bit hash of a document's tokens. Memory is bounded: if there are more
documents than MOST_HASHES, one in 2, 4, 8, ... is compared. A hash of its length, first and last
token chooses it, so all copies of a document are chosen or none is, wherever they lie.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

BLOCK_TOKENS = 1 << 22  # read and counted at a time
MOST_HASHES = 1 << 22  # of 8 bytes; hashing takes longer than all the rest
KEY_BITS = 8  # low bits of a kept hash, which choose what is compared
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)  # odd; any would do


@dataclass
class Chosen:
    """Documents that are compared: one in 2**bits. All splits share it."""

    most: int = MOST_HASHES  # that are kept
    bits: int = 0
    kept: int = 0  # hashes, of all splits


@dataclass
class Open:
    """A document that is not over: its length, first and last token, and what its hash is made of."""

    length: int = 0
    first: int = 0
    last: int = 0
    rest: bytearray = field(default_factory=bytearray)  # fewer than a block
    before: int | None = None  # hash of the whole blocks in front of `rest`

    def add(self, piece: bytes) -> None:
        """Appends tokens. Of a long document only a hash is kept."""
        if not piece:
            return
        if not self.length:
            self.first = int.from_bytes(piece[:2], "little")
        self.last = int.from_bytes(piece[-2:], "little")
        self.length += len(piece) // 2
        self.rest += piece
        while len(self.rest) >= 2 * BLOCK_TOKENS:
            self.before = hash((self.before, bytes(self.rest[: 2 * BLOCK_TOKENS])))
            del self.rest[: 2 * BLOCK_TOKENS]

    def digest(self) -> int:
        """Hash of the tokens, the same wherever the blocks of the split end."""
        return hash(bytes(self.rest)) if self.before is None else hash((self.before, bytes(self.rest)))


@dataclass
class Split:
    """Counts of one split. Its blocks of tokens are added in their order, then it is closed."""

    end_of_text: int
    chosen: Chosen
    tokens: int = 0
    ends: int = 0  # end-of-text tokens
    lengths: Counter = field(default_factory=Counter)  # tokens of a document -> documents
    hashes: list[np.ndarray] = field(default_factory=list, repr=False)  # (n,) uint64 each
    _open: Open = field(default_factory=Open, repr=False)
    _is_new: bool = True  # no token yet

    def add(self, block: bytes) -> int:
        """Counts a block of uint16 tokens, at most BLOCK_TOKENS. Returns its end-of-text tokens."""
        tokens = np.frombuffer(block, dtype="<u2")
        found = np.flatnonzero(tokens == self.end_of_text)
        if len(found) == 0:
            self._open.add(block)
        else:
            self._open.add(block[: 2 * int(found[0])])
            if self._open.length or not self._is_new:  # none lies before a token that begins the split
                self._close()
            self._count(block, tokens, found[:-1] + 1, found[1:])
            self._open.add(block[2 * (int(found[-1]) + 1) :])
        self._is_new = False
        self.tokens += len(tokens)
        self.ends += len(found)
        return len(found)

    def close(self) -> None:
        """Ends the last document. What is added next begins another one."""
        if self._open.length:  # none lies after a token that ends the split
            self._close()
        self._is_new = True

    @property
    def documents(self) -> int:
        """Number of documents, without one that is still open."""
        return self.lengths.total()

    def spread(self) -> dict[str, float] | None:
        """Shortest, median, mean and longest document in tokens without end of text; None if there is none."""
        if not self.lengths:
            return None
        lengths = np.array(sorted(self.lengths))
        ranks = np.cumsum([self.lengths[int(length)] for length in lengths])
        middle = np.searchsorted(ranks, [(self.documents - 1) // 2, self.documents // 2], side="right")
        mean = sum(length * count for length, count in self.lengths.items()) / self.documents
        return {
            "shortest": int(lengths[0]),
            "median": float(lengths[middle].mean()),
            "mean": mean,
            "longest": int(lengths[-1]),
        }

    def _close(self) -> None:
        one, self._open = self._open, Open()
        self.lengths[one.length] += 1
        ends = (one.first, one.last) if one.length else (self.end_of_text, self.end_of_text)
        key = _keys(np.array([one.length]), np.array([ends[0]]), np.array([ends[1]]))
        if int(key[0]) % (1 << self.chosen.bits) == 0:
            self._keep([one.digest()], key)

    def _count(self, block: bytes, tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        """Counts the documents that begin and end in a block."""
        lengths = stops - starts
        self.lengths.update(lengths.tolist())
        keys = _keys(lengths, tokens[starts], tokens[stops - 1])
        those = np.flatnonzero(keys % (1 << self.chosen.bits) == 0)
        places = zip((2 * starts[those]).tolist(), (2 * stops[those]).tolist(), strict=True)
        self._keep([hash(block[start:stop]) for start, stop in places], keys[those])

    def _keep(self, hashes: list[int], keys: np.ndarray) -> None:
        kept = np.array(hashes, dtype=np.int64).view(np.uint64) & np.uint64(2**64 - 2**KEY_BITS)
        self.hashes.append(kept | keys)
        self.chosen.kept += len(kept)


def _keys(lengths: np.ndarray, firsts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
    """(n,) uint64 below 2**KEY_BITS for documents, equal for equal ones."""
    columns = zip((lengths, firsts, lasts), MIX, strict=True)
    mixed = sum((column.astype(np.uint64) * odd for column, odd in columns), start=np.uint64(0))
    return ((mixed ^ (mixed >> np.uint64(29))) * MIX[0]) >> np.uint64(64 - KEY_BITS)


def make_room(splits: list[Split], chosen: Chosen) -> None:
    """Halves the documents that are compared until few enough hashes are kept."""
    while chosen.kept > chosen.most and chosen.bits < KEY_BITS:
        chosen.bits += 1
        odd = np.uint64(1 << (chosen.bits - 1))
        for split in splits:
            split.hashes = [part[part & odd == 0] for part in split.hashes]
        chosen.kept = sum(len(part) for split in splits for part in split.hashes)


def copies(splits: dict[str, Split]) -> dict[str, dict[str, int]]:
    """For each split: documents compared, copies of another one in it, and those that are in `train` too.

    Frees the hashes.
    """
    compared = {}
    for name, split in splits.items():
        compared[name] = np.concatenate([np.zeros(0, dtype=np.uint64), *split.hashes])
        split.hashes = []
        compared[name].sort()
    found = {}
    for name, hashes in compared.items():
        found[name] = {"compared": len(hashes), "copies": int((hashes[1:] == hashes[:-1]).sum())}
        if name != "train" and "train" in compared:
            train = compared["train"]
            places = np.minimum(np.searchsorted(train, hashes), max(len(train) - 1, 0))
            found[name]["in_train"] = int((train[places] == hashes).sum()) if len(train) else 0
    return found
