"""Reading token shards: opening them, and the batches of a step one after another, as fast as they come.

The batches of `tiny` (1,024 tokens in windows of 64) and of GPT-2 (524,288 in windows of 1,024) are first checked
against slices of the tokens that were written. The files were just written and are in memory.
`pytest bench/bench_data.py`
"""

from itertools import count
from pathlib import Path

import numpy as np
import pytest
from conftest import ON_GPU, case

from engine import data

VOCAB_SIZE = 50257
SHARDS = 4
QUICK_TOKENS, FULL_TOKENS = 1 << 20, 25_000_000  # of a shard
STEPS = {"tiny": (64, 16, 1), "gpt2": (1024, 16, 32)}  # T, sequences of a micro-batch, micro-batches


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes shards of random tokens once per size: (directory, all of the tokens)."""
    made: dict[int, tuple[Path, np.ndarray]] = {}

    def write(shard_tokens: int) -> tuple[Path, np.ndarray]:
        if shard_tokens not in made:
            directory = tmp_path_factory.mktemp("shards")
            tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=SHARDS * shard_tokens, dtype=np.uint16)
            for number, part in enumerate(np.split(tokens, SHARDS)):
                data.write_shard(directory / f"random_train_{number:06d}.bin", part)
            made[shard_tokens] = directory, tokens
        return made[shard_tokens]

    return write


SIZES = [case("4M-tokens", is_quick=True), case("100M-tokens", is_quick=False)]
SHARD_TOKENS = {"4M-tokens": QUICK_TOKENS, "100M-tokens": FULL_TOKENS}


@pytest.mark.parametrize("size", SIZES)
def test_open(size: str, written, measure):
    directory, tokens = written(SHARD_TOKENS[size])

    def check(stream: data.TokenStream) -> None:
        assert len(stream) == len(tokens)
        assert np.array_equal(stream.read(0, len(tokens)), tokens), "the stream must be the tokens that were written"

    measure(lambda: data.TokenStream.open(directory, "train", VOCAB_SIZE), check)


def check_batches(batches: data.Batches, tokens: np.ndarray) -> None:
    """Raises AssertionError unless an epoch has every window once and a step's batches are slices of the tokens."""
    T, S = batches.context, batches.sequences
    steps = batches.num_windows // S
    order = data.step_windows(0, steps * S, batches.num_windows, batches.seed).reshape(steps, S)
    assert len(np.unique(order)) == steps * S, "no window may come twice in an epoch"
    for step in (0, steps - 1):
        got = batches.at(step)
        inputs, targets = (np.concatenate([pair[part].numpy() for pair in got]) for part in (0, 1))
        for index, row, target in zip(order[step], inputs, targets, strict=True):
            window = tokens[index * T : (index + 1) * T + 1]
            assert np.array_equal(row, window[:-1]), f"window {index} must be a slice of the tokens"
            assert np.array_equal(target, window[1:]), f"targets of window {index} must be one token further on"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", STEPS)
def test_batches(preset: str, size: str, written, measure):
    directory, tokens = written(SHARD_TOKENS[size])
    T, B, accumulation = STEPS[preset]
    stream = data.TokenStream.open(directory, "train", VOCAB_SIZE)
    batches = data.Batches(stream, T, B, accumulation, seed=1, pin=ON_GPU)
    steps = count()
    try:
        measure(
            lambda: batches.at(next(steps)),
            lambda first: check_batches(batches, tokens),
            tokens=T * batches.sequences,
        )
    finally:
        batches.close()
