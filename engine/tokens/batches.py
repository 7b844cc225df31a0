"""Batches of a run: the batch of step s is a pure function of (data, seed, s).

A keyed permutation orders the windows of an epoch. Each window occurs once, and no order is stored.
With S = tokens_per_step / T, step s takes windows s * S to (s + 1) * S - 1 of the sequence of all
epochs. Micro-batches and ranks take slices of these. So a run on 1, 2 or 8 GPUs sees the same
batches, and resuming needs only the step number.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import BadInput
from engine.tokens.shards import TokenStream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FEISTEL_ROUNDS = 6


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
    outside = np.ones(words.shape, dtype=bool)
    while outside.any():
        word = words[outside]
        left, right = word >> half, word & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        words[outside] = (left << half) | right
        outside = words >= np.uint64(size)
    return words.astype(np.int64)


def step_windows(step: int, sequences: int, num_windows: int, seed: int) -> np.ndarray:
    """Window indices of one step, for all ranks and micro-batches: (sequences,) int64.

    May span two epochs.
    """
    positions = np.arange(step * sequences, (step + 1) * sequences)
    windows = np.empty_like(positions)
    for epoch in np.unique(positions // num_windows):
        in_epoch = positions // num_windows == epoch
        windows[in_epoch] = permute(positions[in_epoch] % num_windows, num_windows, seed, int(epoch))
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

    stream: TokenStream
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
        if self.num_windows < self.sequences:
            raise BadInput(
                f"data: one step needs {self.sequences} sequences of {self.context} tokens, got a corpus of "
                f"{self.num_windows} ({len(self.stream)} tokens); give more text or lower --tokens-per-step to at most "
                f"{self.num_windows * self.context}"
            )
        self._is_pinned = str(self.device).partition(":")[0] in ("cuda", "xpu")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future] | None = None
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

    def _load(self, step: int) -> list[tuple["Tensor", "Tensor"]]:
        B, R = self.micro_batch_size, self.world_size
        mine = step_windows(step, self.sequences, self.num_windows, self.seed).reshape(-1, R, B)[:, self.rank]
        micro_batches = []
        for indices in mine:  # (B,) each
            windows = self.stream.windows(indices, self.context)  # (B, T + 1)
            pair = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
            micro_batches.append(tuple(t.pin_memory() for t in pair) if self._is_pinned else pair)
        return micro_batches

    def close(self) -> None:
        """Ends the background thread."""
        self._is_closed = True
        self._reader.shutdown(wait=True, cancel_futures=True)
