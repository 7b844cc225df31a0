"""Recomputed activations: the same bits as saved ones, with less memory."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.autograd.graph import saved_tensors_hooks

from engine.planning.memory import BLOCK_GRADIENTS
from model import GPT2, GPT2Config
from model.gpt2 import cast_once
from model.presets import STORED_WIDTHS

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


class Traced(Exception):
    """The graphs are made; they are not run."""


def widths_at_once(graph: torch.fx.Graph, width: int) -> float:
    """The most that a backward graph holds at once, in activations of one width; without its parameters."""
    nodes, owner, last = list(graph.nodes), {}, {}
    for place, node in enumerate(nodes):
        is_view = node.op == "call_function" and getattr(node.target, "is_view", False)
        owner[node] = owner[node.all_input_nodes[0]] if is_view else node
        for used in (node, *node.all_input_nodes):
            last[owner[used]] = place
    bytes_of = {
        node: node.meta["val"].nbytes
        for node in set(owner.values())
        if isinstance(node.meta.get("val"), Tensor) and not node.name.startswith("primals")
    }
    held = sum(size for node, size in bytes_of.items() if node.op == "placeholder")
    most = held
    for place, node in enumerate(nodes):
        held += bytes_of.get(node, 0) if node.op != "placeholder" and owner[node] is node else 0
        most = max(most, held)
        ended = {owner[used] for used in (node, *node.all_input_nodes) if last[owner[used]] == place}
        held -= sum(bytes_of.get(each, 0) for each in ended)
    return most / width


def test_a_compiled_backward_recomputes_one_block_at_a_time():
    """As Inductor partitions it, with opaque ops: the fault was that it recomputed all blocks first."""
    L, shape = 2, (64, 128)
    model = GPT2(GPT2Config(L, 4, 64, 128, 257))
    model.configure("triton", torch.float16, "block")
    found = []

    def partition(joint, *args, **options):
        joint_graph_passes(joint)
        found.append(min_cut_rematerialization_partition(joint, *args, **options)[1].graph)
        raise Traced

    tokens = torch.zeros(shape, dtype=torch.int64)
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, partition_fn=partition)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Traced"), cast_once(model):
        torch.compile(model, backend=backend, dynamic=False)(tokens, tokens)
    stored = L * STORED_WIDTHS["block"] + STORED_WIDTHS["none"] + BLOCK_GRADIENTS
    assert widths_at_once(found[0], 64 * 128 * 64 * 2) < stored
