"""Batches: the order is a permutation, and the same on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadInput
from engine.tokens.batches import Batches, permute, windows_at
from engine.tokens.shards import TokenStream

quick = settings(deadline=None, max_examples=60)


def counting_stream(num_tokens: int) -> TokenStream:
    """Tokens 0, 1, 2, ..., so that a window shows where it came from."""
    return TokenStream([Path("memory")], [np.arange(num_tokens, dtype=np.uint16)], 1 << 16)


def batches(
    num_tokens: int, micro_batch_size: int = 1, accumulation: int = 1, world_size: int = 1, **changes
) -> Batches:
    return Batches(
        counting_stream(num_tokens),
        context=4,
        tokens_per_step=4 * micro_batch_size * accumulation * world_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        **changes,
    )


def first_tokens(micro_batches) -> list[int]:
    """The first token of every sequence: with counting_stream, window number * context."""
    return [token for tokens, _ in micro_batches for token in tokens[:, 0].tolist()]


def test_permute_is_a_bijection_of_every_small_range():
    for size in range(1, 2001):
        assert np.array_equal(np.sort(permute(np.arange(size), size, 1, size)), np.arange(size)), size


@quick
@given(size=st.integers(1, 2**62), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6), start=st.integers(0))
def test_permute_keeps_samples_of_a_large_range_apart_and_inside(size, seed, epoch, start):
    count = min(size, 1000)
    indices = start % (size - count + 1) + np.arange(count)
    sent = permute(indices, size, seed, epoch)
    assert sent.dtype == np.int64
    assert len(set(sent.tolist())) == count
    assert 0 <= sent.min()
    assert sent.max() < size


@quick
@given(size=st.integers(20, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 100))
def test_permute_differs_by_seed_and_epoch(size, seed, epoch):
    order = permute(np.arange(size), size, seed, epoch)
    assert not np.array_equal(order, permute(np.arange(size), size, seed + 1, epoch))
    assert not np.array_equal(order, permute(np.arange(size), size, seed, epoch + 1))
    assert not np.array_equal(order, np.arange(size))


def test_permute_does_not_depend_on_which_indices_are_asked_together():
    whole = permute(np.arange(997), 997, 5, 2)
    assert [int(permute(np.array([i]), 997, 5, 2)[0]) for i in range(997)] == whole.tolist()


def test_permute_leaves_no_order_behind():
    order = permute(np.arange(10_000), 10_000, 1, 0)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05  # 5 standard deviations
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.03  # 0.02 by chance


def test_the_order_of_a_seed_is_the_same_in_every_version():
    assert permute(np.arange(12), 12, 1, 0).tolist() == [6, 11, 8, 2, 4, 0, 3, 7, 9, 10, 5, 1]


@quick
@given(
    world_size=st.sampled_from([1, 2, 3, 4]),
    accumulation=st.integers(1, 3),
    micro_batch_size=st.integers(1, 3),
    extra=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_every_window_is_seen_once_per_epoch(world_size, accumulation, micro_batch_size, extra, seed):
    sequences = world_size * accumulation * micro_batch_size
    num_windows = sequences + extra
    ranks = [
        batches(
            num_windows * 4 + 1,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert ranks[0].num_windows == num_windows
    seen = []
    for step in range(-(-2 * num_windows // sequences)):
        in_step = np.array([rank._load(step) for rank in ranks], dtype=object)
        assert in_step.shape[:2] == (world_size, accumulation)
        for micro in range(accumulation):  # windows go to all ranks of one micro-batch, then of the next
            for rank in range(world_size):
                seen += (in_step[rank][micro][0][:, 0] // 4).tolist()
    for epoch in (seen[:num_windows], seen[num_windows : 2 * num_windows]):
        assert sorted(epoch) == list(range(num_windows))
    for rank in ranks:
        rank.close()


@quick
@given(step=st.integers(0, 50), num_windows=st.integers(16, 200), seed=st.integers(0, 2**32))
def test_any_number_of_ranks_sees_the_same_step(step, num_windows, seed):
    steps = []
    for world_size, accumulation, micro_batch_size in (
        (1, 1, 16),
        (1, 4, 4),
        (2, 2, 4),
        (2, 8, 1),
        (4, 1, 4),
        (4, 4, 1),
    ):
        seen = []
        for rank in range(world_size):
            part = batches(
                num_windows * 4 + 1,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                seed=seed,
                rank=rank,
                world_size=world_size,
            )
            seen += first_tokens(part._load(step))
            part.close()
        steps.append(sorted(seen))
    assert all(seen == steps[0] for seen in steps)
    assert len(steps[0]) == 16


def test_a_step_does_not_depend_on_the_steps_before_it():
    walked, jumped = batches(401, micro_batch_size=3, accumulation=2), batches(401, micro_batch_size=3, accumulation=2)
    history = [walked.at(step) for step in range(40)]
    for step in (39, 0, 17, 17, 18, 5):
        for (tokens, targets), (t, y) in zip(jumped.at(step), history[step], strict=True):
            assert torch.equal(tokens, t)
            assert torch.equal(targets, y)
    walked.close(), jumped.close()


def test_targets_are_the_tokens_one_further_on():
    part = batches(401, micro_batch_size=3, accumulation=2)
    for tokens, targets in part.at(3):
        assert tokens.shape == targets.shape == (3, 4)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, tokens + 1)
        assert (tokens[:, 0] % 4 == 0).all()
        assert tokens.is_contiguous()
        assert targets.is_contiguous()
    part.close()


def test_an_epoch_may_end_inside_a_step():
    flat = [window for step in range(3) for window in windows_at(np.arange(4 * step, 4 * step + 4), 6, 9)]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert flat[:6] == permute(np.arange(6), 6, 9, 0).tolist()
    assert flat[6:] == permute(np.arange(6), 6, 9, 1).tolist()


def test_late_steps_of_a_long_run_are_in_range():
    windows = windows_at(10**12 * 512 + np.arange(512), 10_000_019, 2**40)
    assert windows.min() >= 0
    assert windows.max() < 10_000_019
    assert len(set(windows.tolist())) == 512


@pytest.mark.parametrize(("num_tokens", "windows"), [(17, 4), (16, 3), (20, 4), (21, 5)])
def test_windows_are_all_that_have_targets(num_tokens, windows):
    part = batches(num_tokens, micro_batch_size=windows)
    assert part.num_windows == windows
    assert sorted(first_tokens(part.at(0))) == [4 * i for i in range(windows)]
    part.close()


def test_a_corpus_smaller_than_a_step_says_what_to_lower():
    with pytest.raises(
        BadInput,
        match=r"needs 6 sequences of 4 tokens, got a corpus of 5 \(21 tokens\).*--tokens-per-step to at most 20",
    ):
        batches(21, micro_batch_size=3, accumulation=2)
    batches(25, micro_batch_size=3, accumulation=2).close()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tokens_per_step": 30}, r"must be a multiple of .* = 4 \* 2 \* 2 = 16, got 30"),
        ({"tokens_per_step": 0}, "multiple of .*, got 0"),
        ({"rank": 2}, "rank below world_size, got 4, 2, 2 and rank 2"),
        ({"micro_batch_size": 0}, "at least 1"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_sizes_that_make_no_batches_are_refused(wrong, sentence):
    sizes = {"context": 4, "tokens_per_step": 32, "micro_batch_size": 2, "world_size": 2}
    Batches(counting_stream(100), **sizes).close()
    with pytest.raises(BadInput, match=sentence):
        Batches(counting_stream(100), **sizes | wrong)


def test_batches_take_names_and_no_positions():
    with pytest.raises(TypeError, match="positional"):
        Batches(counting_stream(100), 4, 32, 2)


def test_a_step_that_is_none_and_a_step_after_close_are_sentences():
    part = Batches(counting_stream(100), context=4, tokens_per_step=20, micro_batch_size=5)
    for step in (-1, 1.5, "1"):
        with pytest.raises(BadInput, match=f"must be an integer from 0, got {step!r}"):
            part.at(step)
    part.at(np.int64(0))
    part.close()
    with pytest.raises(BadInput, match="must be called before close, got step 1 after it"):
        part.at(1)


def test_an_error_of_the_reader_surfaces_where_its_step_is_asked_for():
    tokens = np.zeros(64, dtype=np.uint16)
    stream = TokenStream([Path("a shard")], [tokens], 100)
    part = Batches(stream, context=4, tokens_per_step=20, micro_batch_size=5)
    part.at(0)
    tokens[:] = 100  # damaged after it was opened
    part.at(1) if part._ahead[1].exception() is None else None
    for _ in range(2):
        with pytest.raises(BadInput, match="a shard: every token must be below the vocabulary size 100, got 100"):
            part.at(2)
    tokens[:] = 0
    assert first_tokens(part.at(2)) == [0] * 5
    part.close()
