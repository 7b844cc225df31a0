"""Batches of a run: the batch of step s is a pure function of (data, seed, s).

A keyed permutation orders the windows of an epoch. Each window occurs once, and no order is stored.
With S = tokens_per_step / T, step s takes windows s * S to (s + 1) * S - 1 of the sequence of all
epochs. Micro-batches and ranks take slices of these. So a run on 1, 2 or 8 GPUs sees the same
batches, and resuming needs only the step number. Of several data sets each has its own epochs;
engine/tokens/mixture.py says whose window comes when.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import BadInput
from engine.tokens.mixture import Stream, members, turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FEISTEL_ROUNDS = 6
ORDERED = 8192  # sequences of a rank whose windows are computed at once: numpy takes as long for a few hundred


# ---- Order --------------------------------------------------------------------------------------------------------


def _mix(x: np.ndarray) -> np.ndarray:
    """Bijection of uint64, splitmix64's finaliser: every input bit affects every output bit.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derived_seed(*key: int) -> int:
    """Seed of 63 bits, hashed from the key. Similar keys give unrelated seeds."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.array([part % (1 << 64)], dtype=np.uint64))
    return int(state[0]) >> 1


def permute(indices: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Images of indices under a keyed permutation of range(size): O(1) memory, int64 in and out.

    A Feistel network permutes the words of 2h bits, for the least h >= 1 with size <= 2^(2h). It is
    applied again to words outside range(size) until they are inside, which is still a permutation.
    A word needs fewer than 4 applications on average. Source: Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains", section 3 (cycle walking).
    """
    round_keys = _mix(np.uint64(derived_seed(*key)) + np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64))
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    words = indices.astype(np.uint64)
    outside = np.arange(len(words))  # places of the words that are to be permuted
    while len(outside):
        word = words[outside]
        left, right = word >> half, word & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        words[outside] = word = (left << half) | right
        outside = outside[word >= np.uint64(size)]
    return words.astype(np.int64)


def windows_at(positions: np.ndarray, num_windows: int, *key: int) -> np.ndarray:
    """Windows at positions of the sequence of all epochs, each (n,) int64. They may span several epochs."""
    windows = np.empty_like(positions)
    for epoch in np.unique(positions // num_windows):
        in_epoch = positions // num_windows == epoch
        windows[in_epoch] = permute(positions[in_epoch] % num_windows, num_windows, *key, int(epoch))
    return windows


# ---- Batches ------------------------------------------------------------------------------------------------------


@dataclass
class Batches:
    """Micro-batches of one rank, with a thread that reads one step ahead.

        stream = TokenStream.open("data/mine", "train", vocab_size=50257)
        batches = Batches(stream, context=1024, tokens_per_step=524_288, micro_batch_size=16)
        for tokens, targets in batches.at(step):  # each (16, 1024) int64
            ...

    `close` ends the thread; contextlib.closing calls it. Raises BadInput if tokens_per_step is no
    multiple of context * micro_batch_size * world_size, and if the stream is shorter than a step.
    """

    stream: Stream
    _: KW_ONLY
    context: int  # T, tokens per sequence
    tokens_per_step: int  # over all ranks
    micro_batch_size: int  # B, sequences per forward pass on one rank
    seed: int = 1  # of the order of the windows
    rank: int = 0
    world_size: int = 1
    device: "torch.device | str" = "cpu"  # for cuda and xpu the memory is page-locked: copies overlap with compute

    def __post_init__(self) -> None:
        unit = self.context * self.micro_batch_size * self.world_size
        if min(self.context, self.micro_batch_size, self.world_size) < 1 or not 0 <= self.rank < self.world_size:
            raise BadInput(
                "data: context, micro_batch_size and world_size must be at least 1, and rank below world_size, got "
                f"{self.context}, {self.micro_batch_size}, {self.world_size} and rank {self.rank}"
            )
        if self.tokens_per_step < 1 or self.tokens_per_step % unit:
            raise BadInput(
                f"data: tokens_per_step must be a multiple of context * micro_batch_size * world_size = {self.context} "
                f"* {self.micro_batch_size} * {self.world_size} = {unit}, got {self.tokens_per_step}"
            )
        self.accumulation = self.tokens_per_step // unit  # micro-batches per step of this rank
        self.sequences = self.tokens_per_step // self.context  # per step, all ranks
        self.num_windows = self.stream.num_windows(self.context)
        self._sets = members(self.stream, self.context)
        self._check_sizes()
        self._is_pinned = str(self.device).partition(":")[0] in ("cuda", "xpu")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future] | None = None
        self._ordered: tuple[int, np.ndarray] | None = None  # a step, and the windows from it on, see _order
        self._is_closed = False

    def at(self, step: int) -> list[tuple["Tensor", "Tensor"]]:
        """This rank's micro-batches of a step: (tokens, targets), each (B, T) int64 on the CPU.

        Raises BadInput if the step is no integer from 0, and after `close`.
        """
        if not isinstance(step, Integral) or step < 0:
            raise BadInput(f"data: the step of Batches.at must be an integer from 0, got {step!r}; count updates")
        if self._is_closed:
            raise BadInput(f"data: Batches.at must be called before close, got step {step} after it; make new Batches")
        ahead, self._ahead = self._ahead, None
        micro_batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._load(step)
        self._ahead = step + 1, self._reader.submit(self._load, step + 1)
        return micro_batches

    def _check_sizes(self) -> None:
        """Raises BadInput if a set has fewer windows than its share of a step."""
        whole = sum(one.parts for one in self._sets)
        for one in self._sets:
            sequences = -(-self.sequences * one.parts // whole)
            if one.num_windows < sequences:
                of, less = (f" of {one.directory}", ", a lower weight") if one.directory else ("", "")
                most = one.num_windows * whole // one.parts * self.context
                raise BadInput(
                    f"data: one step needs {sequences} sequences of {self.context} tokens{of}, got a corpus of "
                    f"{one.num_windows} ({len(one.stream)} tokens); give more text{less} or lower --tokens-per-step to "
                    f"at most {most}"
                )

    def _order(self, step: int) -> np.ndarray:
        """Windows of this rank's micro-batches of a step, (micro-batches, B) int64.

        Those of many steps are computed at once.
        """
        S, R, B = self.sequences, self.world_size, self.micro_batch_size
        steps = max(1, min(ORDERED // (self.accumulation * B), self.num_windows // S))
        first, ordered = step - step % steps, self._ordered  # read once: two threads may be here
        if ordered is None or ordered[0] != first:
            positions = np.arange(first * S, (first + steps) * S).reshape(-1, R, B)[:, self.rank].reshape(-1)
            which, numbers = turns(positions, [one.parts for one in self._sets])
            windows = np.empty_like(positions)
            for index, one in enumerate(self._sets):
                key = (self.seed, index) if index else (self.seed,)  # the first is ordered as a run on it alone
                windows[which == index] = one.first + windows_at(numbers[which == index], one.num_windows, *key)
            self._ordered = ordered = first, windows.reshape(steps, self.accumulation, B)
        return ordered[1][step - first]

    def _load(self, step: int) -> list[tuple["Tensor", "Tensor"]]:
        import torch

        A, B, T = self.accumulation, self.micro_batch_size, self.context
        rows = self.stream.window_rows(self._order(step).reshape(-1), T).reshape(A, B, T + 1)  # uint16
        # One buffer for the step: smaller ones would be mapped, and their pages made, anew in each step.
        pairs = torch.empty((A, 2, B, T), dtype=torch.int64, pin_memory=self._is_pinned)
        into = pairs.numpy()
        into[:, 0], into[:, 1] = rows[..., :-1], rows[..., 1:]  # the one pass over int64, which is most of the time
        return [(tokens, targets) for tokens, targets in pairs]

    def close(self) -> None:
        """Ends the background thread."""
        self._is_closed = True
        self._reader.shutdown(wait=True, cancel_futures=True)
