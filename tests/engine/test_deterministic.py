"""--deterministic: PyTorch's deterministic mode while a run steps, and code by Inductor that has no atomics."""

import contextlib
import os

import pytest
import torch
from conftest import SMALL
from runs import assert_same_run, run
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from engine.device import deterministic
from engine.step import Step
from model.gpt2 import GPT2, GPT2Config


def modes() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        inductor.deterministic,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture
def seen(monkeypatch) -> list[tuple]:
    """The modes at each update."""
    found, call = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, *args: found.append(modes()) or call(self, *args))
    return found


def train(out, shards, *flags: str) -> int:
    return run(
        "train", *SMALL, "--num-steps", "2", "--eval-every", "None", "--data", str(shards), "--out", str(out), *flags
    )


def test_a_deterministic_run_steps_in_pytorchs_mode_and_twice_to_the_same_bits(shards, tmp_path, seen):
    before = modes()
    for out in ("one", "two"):
        assert train(tmp_path / out, shards, "--deterministic") == 0
        assert modes() == before
    assert seen == 4 * [(True, False, True, ":4096:8")]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_without_the_flag_nothing_is_changed():
    before = modes()
    with deterministic(False):
        assert modes() == before == (False, True, False, None)


def test_a_failure_inside_puts_the_modes_back():
    before = modes()[:3]
    with pytest.raises(ZeroDivisionError), deterministic(True):
        raise ZeroDivisionError
    assert modes()[:3] == before


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_op_runs_in_the_mode(backend):
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=16, n_positions=8, vocab_size=11, dropout=0.1))
    try:
        model.configure(backend, torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    tokens = torch.arange(8)[None]
    with deterministic(True):
        model(tokens, tokens).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def code_of(function, *inputs) -> str:
    """Inductor's code for a function, which is not compiled any further."""
    found = []

    def save(code):
        found.append(code)
        raise NotImplementedError

    with pytest.MonkeyPatch.context() as monkeypatch, inductor.patch({"cpp.threads": 2, "fx_graph_cache": False}):
        monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(save))
        with contextlib.suppress(Exception):
            torch.compile(function)(*inputs)
    torch._dynamo.reset()
    return found[0]


@pytest.mark.parametrize("is_asked", [False, True], ids=["by default", "deterministic"])
def test_inductor_adds_up_an_embeddings_gradient_with_atomics_only_without_the_flag(is_asked):
    with deterministic(is_asked):
        code = code_of(
            lambda dy, tokens: torch.ops.aten.embedding_dense_backward(dy, tokens, 7, -1, False),
            torch.ones(5, 3),
            torch.tensor([1, 2, 2, 2, 0]),
        )
    assert ("atomic_add" in code) == (not is_asked)
    assert ("aten.index_put_" in code) == is_asked
