"""Several data sets in fixed proportions: whose turn it is at each sequence of a run, and their streams as one.

With weights n_1 + ... + n_K = D, each D sequences of the run, from a multiple of D on, hold exactly
n_k of set k. Inside them the sets take turns, so a step has its share of each set up to K - 1
sequences. The j-th sequence of a set is the j-th of its own epochs: no window comes twice in an
epoch of its set, and a small set begins its next epoch before a large one does.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.errors import BadInput
from engine.tokens import shards, weights
from engine.tokens.shards import TokenStream
from engine.tokens.weights import Source

if TYPE_CHECKING:
    from torch import Tensor

COUNTED_TOKENS = 2_000_000  # of each set, from which the most frequent tokens are known


# ---- Order --------------------------------------------------------------------------------------------------------


def turns(positions: np.ndarray, parts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(set, number among the sequences of that set) of each position in the run, (n,) int64 each.

    Of the first q sequences set 1 has floor(q n_1 / D). Of the r that are left set 2 has
    floor(r n_2 / (D - n_1)), and so on.
    """
    which, numbers = np.zeros_like(positions), np.zeros_like(positions)
    left, rest, whole = np.arange(len(positions)), positions, sum(parts)
    for index, part in enumerate(parts):
        before = _share(rest, part, whole)
        is_mine = _share(rest + 1, part, whole) > before
        which[left[is_mine]], numbers[left[is_mine]] = index, before[is_mine]
        left, rest, whole = left[~is_mine], (rest - before)[~is_mine], whole - part
    return which, numbers


def _share(count: np.ndarray, part: int, whole: int) -> np.ndarray:
    """floor(count * part / whole), without a product above whole^2."""
    return count // whole * part + count % whole * part // whole


# ---- Streams ------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """One set of a stream, or a stream that is one set."""

    directory: str  # "" of a stream that is one set
    parts: int  # its weight
    first: int  # number of its first window in the stream
    num_windows: int
    stream: TokenStream


@dataclass
class Mixture:
    """Streams of one split as one. Its windows are those of the first set, then those of the second, and so on."""

    sources: list[Source]
    streams: list[TokenStream]

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    @property
    def origin(self) -> str:
        """As TokenStream's, of the first set that is not ours."""
        return next(filter(None, (stream.origin for stream in self.streams)), "")

    def num_windows(self, context: int) -> int:
        """Number of whole windows of all sets."""
        return sum(stream.num_windows(context) for stream in self.streams)

    def window_rows(self, indices: np.ndarray, context: int) -> np.ndarray:
        """Windows by index, (len(indices), context + 1) uint16: inputs [:, :-1], targets [:, 1:]."""
        rows = np.empty((len(indices), context + 1), dtype=np.uint16)
        for one in members(self, context):
            is_its = (one.first <= indices) & (indices < one.first + one.num_windows)
            if is_its.any():
                rows[is_its] = one.stream.window_rows(indices[is_its] - one.first, context)
        return rows

    def windows(self, indices: np.ndarray, context: int) -> "Tensor":
        """The same as a tensor of int64."""
        import torch

        return torch.from_numpy(self.window_rows(indices, context).astype(np.int64))


Stream = TokenStream | Mixture


def members(stream: Stream, context: int) -> list[Member]:
    """The sets of a stream."""
    if not isinstance(stream, Mixture):
        return [Member("", 1, 0, stream.num_windows(context), stream)]
    found, first = [], 0
    for source, one in zip(stream.sources, stream.streams, strict=True):
        found.append(Member(*source, first, one.num_windows(context), one))
        first += found[-1].num_windows
    return found


def mean(stream: Stream, figures: Sequence[float]) -> float:
    """Mean of a figure of each set by the weights of the sets."""
    parts = [source.parts for source in stream.sources] if isinstance(stream, Mixture) else [1]
    return sum(part * figure for part, figure in zip(parts, figures, strict=True)) / sum(parts)


def by_set(stream: Stream, figure: str, figures: Sequence[float]) -> dict[str, float]:
    """Figures of the sets of a mixture by names such as val_loss/a; {} for a stream that is one set."""
    if not isinstance(stream, Mixture):
        return {}
    return {f"{figure}/{label}": one for label, one in zip(weights.labels(stream.sources), figures, strict=True)}


def frequent(stream: Stream, context: int, count: int) -> np.ndarray:
    """The `count` most frequent tokens of a stream, (count,) int64, counted in windows spread evenly over each set."""
    shares = np.zeros(1 << 16)
    for one in members(stream, context):
        num_read = min(one.num_windows, COUNTED_TOKENS // context + 1)
        windows = np.arange(num_read) * one.num_windows // num_read
        targets = one.stream.window_rows(windows, context)[:, 1:]
        shares += one.parts * np.bincount(targets.reshape(-1), minlength=len(shares)) / targets.size
    return np.argsort(-shares, kind="stable")[:count]


# ---- Open ---------------------------------------------------------------------------------------------------------


def open_stream(data: str, split: str, vocab_size: int) -> Stream:
    """Opens a split of the sets that `data` names.

    Raises BadInput with what is wrong with each, as TokenStream.open does.
    """
    sources = weights.parse(data)
    streams = _of_each(sources, lambda directory: TokenStream.open(directory, split, vocab_size))
    return Mixture(sources, streams) if len(streams) > 1 else streams[0]


def tokenizer_name(data: str) -> str:
    """Name of the tokenizer of the sets that `data` names. Raises BadInput if they differ in it."""
    sources = weights.parse(data)
    found = _of_each(sources, shards.tokenizer_name)
    if len(set(found)) > 1:
        got = ", ".join(f"{name} in {source.directory}" for name, source in zip(found, sources, strict=True))
        raise BadInput(f"data: all sets must have the same tokenizer, got {got}; prepare them with one --tokenizer")
    return found[0]


def digest(data: str, streams: Sequence[Stream]) -> str:
    """Digest of the sets and their weights, 16 hex digits; of one set that of engine/tokens/shards.py."""
    sources = weights.parse(data)
    of_each = [[stream] if len(sources) == 1 else stream.streams for stream in streams]
    found = [
        shards.digest(list(splits), source.directory)
        for source, splits in zip(sources, zip(*of_each, strict=True), strict=True)
    ]
    identity = [(source.parts, one) for source, one in zip(sources, found, strict=True)]
    return found[0] if len(found) == 1 else hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _of_each(sources: list[Source], read: Callable[[str], Any]) -> list[Any]:
    """read(directory) of each set. Raises one BadInput for all that fail."""
    found, wrong = [], []
    for source in sources:
        try:
            found.append(read(source.directory))
        except BadInput as error:
            wrong.append(str(error))
    if wrong:
        raise BadInput("\n  ".join(wrong))
    return found
