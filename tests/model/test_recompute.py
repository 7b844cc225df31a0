"""Recomputed activations: the same bits as saved ones, with less memory."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model import GPT2, GPT2Config

TOKENS = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(recompute: str, dropout: float, compiled: bool) -> tuple[list[Tensor], int]:
    """Loss and every gradient of the same model, and the bytes saved for the backward pass."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(2, 2, 32, 16, 257, dropout=dropout))
    model.configure("torch", torch.float32, recompute)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else model
    kept = []
    torch.manual_seed(1)
    with saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        loss = run(TOKENS[:, :-1], TOKENS[:, 1:])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), *gradients], sum(kept)


@pytest.mark.parametrize(
    ("dropout", "compiled"), [(0.0, False), (0.1, False), pytest.param(0.1, True, marks=pytest.mark.slow)]
)
def test_recomputing_changes_no_bit_and_keeps_less(dropout, compiled):
    expected, most = loss_and_gradients("none", dropout, compiled)
    attention, less = loss_and_gradients("attention", dropout, compiled)
    block, least = loss_and_gradients("block", dropout, compiled)
    for got in (attention, block):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    assert most > less > least


@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_nothing_is_recomputed_outside_training(recompute, monkeypatch):
    calls = []
    monkeypatch.setattr("model.gpt2.checkpoint", lambda function, *args, **_: calls.append(1) or function(*args))
    model = GPT2(GPT2Config(2, 2, 32, 16, 257))
    model.configure("torch", torch.float32, recompute)
    with torch.no_grad():
        model(TOKENS[:, :-1])
    model.eval()(TOKENS[:, :-1])
    assert calls == []
    model.train()(TOKENS[:, :-1])
    assert len(calls) == 2
