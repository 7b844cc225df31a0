"""Validation loss: the same for any batch size and any number of ranks, without side effects."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import evaluation
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.tokens.shards import TokenStream
from model.gpt2 import GPT2, GPT2Config

MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97, dropout=0.3)
CONFIG = TrainConfig(model=MODEL, eval_tokens=16 * 37)
T = CONFIG.sequence_length
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def stream(num_tokens: int) -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, 97, num_tokens).astype(np.uint16)
    return TokenStream([Path("memory")], [tokens], 97)


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(MODEL)


@settings(deadline=None, max_examples=100)
@given(num_tokens=st.integers(5, 5000), eval_tokens=st.integers(1, 6000))
def test_windows_are_distinct_and_evenly_spread(num_tokens, eval_tokens):
    text, config = stream(num_tokens), dataclasses.replace(CONFIG, context=4, eval_tokens=eval_tokens)
    chosen, present = evaluation.windows(text, config.sequence_length, config.eval_tokens), text.num_windows(4)
    assert len(chosen) == min(present, max(1, eval_tokens // 4))
    assert chosen[0] == 0
    assert chosen[-1] < present
    gaps = np.diff(chosen, append=present)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_too_little_text_says_what_is_needed():
    with pytest.raises(BadInput, match="must hold at least 17 tokens, got 16; prepare more text"):
        evaluation.windows(stream(16), T, CONFIG.eval_tokens)
    assert evaluation.windows(stream(17), T, CONFIG.eval_tokens).tolist() == [0]


def test_the_loss_is_the_mean_over_windows_one_by_one(model, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 16 * 5)  # 37 windows: seven batches of five and one of two
    text = stream(5000)
    chosen = evaluation.windows(text, T, CONFIG.eval_tokens)
    model.eval()
    one_by_one = [model(w[:, :-1], w[:, 1:]).item() for w in (text.windows(chosen[i : i + 1], 16) for i in range(37))]
    assert evaluation.mean_loss(model, text, chosen, T, ALONE) == pytest.approx(np.mean(one_by_one), rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 8, 16])
def test_any_number_of_ranks_gives_the_same_bits(model, monkeypatch, world_size):
    """Ranks run one after the other: each adds its part, and the last gets the full sum."""
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 16 * 5)
    text = stream(5000)
    chosen = evaluation.windows(text, T, CONFIG.eval_tokens)
    alone = evaluation.mean_loss(model, text, chosen, T, ALONE)
    parts = []

    def collect(self, value):
        parts.append(value)
        return torch.stack(parts).sum(0)

    monkeypatch.setattr(Ranks, "sum", collect)
    for rank in range(world_size):
        loss = evaluation.mean_loss(model, text, chosen, T, Ranks(rank, rank, world_size, torch.device("cpu")))
    assert loss.hex() == alone.hex()
    losses = torch.stack(parts)[:, :-1]  # the last: whether this rank was interrupted
    assert ((losses != 0).sum(0) == 1).all()  # no batch twice, none left out
    assert evaluation.mean_loss(model, text, chosen, T, ALONE, is_interrupted=lambda: True) is None


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_everything_as_it_was(model, training):
    text = stream(2000)
    chosen = evaluation.windows(text, T, CONFIG.eval_tokens)
    model.train(training)
    model.h[0].train(not training)
    modes = [module.training for module in model.modules()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    first = evaluation.mean_loss(model, text, chosen, T, ALONE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert evaluation.mean_loss(model, text, chosen, T, ALONE) == first
