"""LayerNorm and residual add + LayerNorm against their float64 definitions."""

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

import kernels.column_sum
from kernels.layer_norm import (
    add_layer_norm_reference,
    add_layer_norm_torch,
    add_layer_norm_triton,
    layer_norm_reference,
    layer_norm_torch,
    layer_norm_triton,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = [
    pytest.param((layer_norm_torch, add_layer_norm_torch), id="torch"),
    pytest.param((layer_norm_triton, add_layer_norm_triton), id="triton"),
]
REFERENCE = pytest.param((layer_norm_reference, add_layer_norm_reference), id="reference")
WIDTHS = {3: "tiny", 17: "prime", 768: "GPT-2", 1600: "GPT-2 XL", 1601: "odd, over GPT-2 XL"}
SHAPES = [
    *(pytest.param((5, 3, C), id=f"C={C} {why}") for C, why in WIDTHS.items()),
    pytest.param((1, 64), id="one row"),
    pytest.param((64,), id="no leading axis"),
    pytest.param((259, 33), id="more rows than any block"),
]
NAMES = "y dx dweight dbias"
ADD_NAMES = "y summed dx dresidual dweight dbias"


def pytorch(x, weight, bias, eps=1e-5):
    """PyTorch's own op in x's precision."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def pytorch_add(x, residual, weight, bias, eps=1e-5):
    return pytorch(x + residual, weight, bias, eps), x + residual


def inputs(shape, dtype=torch.float32, parameter_dtype=None):
    """x, residual, weight, bias."""
    parameter_dtype = parameter_dtype or dtype
    return [
        randn(*shape, seed=0, dtype=dtype) * 2 + 0.5,
        randn(*shape, seed=1, dtype=dtype),
        randn(shape[-1], seed=2, dtype=parameter_dtype),
        randn(shape[-1], seed=3, dtype=parameter_dtype),
    ]


def compare(ops, x, residual, weight, bias, dy=None, **options):
    """Compares both ops with their definitions: outputs and every gradient."""
    layer_norm, add_layer_norm = ops
    dy = randn(*x.shape, seed=4, dtype=x.dtype) if dy is None else dy
    for op, other, definition, tensors, douts, names in (
        (layer_norm, pytorch, layer_norm_reference, [x, weight, bias], [dy], NAMES),
        (
            add_layer_norm,
            pytorch_add,
            add_layer_norm_reference,
            [x, residual, weight, bias],
            [dy, dy.flip(0)],
            ADD_NAMES,
        ),
    ):
        got = values_and_gradients(lambda *t, op=op: op(*t, **options), tensors, douts)
        theirs = values_and_gradients(lambda *t, op=other: op(*t, **options), tensors, douts)
        if op is add_layer_norm:  # the sum is rounded to x's dtype: the definition starts from the rounded one
            summed = x + residual
            tensors = [summed, torch.zeros_like(residual), weight, bias]
        exact = values_and_gradients(lambda *t, op=definition: op(*t, **options), widened(tensors), widened(douts))
        assert [t.dtype for t in got] == [t.dtype for t in theirs]
        assert got[0].dtype == x.dtype
        assert_accurate(got, theirs, exact, x.dtype, names)


@pytest.mark.parametrize(("shape", "dtype"), slow_beside_fp32(SHAPES, "GPT-2 XL", "more rows"))
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_matches_reference(ops, shape, dtype):
    compare(ops, *inputs(shape, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_a_row_and_its_sums_fill_the_registers(ops, dtype):
    compare(ops, *inputs((3, 8193), dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_float32_parameters_with_low_precision_activations_match_reference(ops, dtype):
    compare(ops, *inputs((5, 3, 768), dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("op", [layer_norm_triton], ids=["triton"])
def test_gradients_of_float32_parameters_are_not_rounded(op, dtype):
    x, dy, *parameters = inputs((MANY, 33), dtype, torch.float32)
    got = values_and_gradients(op, [x, *parameters], [dy])[2:]
    exact = values_and_gradients(layer_norm_reference, widened([x, *parameters]), widened([dy]))[2:]
    assert_accurate(got, got, exact, torch.float32, "dweight dbias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_one_column_gives_the_bias(ops, dtype):
    x, residual, weight, bias = inputs((5, 3, 1), dtype)
    torch.testing.assert_close(ops[0](x, weight, bias), bias.expand_as(x), rtol=0, atol=0)
    compare(ops, x, residual, weight, bias, eps=1.0)  # 1e-5 would multiply the rounding of x by rstd = 316


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_eps_is_used(ops):
    x, residual, weight, bias = inputs((7, 33))
    compare(ops, x * 0.1, residual * 0.1, weight, bias, eps=0.1)


@pytest.mark.parametrize("dtype", DTYPES[:2])  # 1e-4 is no normal float16
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_rows_of_tiny_variance_match_reference(ops, dtype):
    x, residual, weight, bias = inputs((7, 64), dtype)
    x, residual, dy = x * 5e-5, residual * 5e-5, randn(7, 64, seed=4, dtype=dtype)  # a variance of 1e-8
    compare(ops, x, residual, weight, bias, dy=dy * 1e-2)  # rstd is 316: the variance is below eps
    compare(ops, x, residual, weight, bias, dy=dy * 1e-4, eps=1e-12)  # rstd is 1e4


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_rows_of_huge_values_match_reference(ops, dtype):
    x, residual, weight, bias = inputs((7, 64), dtype)
    compare(ops, x * 1e4, residual * 1e4, weight, bias, dy=randn(7, 64, seed=4, dtype=dtype) * 1e4)


@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_rows_of_equal_values_give_the_bias(ops):
    _, _, weight, bias = inputs((4, 64))
    x = torch.tensor([0.0, 1.0, -3.0, 1024.0], device=DEVICE)[:, None].expand(4, 64).contiguous()
    torch.testing.assert_close(ops[0](x, weight, bias), bias.expand(4, 64), rtol=0, atol=0)
    y, summed = ops[1](x, x, weight, bias)
    torch.testing.assert_close(y, bias.expand(4, 64), rtol=0, atol=0)
    torch.testing.assert_close(summed, x + x, rtol=0, atol=0)
    compare(ops, x, x, weight, bias, dy=randn(4, 64, seed=4) * 1e-2)


@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_no_rows_give_no_gradient(ops):
    x, residual, weight, bias = inputs((0, 5))
    for op, tensors, douts in ((ops[0], [x, weight, bias], [x]), (ops[1], [x, residual, weight, bias], [x, x])):
        *others, dweight, dbias = values_and_gradients(op, tensors, douts)
        assert {t.shape for t in others} == {(0, 5)}
        assert_bitwise([dweight, dbias], [torch.zeros(5, device=DEVICE)] * 2)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_a_large_mean_costs_no_accuracy(ops):
    x, residual, weight, bias = inputs((7, 768))
    x = x + 64.0  # E[x^2] - E[x]^2 would lose 1e-4 of the variance in float32
    compare(ops, x, residual, weight, bias)


STRIDED = [
    pytest.param(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), id="rows are columns in memory"),
    pytest.param(lambda x: x.repeat_interleave(2, dim=0)[::2], id="every second row"),
    pytest.param(lambda x: x.repeat_interleave(2, dim=-1)[..., ::2], id="last axis not dense"),
    pytest.param(lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]], id="part of wider rows"),
]


@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_strided_inputs_give_the_same(ops, strided):
    x, residual, weight, bias = inputs((5, 4, 33))
    view, residual_view = strided(x), strided(residual)
    assert torch.equal(view, x)
    assert not view.is_contiguous()
    compare(ops, view, residual, weight, bias)
    compare(ops, x, residual_view, weight, bias)
    compare(ops, x, residual, weight.repeat_interleave(2)[::2], bias.repeat_interleave(3)[::3])


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_strided_and_expanded_gradients_are_taken(ops):
    x, residual, weight, bias = inputs((5, 4, 33))
    compare(
        ops, x, residual, weight, bias, dy=torch.ones((), device=DEVICE).expand_as(x)
    )  # what sum().backward() sends
    compare(ops, x, residual, weight, bias, dy=randn(33, 4, 5, seed=4).permute(2, 1, 0))


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("used", [0, 1], ids=["only y is used", "only the sum is used"])
def test_one_used_output_of_two_is_enough(ops, used):
    tensors = inputs((5, 33))
    dout = randn(5, 33, seed=4)
    leaves = [t.detach().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    got = torch.autograd.grad(ops[1](*leaves)[used], leaves, dout, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(
        add_layer_norm_reference(*exact)[used], exact, dout.double(), allow_unused=True, materialize_grads=True
    )
    assert_accurate(got, got, expected, torch.float32, "dx dresidual dweight dbias")


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_inputs_stay_unchanged_and_runs_are_bitwise_equal(ops):
    x, residual, weight, bias = inputs((MANY, 768))
    dy = randn(MANY, 768, seed=4)
    before = [t.clone() for t in (x, residual, weight, bias, dy)]
    for op, tensors, douts in ((ops[0], [x, weight, bias], [dy]), (ops[1], [x, residual, weight, bias], [dy, dy])):
        first = values_and_gradients(op, tensors, douts)
        assert_bitwise([x, residual, weight, bias, dy], before)
        assert_bitwise(values_and_gradients(op, tensors, douts), first)


@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS[:1], REFERENCE])
def test_passes_gradcheck(ops):
    x, residual, weight, bias = (t.requires_grad_() for t in inputs((3, 5), torch.float64))
    assert torch.autograd.gradcheck(ops[0], (x, weight, bias))
    assert torch.autograd.gradcheck(ops[1], (x, residual, weight, bias))


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_compiles_fullgraph(ops):
    torch._dynamo.reset()
    x, residual, weight, bias = inputs((5, 3, 33))
    dy = randn(5, 3, 33, seed=4)
    for op, tensors, douts in ((ops[0], [x, weight, bias], [dy]), (ops[1], [x, residual, weight, bias], [dy, dy])):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected = values_and_gradients(op, tensors, douts)
        for ours, eager in zip(values_and_gradients(compiled, tensors, douts), expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


LAYOUTS = [
    pytest.param(torch.clone, id="contiguous", marks=pytest.mark.slow),  # as test_compiles_fullgraph has it
    pytest.param(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), id="permuted"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_opcheck(layout):
    x, residual, weight, bias = inputs((3, 2, 5))
    dy, x, residual = (layout(t) for t in (randn(3, 2, 5, seed=4), x, residual))
    ops = torch.ops.gpt2
    _, mean, rstd = ops.layer_norm(x, weight, bias, 1e-5)
    for dsummed in (None, residual):
        saved = dy, dsummed, x, weight, mean, rstd, torch.float32
        torch.library.opcheck(ops.layer_norm_backward.default, saved)
    for needs_grad in (False, True):
        leaves = [t.requires_grad_(needs_grad) for t in (x, residual, weight, bias)]
        torch.library.opcheck(ops.layer_norm.default, (leaves[0], *leaves[2:], 1e-5))
        torch.library.opcheck(ops.add_layer_norm.default, (*leaves, 1e-5))


def test_reference_is_pytorchs_float64_layer_norm():
    x, residual, weight, bias = inputs((5, 33), torch.float64)
    dy = randn(5, 33, seed=4, dtype=torch.float64)
    for op, other, tensors, douts, names in (
        (layer_norm_reference, pytorch, [x, weight, bias], [dy], NAMES),
        (add_layer_norm_reference, pytorch_add, [x, residual, weight, bias], [dy, 2 * dy], ADD_NAMES),
    ):
        expected = values_and_gradients(other, tensors, douts)
        assert_accurate(values_and_gradients(op, tensors, douts), expected, expected, torch.float64, names)


def test_reference_is_the_equation_row_by_row():
    x, _, weight, bias = inputs((3, 4), torch.float64)
    y = layer_norm_reference(x, weight, bias, eps=0.01)
    for row, expected in zip(x.tolist(), y.tolist(), strict=True):
        mean = sum(row) / 4
        var = sum((value - mean) ** 2 for value in row) / 4
        by_hand = [
            (v - mean) / (var + 0.01) ** 0.5 * w + b
            for v, w, b in zip(row, weight.tolist(), bias.tolist(), strict=True)
        ]
        assert by_hand == pytest.approx(expected, rel=1e-12)


def make(shape, dtype=torch.float32, device=DEVICE):
    return torch.ones(shape, dtype=dtype, device=device)


REJECTED = [
    pytest.param(make(()), make(4), make(4), "()", id="a scalar"),
    pytest.param(make((3, 0)), make(0), make(0), "(3, 0)", id="no columns"),
    pytest.param(make((3, 4)), make(5), make(4), "(5,)", id="weight too long"),
    pytest.param(make((3, 4)), make((1, 4)), make(4), "(1, 4)", id="weight with two axes"),
    pytest.param(make((3, 4)), make(4), make(3), "(3,)", id="bias too short"),
    pytest.param(make((3, 4), torch.int32), make(4), make(4), "torch.int32", id="x of integers"),
    pytest.param(make((3, 4)), make(4, torch.complex64), make(4), "torch.complex64", id="weight of complex numbers"),
    pytest.param(make((3, 4)), make(4, device="meta"), make(4), "meta", id="weight on another device"),
    pytest.param(make((3, 4)), make(4), make(4, device="meta"), "meta", id="bias on another device"),
]


@pytest.mark.parametrize(("x", "weight", "bias", "came"), REJECTED)
@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_rejects_with_what_came(ops, x, weight, bias, came):
    with pytest.raises(ValueError, match=r"layer_norm: .*must .*, got ") as raised:
        ops[0](x, weight, bias)
    assert str(raised.value).endswith(f"got {came}")
    with pytest.raises(ValueError, match=r"layer_norm: .*must .*, got ") as raised:
        ops[1](x, x, weight, bias)
    assert str(raised.value).endswith(f"got {came}")


REJECTED_RESIDUALS = [
    pytest.param(make((3, 5)), "(3, 5)", id="wider"),
    pytest.param(make((4,)), "(4,)", id="one that would broadcast"),
    pytest.param(make((3, 4), torch.bfloat16), "torch.bfloat16", id="another dtype"),
    pytest.param(make((3, 4), device="meta"), "meta", id="another device"),
]


@pytest.mark.parametrize(("residual", "came"), REJECTED_RESIDUALS)
@pytest.mark.parametrize("ops", [*IMPLEMENTATIONS, REFERENCE])
def test_rejects_a_residual_unlike_x(ops, residual, came):
    with pytest.raises(ValueError, match=r"add_layer_norm: .*residual.*, got ") as raised:
        ops[1](make((3, 4)), residual, make(4), make(4))
    assert str(raised.value).endswith(f"got {came}")


WIDTHS = [768, pytest.param(8193, id="8193 whose sums take a kernel of their own", marks=pytest.mark.slow)]


@pytest.mark.parametrize("C", WIDTHS)
def test_both_parameters_are_summed_in_one_launch(C, monkeypatch):
    grids, kernel = [], kernels.column_sum._column_sum_kernel

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels.column_sum, "_column_sum_kernel", Kernel())
    x, residual, weight, bias = inputs((5, C))
    values_and_gradients(add_layer_norm_triton, [x, residual, weight, bias], [x, x])
    assert grids == [(2 * -(-C // 32),)]
