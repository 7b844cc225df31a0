"""Checks of a Triton op's tensors: dtype, device, and the error message for others."""

import pytest
import torch
from tolerances import DEVICE
from torch.torch_version import TorchVersion

import kernels.launch
from kernels.attention import attention_triton
from kernels.cross_entropy import linear_cross_entropy_triton
from kernels.gelu import bias_gelu_triton, gelu_triton
from kernels.launch import INTERPRETED
from kernels.layer_norm import add_layer_norm_triton, layer_norm_triton

TARGETS = torch.zeros(3, dtype=torch.int64, device=DEVICE)


def cross_entropy(hidden, weight):
    return linear_cross_entropy_triton(hidden, weight, TARGETS.to(hidden.device))


OPS = {
    "attention": (attention_triton, {"qkv": (1, 2, 3, 1, 16)}),
    "layer_norm": (layer_norm_triton, {"x": (3, 4), "weight": (4,), "bias": (4,)}),
    "add_layer_norm": (add_layer_norm_triton, {"x": (3, 4), "residual": (3, 4), "weight": (4,), "bias": (4,)}),
    "gelu": (gelu_triton, {"x": (3, 4)}),
    "bias_gelu": (bias_gelu_triton, {"x": (3, 4), "bias": (4,)}),
    "linear_cross_entropy": (cross_entropy, {"hidden": (3, 4), "weight": (5, 4)}),
}
TENSORS = [pytest.param(op, name, id=f"{op} {name}") for op, (_, shapes) in OPS.items() for name in shapes]


def call(op, *, dtype=torch.float32, device=DEVICE, **other_dtypes):
    function, shapes = OPS[op]
    tensors = [torch.zeros(shape, dtype=other_dtypes.get(name, dtype), device=device) for name, shape in shapes.items()]
    return function(*tensors)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_float64_is_not_for_triton(op, name):
    with pytest.raises(ValueError, match=f"^{op}: .* must .*, got torch.float"):
        call(op, **{name: torch.float64})
    with pytest.raises(ValueError, match=f"^{op}: .* must be float32, bfloat16 or float16 for Triton, got torch.float"):
        call(op, dtype=torch.float64)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_integers_are_rejected(op, name):
    with pytest.raises(ValueError, match=f"^{op}: {name} must .*float32.*, got torch.int32$"):
        call(op, **{name: torch.int32})


@pytest.mark.skipif(not INTERPRETED, reason="bfloat16 is right where kernels run natively")
@pytest.mark.parametrize("op", OPS)
def test_bfloat16_in_the_interpreter_is_rejected_and_the_sentence_says_why(op):
    with pytest.raises(
        ValueError,
        match=f"^{op}: .* must be float32 or float16 under TRITON_INTERPRET=1, which computes bfloat16 wrongly, got ",
    ):
        call(op, dtype=torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", OPS)
def test_a_device_without_triton_is_rejected(op, device, monkeypatch):
    monkeypatch.setattr(kernels.launch, "INTERPRETED", False)
    with pytest.raises(
        ValueError,
        match=f"^{op}: .* must be on a CUDA device, or on the CPU under TRITON_INTERPRET=1, got {device}$",
    ):
        call(op, device=device)


@pytest.mark.parametrize("op", OPS)
def test_without_triton_the_sentence_says_so(op, monkeypatch):
    monkeypatch.setattr(kernels.launch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=f"^{op}: Triton must be installed .it comes for Linux., got none$"):
        call(op)


@pytest.mark.parametrize(("version", "is_short"), [("2.11.0", True), ("2.12.1", True), ("2.13.0", False)])
def test_an_old_inductor_does_not_spell_out_the_graph_before_an_op(version, is_short, monkeypatch):
    from torch._inductor.exc import OperatorIssue

    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    spelled_out = staticmethod(lambda target, args, kwargs: f"{target} {args}")
    monkeypatch.setattr(OperatorIssue, "operator_str", spelled_out)
    kernels.launch._shorten_operator_strings.__wrapped__()
    text = OperatorIssue.operator_str("gpt2.gelu", ["the whole graph"], {})
    assert "gpt2.gelu" in text
    assert ("the whole graph" not in text) == is_short
