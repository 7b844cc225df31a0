"""Accuracy of the Triton ops: the shipped ones are right, and what is wrong is named with its error."""

import math

import pytest
import torch
from tolerances import DEVICE

from kernels import accuracy, attention, layer_norm
from kernels.cases import Sizes
from kernels.dispatch import MODULES

SIZES = Sizes(B=2, T=5, H=1, D=16, V=61, Vp=64)
FP32 = torch.float32


def failure(op: str, dtype: torch.dtype = FP32) -> str | None:
    return accuracy.failure(op, SIZES, dtype, FP32, DEVICE)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("dtype", [FP32, torch.float16], ids=["fp32", "fp16"])
def test_the_shipped_op_passes(op, dtype):
    assert failure(op, dtype) is None


def test_parameters_stay_float32_beside_low_precision_activations():
    for op in MODULES:
        inputs = accuracy.inputs_as_in_the_model(op, SIZES, torch.float16, FP32, DEVICE)
        dtypes = [t.dtype for t in inputs if t.is_floating_point()]
        assert dtypes[0] == torch.float16
        expected = {"layer_norm": 2, "add_layer_norm": 2, "bias_gelu": 1, "linear_cross_entropy": 1}
        assert dtypes.count(FP32) == expected.get(op, 0)
        if op == "linear_cross_entropy":
            assert (inputs[2] == -100).sum() == 2


def test_a_wrong_gradient_is_named_with_its_error(monkeypatch):
    right, dk = attention._attention_backward, torch.tensor([1.0, 1.5, 1.0], device=DEVICE).view(3, 1, 1)
    monkeypatch.setattr(attention, "_attention_backward", lambda *inputs: right(*inputs) * dk)
    why = failure("attention")
    assert why.startswith("its self-check failed: dqkv is off by 2.")
    assert why.endswith("at most 1.0e-05 is allowed")


def test_an_element_that_is_not_written_is_found(monkeypatch):
    monkeypatch.setattr(layer_norm, "layer_norm_triton", lambda x, weight, bias: layer_norm.layer_norm_torch(
        x, weight, bias) + torch.empty(1, device=x.device) * 0.0)  # fmt: skip
    assert failure("layer_norm").startswith("its self-check failed: ")


def test_bits_that_change_are_found(monkeypatch):
    def noisy(x):
        return torch.nn.functional.gelu(x, approximate="tanh") * (1 + 1e-7 * torch.rand_like(x))

    monkeypatch.setattr(MODULES["gelu"], "gelu_triton", noisy)
    assert failure("gelu") == "its self-check failed: two runs must give the same bits, they do not"


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch):
    def refuse(x, bias):
        raise NotImplementedError("at 3:4:\n  tl.dot(q, k)\n")

    monkeypatch.setattr(MODULES["bias_gelu"], "bias_gelu_triton", refuse)
    assert failure("bias_gelu") == "does not run here: NotImplementedError: at 3:4:"


def test_errors_are_held_to_twice_pytorch_s():
    one = torch.ones(1, dtype=torch.float64)
    for ours, allowed in ((1 + 3e-5, True), (1 + 5e-5, False), (math.nan, False)):
        arguments = ("y",), [one * ours], [one * (1 + 2e-5)], [one], 1e-5
        if allowed:
            assert accuracy.judged(*arguments)["y"] == pytest.approx((3e-5, 2e-5), rel=1e-3)
        else:
            with pytest.raises(ArithmeticError, match=r"y is off by .*, at most 4\.0e-05 is allowed"):
                accuracy.judged(*arguments)


def test_memory_is_filled_and_the_modes_are_as_before_afterwards():
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        assert accuracy.poisoned(lambda: torch.empty(3)).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
