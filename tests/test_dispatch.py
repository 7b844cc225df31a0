"""Which implementation runs, and whether the reason given for it is the true one."""

import types

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import MODULES, Choice, Ops, select

OPS = ("attention", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "linear_cross_entropy")


@pytest.fixture
def kernels_for_all(monkeypatch) -> dict[str, types.SimpleNamespace]:
    """Every op with a Triton kernel, a stand-in that is only ever chosen and never run."""
    modules = {
        op: types.SimpleNamespace(**{f"{op}_torch": f"{op} on torch", f"{op}_triton": f"{op} on triton"}) for op in OPS
    }
    monkeypatch.setattr(dispatch, "MODULES", modules)
    return modules


def test_every_op_has_a_definition_and_a_pytorch_implementation():
    assert tuple(MODULES) == OPS
    for op, module in MODULES.items():
        assert callable(getattr(module, f"{op}_reference"))
        assert callable(getattr(module, f"{op}_torch"))


def test_torch_takes_pytorch_for_every_op():
    ops = select("torch", "cpu", torch.float32, 64)
    for op, module in MODULES.items():
        assert getattr(ops, op) is getattr(module, f"{op}_torch")
    assert ops.choices == tuple(Choice(op, "torch", "asked for") for op in OPS)


def test_torch_is_taken_even_where_triton_can_run(kernels_for_all):
    ops = select("torch", "cuda", torch.bfloat16, 64)
    assert ops.attention == "attention on torch"
    assert {choice.implementation for choice in ops.choices} == {"torch"}


def test_auto_on_a_cpu_takes_pytorch_and_says_why():
    ops = select("auto", torch.device("cpu"), torch.float32, 64)
    for op, choice in zip(OPS, ops.choices, strict=True):
        assert getattr(ops, op) is getattr(MODULES[op], f"{op}_torch")
        has_kernel = hasattr(MODULES[op], f"{op}_triton")
        assert ("the tensors are on cpu" if has_kernel else "no Triton kernel") in choice.reason


def test_auto_takes_triton_where_it_can_run(kernels_for_all):
    ops = select("auto", "cuda", torch.bfloat16, 64)
    assert [getattr(ops, op) for op in OPS] == [f"{op} on triton" for op in OPS]
    assert {choice.reason for choice in ops.choices} == {"runs on cuda"}


OBSTACLES = [
    pytest.param("cpu", torch.float32, 64, OPS, "no CUDA device, the tensors are on cpu", id="a CPU"),
    pytest.param("cuda", torch.float64, 64, OPS, "not float64", id="float64"),
    pytest.param("cuda", torch.bfloat16, 8, ("attention",), "head_dim 8 is outside 16 to 256", id="narrow heads"),
    pytest.param("cuda", torch.bfloat16, 257, ("attention",), "head_dim 257 is outside 16 to 256", id="wide heads"),
]


@pytest.mark.parametrize(("device", "dtype", "head_dim", "stopped", "reason"), OBSTACLES)
def test_auto_goes_around_an_obstacle_and_names_it(kernels_for_all, device, dtype, head_dim, stopped, reason):
    for choice in select("auto", device, dtype, head_dim).choices:
        assert choice.implementation == ("torch" if choice.op in stopped else "triton")
        assert (reason in choice.reason) == (choice.op in stopped)


@pytest.mark.parametrize(("device", "dtype", "head_dim", "stopped", "reason"), OBSTACLES)
def test_triton_where_it_cannot_run_is_an_error_with_the_reason(
    kernels_for_all, device, dtype, head_dim, stopped, reason
):
    with pytest.raises(
        ValueError, match=f'the triton backend must .*{stopped[0]} cannot: .*{reason}.*use "auto" or "torch"'
    ):
        select("triton", device, dtype, head_dim)


@pytest.mark.parametrize("head_dim", [16, 80, 256], ids=["narrowest", "no power of two", "widest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_takes_every_contracted_size_and_dtype(kernels_for_all, dtype, head_dim):
    assert select("triton", "cuda", dtype, head_dim).attention == "attention on triton"


def test_an_op_without_a_kernel_is_named(kernels_for_all):
    del kernels_for_all["gelu"].gelu_triton
    with pytest.raises(ValueError, match="gelu cannot: this version has no Triton kernel for it"):
        select("triton", "cuda", torch.bfloat16, 64)
    assert [c.op for c in select("auto", "cuda", torch.bfloat16, 64).choices if c.implementation == "torch"] == ["gelu"]


def test_triton_on_a_cpu_is_an_error_with_the_shipped_ops():
    with pytest.raises(
        ValueError, match="kernels: the triton backend must be able to run every op, attention cannot: "
    ):
        select("triton", "cpu", torch.float32, 64)


@pytest.mark.parametrize("backend", ["cuda", "Triton", "", None], ids=repr)
def test_an_unknown_backend_is_rejected(backend):
    with pytest.raises(ValueError, match=f'the backend must be "auto", "triton" or "torch", got {backend!r}'):
        select(backend, "cpu", torch.float32, 64)


def test_the_explanation_is_one_line_per_op():
    lines = select("auto", "cpu", torch.float32, 64).explain().splitlines()
    assert [line.split()[0] for line in lines] == list(OPS)
    assert all(line.split()[1] == "torch:" and len(line.split(": ", 1)[1]) > 5 for line in lines)


def test_ops_name_the_same_ops_as_the_modules():
    assert tuple(name for name in Ops.__dataclass_fields__ if name != "choices") == tuple(MODULES)
