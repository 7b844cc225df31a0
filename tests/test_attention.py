"""Attention: every implementation against the float64 definition, and the definition against PyTorch and loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_bitwise,
    poisoned_memory,  # noqa: F401  (a fixture)
    randn,
    values_and_gradients,
    widened,
)

from kernels.attention import attention_reference, attention_torch, attention_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = [
    pytest.param(attention_torch, id="torch"),
    pytest.param(attention_triton, id="triton"),
]
LENGTHS = {
    1: "one token",
    2: "one pair",
    17: "prime, below any block",
    63: "one short of a block of 64",
    64: "a block of 64",
    65: "one over a block of 64",
    127: "one short of a block of 128",
    129: "one over a block of 128",
    257: "several blocks and one over",
}
WIDTHS = {16: "smallest", 64: "GPT-2", 80: "no power of two"}
SHAPES = [
    pytest.param((2, T, 3, D), id=f"T={T} {why}, D={D} {width}")
    for T, why in LENGTHS.items()
    for D, width in WIDTHS.items()
]
SMALL = (2, 17, 3, 16)
NAMES = "out dqkv"


def pytorch(qkv, **options):
    """PyTorch's own op on contiguous (B, H, T, D)."""
    q, k, v = (part.transpose(1, 2).contiguous() for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, **{"is_causal": True, **options}).transpose(1, 2)


def inputs(shape, dtype=torch.float32, seed=0):
    """qkv (B, T, 3, H, D) and dout (B, T, H, D)."""
    B, T, H, D = shape
    return randn(B, T, 3, H, D, seed=seed, dtype=dtype), randn(B, T, H, D, seed=seed + 1, dtype=dtype)


def compare(op, qkv, dout, **options):
    def with_options(function):
        return lambda x: function(x, **options)

    got = values_and_gradients(with_options(op), [qkv], [dout])
    theirs = values_and_gradients(with_options(pytorch), [qkv], [dout])
    exact = values_and_gradients(with_options(attention_reference), widened([qkv]), widened([dout]))
    assert [t.dtype for t in got] == [qkv.dtype] * 2
    assert_accurate(got, theirs, exact, qkv.dtype, NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_matches_reference(op, shape, dtype):
    compare(op, *inputs(shape, dtype))


@pytest.mark.parametrize("options", [{"is_causal": False}, {"scale": 0.3}, {"scale": 1.0, "is_causal": False}], ids=str)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_options_match_reference(op, options):
    compare(op, *inputs((2, 65, 3, 16)), **options)


STRIDED = [
    pytest.param(
        lambda x: x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0), id="all axes reversed in memory"
    ),
    pytest.param(lambda x: x.repeat_interleave(2, dim=1)[:, ::2], id="every second token of a longer sequence"),
    pytest.param(lambda x: x.repeat_interleave(2, dim=4)[..., ::2], id="last axis not dense"),
    pytest.param(lambda x: torch.cat([x, x], 3)[:, :, :, : x.shape[3]], id="some heads of many"),
]


@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_strided_inputs_give_the_same(op, strided):
    qkv, dout = inputs(SMALL)
    view = strided(qkv)
    assert torch.equal(view, qkv)
    assert not view.is_contiguous()
    compare(op, view, dout)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_strided_and_expanded_gradients_are_taken(op):
    qkv, dout = inputs(SMALL)
    compare(op, qkv, dout.transpose(1, 2).contiguous().transpose(1, 2))
    compare(op, qkv, torch.ones((), device=DEVICE).expand_as(dout))  # what sum().backward() sends


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_output_is_read_as_rows_without_a_copy(op):
    qkv, _ = inputs(SMALL)
    assert op(qkv).is_contiguous()
    assert op(qkv, dropout_p=0.1).is_contiguous()  # PyTorch takes another path


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_inputs_stay_unchanged_and_runs_are_bitwise_equal(op):
    qkv, dout = inputs((2, 129, 3, 64))
    before = qkv.clone(), dout.clone()
    first = values_and_gradients(op, [qkv], [dout])
    assert_bitwise([qkv, dout], before)
    assert_bitwise(values_and_gradients(op, [qkv], [dout]), first)


@pytest.mark.parametrize("op", [*IMPLEMENTATIONS, pytest.param(attention_reference, id="reference")])
def test_a_later_token_never_changes_earlier_outputs(op):
    qkv, _ = inputs((1, 65, 2, 16))
    out = op(qkv)
    for t in (1, 17, 64):
        changed = qkv.clone()
        changed[:, t:] = 1e4
        torch.testing.assert_close(op(changed)[:, :t], out[:, :t], rtol=0, atol=0)
    changed = qkv.clone()
    changed[:, 0] += 1.0
    assert (op(changed)[:, 1:] != out[:, 1:]).any(dim=-1).all()  # and every later token sees the first


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_huge_scores_do_not_overflow(op):
    qkv, dout = inputs(SMALL)
    qkv[:, :, :2] *= 100.0  # scores near 1e4
    got = values_and_gradients(op, [qkv], [dout])
    assert all(t.isfinite().all() for t in got)
    exact = attention_reference(qkv.double())
    torch.testing.assert_close(got[0].double(), exact, rtol=0, atol=2e-2)  # 1e4 * 2^-23 enters each exponent


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_equal_keys_average_the_values(op):
    qkv, _ = inputs(SMALL)
    qkv[:, :, 1] = 1.0
    counts = torch.arange(1, 18, device=DEVICE)[None, :, None, None]
    torch.testing.assert_close(op(qkv), qkv[:, :, 2].cumsum(1) / counts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [*IMPLEMENTATIONS[:1], pytest.param(attention_reference, id="reference")])
def test_passes_gradcheck(op):
    qkv = randn(1, 3, 3, 2, 4, seed=0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(op, (qkv,))


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_no_grad_gives_the_same(op):
    qkv, _ = inputs(SMALL)
    expected = op(qkv.detach().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(op(qkv), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_compiles_fullgraph(op):
    torch._dynamo.reset()
    qkv, dout = inputs(SMALL)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(op, [qkv], [dout])
    for ours, eager in zip(values_and_gradients(compiled, [qkv], [dout]), expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_dropout_keeps_and_scales_weights_in_expectation(op):
    B, T, H, p = 8, 64, 4, 0.25
    qkv = torch.zeros(B, T, 3, H, T, device=DEVICE)
    qkv[:, :, 2] = torch.eye(T, device=DEVICE)[None, :, None]  # so that the output is the matrix of weights
    qkv.requires_grad_()
    torch.manual_seed(0)
    weights = op(qkv, dropout_p=p, is_causal=False)  # (B, T, H, T), each 1/T before dropout
    kept = weights != 0
    assert torch.allclose(weights[kept], torch.tensor(1.0 / (T * (1 - p)), device=DEVICE), rtol=1e-5)
    sigma = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * sigma
    assert len({tuple(row.tolist()) for row in kept.flatten(0, 2).int()}) > 0.99 * B * T * H  # no mask is used twice

    weights.sum().backward()
    dv = qkv.grad[:, :, 2]  # dv[j] = sum over i of weight[i, j], by the mask that the forward pass used
    torch.testing.assert_close(dv[..., 0], weights.detach().sum(1).transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_dropout_follows_the_seed(op):
    qkv, _ = inputs(SMALL)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(op(qkv, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_reference_is_scaled_dot_product_attention(is_causal):
    qkv, dout = (t.double() for t in inputs((2, 33, 3, 16)))
    got = values_and_gradients(lambda x: attention_reference(x, is_causal=is_causal), [qkv], [dout])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = values_and_gradients(lambda x: pytorch(x, is_causal=is_causal), [qkv], [dout])
    assert_accurate(got, expected, expected, torch.float64, NAMES)


def test_reference_is_the_equation_position_by_position():
    qkv, _ = inputs((1, 5, 2, 4))
    q, k, v = qkv[0].double().unbind(1)  # each (T, H, D)
    out = attention_reference(qkv.double())[0]
    for i in range(5):
        for h in range(2):
            weights = [math.exp(float(q[i, h] @ k[j, h]) / math.sqrt(4)) for j in range(i + 1)]
            expected = sum(w * v[j, h] for j, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(out[i, h], expected, rtol=1e-12, atol=1e-12)


REJECTED = [
    pytest.param((2, 4, 48), torch.float32, {}, "(2, 4, 48)", id="not packed"),
    pytest.param((2, 4, 2, 3, 16), torch.float32, {}, "(2, 4, 2, 3, 16)", id="two parts, not three"),
    pytest.param((2, 0, 3, 3, 16), torch.float32, {}, "(2, 0, 3, 3, 16)", id="no tokens"),
    pytest.param((2, 4, 3, 3, 16), torch.int64, {}, "torch.int64", id="integers"),
    pytest.param((2, 4, 3, 3, 16), torch.float32, {"dropout_p": 1.0}, "1.0", id="all dropped"),
    pytest.param((2, 4, 3, 3, 16), torch.float32, {"dropout_p": -0.1}, "-0.1", id="negative dropout"),
    pytest.param((2, 4, 3, 3, 16), torch.float32, {"dropout_p": math.nan}, "nan", id="dropout is not a number"),
]


@pytest.mark.parametrize(("shape", "dtype", "options", "came"), REJECTED)
@pytest.mark.parametrize("op", [*IMPLEMENTATIONS, pytest.param(attention_reference, id="reference")])
def test_rejects_with_what_came(op, shape, dtype, options, came):
    with pytest.raises(ValueError, match=r"attention: .*must be.*, got ") as raised:
        op(torch.zeros(shape, dtype=dtype, device=DEVICE), **options)
    assert str(raised.value).endswith(f"got {came}")
