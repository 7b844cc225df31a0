"""Whole model on Triton: losses and gradients equal PyTorch's, also compiled, recomputed and distributed."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tolerances import (
    DEVICE,
    assert_bitwise,
    assert_same,
    poisoned_memory,  # noqa: F401  (a fixture)
)
from torch.utils.checkpoint import checkpoint

from model import GPT2, GPT2Config

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def build(backend="triton", **changes) -> GPT2:
    """Model with the same weights for every backend."""
    torch.manual_seed(0)
    model = GPT2(replace(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=257), **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # zeros and ones could hide a mistake
                parameter += 0.1 * torch.randn(parameter.shape)
    model.to(DEVICE).configure(backend, torch.float32)
    return model


def batch(T=9, seed=1):
    """tokens and targets, (2, T); two targets are ignored."""
    tokens = torch.randint(257, (2, T + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, :2] = -100
    return tokens[:, :-1].to(DEVICE), targets.to(DEVICE)


def loss_and_gradients(run, model, T=9):
    """Loss by `run`, the model or its compiled form, then the gradient of every parameter."""
    loss = run(*batch(T))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("T", [9, pytest.param(32, marks=pytest.mark.slow)])
def test_loss_and_every_gradient_equal_those_of_pytorch(T):
    model, plain = build(), build("torch")
    assert_same(loss_and_gradients(model, model, T), loss_and_gradients(plain, plain, T))


@pytest.mark.parametrize("backend", [pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"])
def test_compiles_fullgraph_and_equals_eager(backend):
    torch._dynamo.reset()
    model = build(n_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(loss_and_gradients(compiled, model), loss_and_gradients(model, model))


def test_recomputed_blocks_give_the_same_gradients():
    model, calls = build(dropout=0.2, n_layer=1), []
    attention = model.ops.attention
    model.configure(
        replace(model.ops, attention=lambda qkv, **options: calls.append(1) or attention(qkv, **options)), torch.float32
    )
    torch.manual_seed(1)
    expected = loss_and_gradients(model, model)
    for block in model.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(1)
    assert_bitwise(loss_and_gradients(model, model), expected)
    assert len(calls) == 1 + 2  # the block once, then twice


@pytest.mark.slow
def test_twenty_steps_have_the_losses_of_pytorch():
    T = 32 if DEVICE.type == "cuda" else 5  # the interpreter takes half a minute for these

    def losses(backend):
        model = build(backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(20):
            loss = model(*batch(T, seed=step % 2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    ours, theirs = torch.stack([*losses("triton")]), torch.stack([*losses("torch")])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert theirs[-2:].mean() < theirs[:2].mean() - 1.0  # it did learn


@pytest.mark.slow
def test_two_processes_average_the_gradients_replicated_and_sharded():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # tolerances.py is in tests/
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if torch.cuda.device_count() < 2:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    script = str(Path(__file__).with_name("kernel_replicas.py"))
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "gradient is the mean over both ranks: True" in done.stdout
    assert "so it is where parameters are sharded: True" in done.stdout
