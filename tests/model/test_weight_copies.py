"""Weights cast once per step: the bits of a cast in each forward, and never a stale copy."""

import contextlib

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from engine import optim, step
from engine.config import OptimConfig
from engine.distributed import Ranks
from engine.health.timing import Clock
from model.gpt2 import GPT2, GPT2Config, cast_once

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=200)
TOKENS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(2))
MICRO_BATCHES = torch.randint(97, (3, 2, 2, 17), generator=torch.Generator().manual_seed(1))


def make(dtype: torch.dtype = torch.bfloat16, **options) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    model.configure("torch", dtype, **options)
    return model


class Casts(TorchDispatchMode):
    """Shapes of the float32 tensors that are cast."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def trained(model: GPT2, runs, context) -> list[torch.Tensor]:
    """Losses and gradients of three steps of two micro-batches."""
    optimizer, seen = optim.build(model, OptimConfig(lr=1e-2)), []
    for micro_batches in MICRO_BATCHES:
        with context(runs):
            for batch in micro_batches:
                loss = runs(batch[:, :-1], batch[:, 1:])
                loss.backward()
                seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    assert all(map(torch.equal, left, right))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_losses_and_gradients_have_the_bits_of_a_cast_in_each_forward(recompute):
    expected, model = make(), make(recompute=recompute)
    assert_same(trained(model, model, cast_once), trained(expected, expected, contextlib.nullcontext))


def test_the_compiled_model_is_one_graph_with_the_same_bits():
    graphs, expected, model = [], make(), make()
    torch._dynamo.reset()
    runs = torch.compile(
        model, fullgraph=True, dynamic=False, backend=lambda *graph: graphs.append(graph) or aot_eager(*graph)
    )
    assert_same(trained(model, runs, cast_once), trained(expected, expected, contextlib.nullcontext))
    assert len(graphs) == 1


@pytest.mark.parametrize(("dtype", "saved"), [(torch.bfloat16, 7), (torch.float32, 0)], ids=["bf16", "fp32"])
def test_a_forward_casts_no_linear_layer(dtype, saved):
    """Of a block's four layers: all weights, and the biases that F.linear adds."""
    model, casts = make(dtype), []
    for context in (contextlib.nullcontext, cast_once):
        with context(model), Casts() as seen, torch.no_grad():
            model(TOKENS)
        casts.append(seen.shapes)
    assert len(casts[0]) - len(casts[1]) == saved
    assert not {(96, 32), (32, 32), (128, 32), (32, 128), (96,)} & set(casts[1])


def test_a_weight_changed_outside_is_seen_inside_and_outside():
    model = make()
    with cast_once(model), torch.no_grad():
        before = model(TOKENS)
    with torch.no_grad():
        model.h[0].mlp.c_proj.weight += 1.0
        outside = model(TOKENS)
        with cast_once(model):
            assert torch.equal(model(TOKENS), outside)
    assert not torch.equal(before, outside)


def test_a_failed_forward_leaves_no_copy_in_use():
    model = make()
    with pytest.raises(ValueError, match="at most 16 tokens"), cast_once(model):
        model(torch.zeros(1, 17, dtype=torch.int64))
    assert not any(module.uses_copies for module in model.modules() if hasattr(module, "uses_copies"))


def test_copies_are_no_part_of_the_checkpoint():
    model, expected = make(), make()
    with cast_once(model):
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert not list(model.buffers())


def test_a_step_of_the_engine_makes_the_same_update(monkeypatch):
    updates = []
    for context in (cast_once, lambda model: contextlib.nullcontext()):
        monkeypatch.setattr(step, "cast_once", context)
        model, cpu = make(), torch.device("cpu")
        optimizer, scaler = optim.build(model, OptimConfig(lr=1e-2)), torch.amp.GradScaler("cpu", enabled=False)
        update = step.Step(model, optimizer, scaler, step.Guard(cpu), 1, 1.0, Ranks(0, 0, 1, cpu), Clock(cpu))
        with Casts() as seen:
            for index, batches in enumerate(MICRO_BATCHES):
                update(index, [(batch[:, :-1], batch[:, 1:]) for batch in batches], 1e-2)
        assert ((96, 32) in seen.shapes) == (context is not cast_once)
        updates.append([p.detach() for p in model.parameters()])
    assert_same(*updates)
