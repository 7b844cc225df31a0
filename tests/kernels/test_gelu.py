"""GELU and bias + GELU against their float64 definitions, and GELU's definition against math.tanh."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import (
    DEVICE,
    DTYPES,
    MANY,
    assert_accurate,
    assert_bitwise,
    poisoned_memory,  # noqa: F401  (a fixture)
    randn,
    slow_beside_fp32,
    values_and_gradients,
    widened,
)

from kernels.gelu import (
    bias_gelu_reference,
    bias_gelu_torch,
    bias_gelu_triton,
    gelu_reference,
    gelu_torch,
    gelu_triton,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = [
    pytest.param((gelu_torch, bias_gelu_torch), id="torch"),
    pytest.param((gelu_triton, bias_gelu_triton), id="triton"),
]
REFERENCE = pytest.param((gelu_reference, bias_gelu_reference), id="reference")
SHAPES = [
    pytest.param((1,), id="one element"),
    pytest.param((3,), id="three"),
    pytest.param((7, 17), id="prime width"),
    pytest.param((2, 5, 768), id="three axes"),
    pytest.param((2, 1600), id="GPT-2 XL"),
    pytest.param((3, 1601), id="odd, over a block of 1024"),
    pytest.param((4097,), id="one over a power of two"),
    pytest.param((1025, 3), id="more rows than any block, narrow"),
    pytest.param((0, 5), id="no rows"),
]


def pytorch(x):
    """PyTorch's own op in x's precision."""
    return F.gelu(x, approximate="tanh")


def pytorch_bias(x, bias):
    return pytorch(x + bias.to(x.dtype))


def inputs(shape, dtype=torch.float32, bias_dtype=None):
    """x, spread over the bend and both tails of GELU, and bias."""
    return randn(*shape, seed=0, dtype=dtype) * 2, randn(shape[-1], seed=1, dtype=bias_dtype or dtype)


def compare(ops, x, bias, dy=None):
    """Compares both ops with their definitions: outputs and every gradient."""
    dy = randn(*x.shape, seed=2, dtype=x.dtype) if dy is None else dy
    for op, other, definition, tensors, names in (
        (ops[0], pytorch, gelu_reference, [x], "y dx"),
        (ops[1], pytorch_bias, bias_gelu_reference, [x, bias], "y dx dbias"),
    ):
        got = values_and_gradients(op, tensors, [dy])
        theirs = values_and_gradients(other, tensors, [dy])
        exact = values_and_gradients(definition, widened(tensors), widened([dy]))
        assert [t.dtype for t in got] == [x.dtype, *(t.dtype for t in tensors)]
        if x.numel():
            assert_accurate(got, theirs, exact, x.dtype, names)


@pytest.mark.parametrize(("shape", "dtype"), slow_beside_fp32(SHAPES, "power of two", "more rows", "GPT-2 XL"))
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_matches_reference(ops, shape, dtype):
    compare(ops, *inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_float32_bias_with_low_precision_activations_matches_reference(ops, dtype):
    compare(ops, *inputs((5, 768), dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("op", [bias_gelu_triton], ids=["triton"])
def test_the_gradient_of_a_float32_bias_is_not_rounded(op, dtype):
    x, bias = inputs((MANY, 33), dtype, torch.float32)
    *_, dbias = values_and_gradients(op, [x, bias], [x])
    *_, exact = values_and_gradients(bias_gelu_reference, widened([x, bias]), widened([x]))
    assert_accurate([dbias], [dbias], [exact], torch.float32, "dbias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_tails_are_zero_and_the_identity(ops, dtype):
    x = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=DEVICE, dtype=dtype)
    y, dx = values_and_gradients(ops[0], [x], [torch.ones_like(x)])
    slope = torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=DEVICE, dtype=dtype)
    assert_bitwise([y, dx], [x.clamp(min=0.0), slope])
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    assert_bitwise(values_and_gradients(ops[1], [x, zeros], [ones]), [x.clamp(min=0.0), slope, slope])
    assert_bitwise(values_and_gradients(ops[1], [zeros, x], [ones]), [x.clamp(min=0.0), slope, slope])


@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_tiny_inputs_are_halved(ops):
    x = torch.tensor([-1e-8, -1e-30, 1e-30, 1e-8], device=DEVICE)
    for op, tensors in ((ops[0], [x]), (ops[1], [x, torch.zeros_like(x)])):
        y, dx, *_ = values_and_gradients(op, tensors, [torch.ones_like(x)])
        torch.testing.assert_close(y, x / 2, rtol=1e-6, atol=0)
        torch.testing.assert_close(dx, torch.full_like(x, 0.5), rtol=1e-6, atol=0)


STRIDED = [
    pytest.param(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), id="rows are columns in memory"),
    pytest.param(lambda x: x.repeat_interleave(2, dim=0)[::2], id="every second row"),
    pytest.param(lambda x: x.repeat_interleave(2, dim=-1)[..., ::2], id="last axis not dense"),
    pytest.param(lambda x: x[:1].expand_as(x), id="one row expanded"),
]


@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_strided_inputs_give_the_same(ops, strided):
    x, bias = inputs((5, 4, 33))
    view = strided(x)
    assert not view.is_contiguous()
    compare(ops, view, bias)
    compare(ops, x, bias.repeat_interleave(2)[::2])


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_strided_and_expanded_gradients_are_taken(ops):
    x, bias = inputs((5, 4, 33))
    compare(ops, x, bias, dy=torch.ones((), device=DEVICE).expand_as(x))  # what sum().backward() sends
    compare(ops, x, bias, dy=randn(33, 4, 5, seed=2).permute(2, 1, 0))


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_inputs_stay_unchanged_and_runs_are_bitwise_equal(ops):
    x, bias = inputs((MANY, 768))
    dy = randn(MANY, 768, seed=2)
    before = [t.clone() for t in (x, bias, dy)]
    for op, tensors in ((ops[0], [x]), (ops[1], [x, bias])):
        first = values_and_gradients(op, tensors, [dy])
        assert_bitwise([x, bias, dy], before)
        assert_bitwise(values_and_gradients(op, tensors, [dy]), first)


@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS[:1], REFERENCE])
def test_passes_gradcheck(ops):
    x, bias = (t.requires_grad_() for t in inputs((3, 5), torch.float64))
    assert torch.autograd.gradcheck(ops[0], (x,))
    assert torch.autograd.gradcheck(ops[1], (x, bias))


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_compiles_fullgraph(ops):
    torch._dynamo.reset()
    x, bias = inputs((5, 3, 33))
    dy = randn(5, 3, 33, seed=2)
    for op, tensors in ((ops[0], [x]), (ops[1], [x, bias])):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected = values_and_gradients(op, tensors, [dy])
        for ours, eager in zip(values_and_gradients(compiled, tensors, [dy]), expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


LAYOUTS = [
    pytest.param(torch.clone, id="contiguous", marks=pytest.mark.slow),  # as test_compiles_fullgraph has it
    pytest.param(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), id="permuted"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_opcheck(layout):
    x, bias = inputs((3, 2, 5))
    x, dy, ops = layout(x), layout(randn(3, 2, 5, seed=2)), torch.ops.gpt2
    torch.library.opcheck(ops.gelu_backward.default, (dy, x))
    torch.library.opcheck(ops.bias_gelu_backward.default, (dy, x, bias))
    for needs_grad in (False, True):
        x, bias = x.requires_grad_(needs_grad), bias.requires_grad_(needs_grad)
        torch.library.opcheck(ops.gelu.default, (x,))
        torch.library.opcheck(ops.bias_gelu.default, (x, bias))


def test_reference_is_the_equation_and_its_derivative():
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, device=DEVICE)
    y, dx = values_and_gradients(gelu_reference, [x], [torch.ones_like(x)])
    for value, got, slope in zip(x.tolist(), y.tolist(), dx.tolist(), strict=True):
        u = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * value**2)
        assert got == pytest.approx(0.5 * value * (1 + math.tanh(u)), rel=1e-12, abs=1e-15)
        by_hand = 0.5 * (1 + math.tanh(u)) + 0.5 * value * (1 - math.tanh(u) ** 2) * du
        assert slope == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


def test_reference_is_the_tanh_form_and_not_the_exact_one():
    x = torch.tensor([2.0], dtype=torch.float64)
    torch.testing.assert_close(gelu_reference(x), F.gelu(x, approximate="tanh"), rtol=1e-14, atol=0)
    assert abs(gelu_reference(x) - F.gelu(x)).item() > 5e-5


def test_bias_reference_adds_in_wide_precision():
    x = torch.tensor([256.0, 3.0], dtype=torch.bfloat16)
    bias = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    expected = gelu_reference(x.double() + bias.double()).to(torch.bfloat16)
    torch.testing.assert_close(bias_gelu_reference(x, bias), expected, rtol=0, atol=0)


def make(shape, dtype=torch.float32, device=DEVICE):
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_rejects_what_is_not_floating(ops, dtype):
    for call in (lambda: ops[0](make(4, dtype)), lambda: ops[1](make(4, dtype), make(4))):
        with pytest.raises(ValueError, match=f"gelu: x must be float32, .*, got {dtype}$"):
            call()


REJECTED_BIASES = [
    pytest.param(make((3, 4)), make(5), "(5,)", id="too long"),
    pytest.param(make((3, 4)), make(1), "(1,)", id="one that would broadcast"),
    pytest.param(make((3, 4)), make((3, 4)), "(3, 4)", id="one per element"),
    pytest.param(make(()), make(()), "()", id="a scalar x"),
    pytest.param(make((3, 4)), make(4, torch.int64), "torch.int64", id="integers"),
    pytest.param(make((3, 4)), make(4, device="meta"), "meta", id="another device"),
]


@pytest.mark.parametrize(("x", "bias", "came"), REJECTED_BIASES)
@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_rejects_with_what_came(ops, x, bias, came):
    with pytest.raises(ValueError, match=r"bias_gelu: .*must be.*, got ") as raised:
        ops[1](x, bias)
    assert str(raised.value).endswith(f"got {came}")
