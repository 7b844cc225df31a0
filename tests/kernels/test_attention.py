"""Attention against its float64 definition, and the definition against PyTorch and plain loops."""

import math
from itertools import product

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
    set_tiles,  # noqa: F401  (a fixture)
    values_and_gradients,
    widened,
)

import kernels.attention
import kernels.tiles
from kernels.attention import attention_reference, attention_torch, attention_triton
from kernels.tiles import FIELDS

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
WIDTHS = {
    16: "narrowest",
    17: "odd",
    32: "power of two",
    64: "GPT-2",
    80: "GPT-3 2.7B",
    96: "GPT-3 large",
    128: "GPT-3 13B",
    256: "widest",
}


def cases() -> list:
    """Every op, shape and dtype; those that are not quick are slow, since the interpreter takes a second for one.

    Quick are GPT-2's width at every length and every width at one length, in float32, and some of both in float16.
    """
    found = []
    for op, (D, width), (T, why), dtype in product(IMPLEMENTATIONS, WIDTHS.items(), LENGTHS.items(), DTYPES):
        on_gpu, shape = DEVICE.type == "cuda", (2 if T <= 65 else 1, T, 2 if D <= 64 else 1, D)
        if on_gpu or D in (16, 64) or T in (65, 129):  # every pair would take the interpreter minutes
            is_fp32 = D == 64 or T == 65
            is_fp16 = T in (65, 257) if D == 64 else T == 65 and D in (17, 256)
            is_quick = on_gpu or op.id == "torch" or (is_fp32 if dtype.id == "fp32" else is_fp16)
            words, marks = f"{op.id}-T={T} {why}, D={D} {width}-{dtype.id}", () if is_quick else pytest.mark.slow
            found.append(pytest.param(*op.values, shape, *dtype.values, id=words, marks=marks))
    return found


SMALL = (2, 17, 3, 16)
ODD = (2, 17, 3, 19)  # a tile of 32 columns reaches into the next head
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


@pytest.mark.parametrize(("op", "shape", "dtype"), cases())
def test_matches_reference(op, shape, dtype):
    compare(op, *inputs(shape, dtype))


@pytest.mark.parametrize(
    "T",
    [T if T in (1, 17, 65, 257) else pytest.param(T, marks=pytest.mark.slow) for T in LENGTHS if T not in (63, 127)],
)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_without_a_causal_mask_matches_reference(op, T):
    compare(op, *inputs((2 if T <= 65 else 1, T, 2, 16)), is_causal=False)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_a_given_scale_matches_reference(op, scale, is_causal):
    compare(op, *inputs((1, 65, 2, 16)), scale=scale, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (32, 128), (128, 32), (16, 16)], ids=str)
@pytest.mark.parametrize("op", [attention_triton], ids=["triton"])
def test_any_tile_gives_the_same(op, tile, is_causal, set_tiles):  # noqa: F811
    config = dict(zip(FIELDS["attention_fwd"], (*tile, 4, 2), strict=True))
    set_tiles(lambda name, arch, size: config)
    compare(op, *inputs((1, 77, 1, 16)), is_causal=is_causal)
    assert config in kernels.tiles.used().values()


STRIDED = [
    pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="tokens before batches in memory"),
    pytest.param(lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), id="heads before tokens in memory"),
    pytest.param(lambda x: x.repeat_interleave(2, dim=1)[:, ::2], id="every second token of a longer sequence"),
    pytest.param(lambda x: torch.cat([x, x], 3)[:, :, :, : x.shape[3]], id="some heads of many"),
    pytest.param(lambda x: x[:1].expand_as(x), id="one batch expanded"),
    pytest.param(lambda x: x[:, :, :, :1].expand_as(x), id="one head expanded"),
]
LAST_AXIS_STRIDED = [
    pytest.param(lambda x: x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0), id="all axes reversed"),
    pytest.param(lambda x: x.repeat_interleave(2, dim=4)[..., ::2], id="every second column"),
    pytest.param(lambda x: x[..., :1].expand_as(x), id="one column expanded"),
]


@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_strided_inputs_match_reference(op, strided):
    qkv, dout = inputs(ODD)
    view = strided(qkv)
    assert not view.is_contiguous()
    compare(op, view, dout)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_nothing_is_read_beside_the_input(op, is_causal):
    qkv, dout = inputs((1, 130, 2, 19))  # key blocks with and without masks; columns that only a mask excludes
    around = F.pad(qkv, (0, 13, 0, 1, 0, 0, 0, 64, 0, 1), value=math.nan)
    compare(op, around[:1, :130, :, :2, :19], dout, is_causal=is_causal)


@pytest.mark.parametrize("strided", LAST_AXIS_STRIDED)
def test_only_triton_asks_for_a_dense_last_axis(strided):
    qkv, dout = inputs(SMALL)
    view = strided(qkv)
    compare(attention_torch, view, dout)
    with pytest.raises(ValueError, match="attention: qkv's last axis must have stride 1 for Triton, got ") as raised:
        attention_triton(view)
    assert str(raised.value).endswith(f"got {view.stride()}")


def test_only_triton_asks_for_rows_within_32_bits():
    """A tile has up to 256 rows, and the kernels compute a row's offset in it in 32 bits."""
    rows = torch.empty(1, 3, 2**23, dtype=torch.float16, device=DEVICE)
    qkv, _ = inputs((1, 3, 1, 16), torch.float16)
    near = torch.as_strided(rows, qkv.shape, (0, 2**23 - 1, 16, 16, 1)).copy_(qkv)
    torch.testing.assert_close(attention_triton(near), attention_triton(qkv), rtol=0, atol=0)
    far = torch.as_strided(rows, qkv.shape, (0, 2**23, 16, 16, 1))
    with pytest.raises(ValueError, match=r"^attention: rows of qkv and dqkv must be less than 2\^23 elements apart"):
        attention_triton(far)


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
    qkv, dout = inputs((2, MANY, 3, 64))
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


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_scores_far_below_zero_match_reference(op, is_causal):
    qkv, dout = inputs(SMALL)
    qkv[:, :, 0], qkv[:, :, 1] = 6.0, -6.0  # every score is -144: a key past the end, whose score is 0, would weigh inf
    compare(op, qkv, dout, is_causal=is_causal)


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


LAYOUTS = [
    pytest.param(torch.clone, id="contiguous", marks=pytest.mark.slow),  # as test_compiles_fullgraph has it
    pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="permuted"),
]


@pytest.mark.parametrize("needs_grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dropout_p", [0.0, pytest.param(0.25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_opcheck(layout, dropout_p, needs_grad):
    qkv, dout = inputs((2, 5, 2, 16))
    seed = torch.tensor([7], device=DEVICE) if dropout_p else None
    options = (seed, True, dropout_p, 0.25)
    qkv = layout(qkv).requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.gpt2.attention.default, (qkv, *options))
    if not needs_grad:
        saved = torch.ops.gpt2.attention(qkv, *options)
        torch.library.opcheck(torch.ops.gpt2.attention_backward.default, (layout(dout), qkv, *saved, *options))


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
    pytest.param((2, 4, 3, 3, 16), torch.float32, {"scale": 0.0}, "0.0", id="no scale"),
    pytest.param((2, 4, 3, 3, 16), torch.float32, {"scale": -0.5}, "-0.5", id="negative scale"),
    pytest.param((2, 4, 3, 3, 16), torch.float32, {"scale": math.inf}, "inf", id="infinite scale"),
    pytest.param((2, 4, 3, 3, 16), torch.float32, {"scale": math.nan}, "nan", id="scale is not a number"),
]


@pytest.mark.parametrize(("shape", "dtype", "options", "came"), REJECTED)
@pytest.mark.parametrize("op", [*IMPLEMENTATIONS, pytest.param(attention_reference, id="reference")])
def test_rejects_with_what_came(op, shape, dtype, options, came):
    with pytest.raises(ValueError, match=r"attention: .*must be.*, got ") as raised:
        op(torch.zeros(shape, dtype=dtype, device=DEVICE), **options)
    assert str(raised.value).endswith(f"got {came}")


@pytest.mark.parametrize("D", [1, 8, 15, 257])
def test_only_triton_is_bound_to_head_widths_of_16_to_256(D):
    qkv, dout = inputs((1, 3, 2, D))
    compare(attention_torch, qkv, dout)
    with pytest.raises(ValueError, match=f"^attention: head width D must be 16 to 256 for Triton, got {D}$"):
        attention_triton(qkv)


@pytest.mark.parametrize(
    ("dtype", "matmul_precision", "expected"),
    [
        pytest.param(torch.float16, "high", "ieee", id="fp16"),
        pytest.param(torch.float32, "high", "tf32", id="fp32, tf32 allowed"),
        pytest.param(torch.float32, "highest", "ieee", id="fp32"),
    ],
)
def test_tf32_is_asked_only_for_float32_products(dtype, matmul_precision, expected, monkeypatch):
    launched = []  # most AMD GPUs refuse to compile "tf32", also for factors of 16 bits

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append(constants["PRECISION"])

    monkeypatch.setattr(kernels.attention, "_attention_fwd_kernel", Kernel())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        attention_triton(randn(2, 17, 3, 3, 16, seed=0).to(dtype))
    finally:
        torch.set_float32_matmul_precision(before)
    assert launched == [expected]
