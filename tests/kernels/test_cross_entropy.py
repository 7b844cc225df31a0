"""LM head with cross-entropy against its float64 definition, and the definition against math.log."""

import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import compare, inputs, torch_as_on_a_gpu
from tolerances import (
    DEVICE,
    DTYPES,
    MANY,
    assert_bitwise,
    poisoned_memory,  # noqa: F401  (a fixture)
    randn,
    values_and_gradients,
)

from kernels.cross_entropy import (
    linear_cross_entropy_reference,
    linear_cross_entropy_torch,
    linear_cross_entropy_triton,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = [
    pytest.param(linear_cross_entropy_torch, id="torch"),
    pytest.param(linear_cross_entropy_triton, id="triton"),
]
PASSES = [*IMPLEMENTATIONS, pytest.param(torch_as_on_a_gpu, id="torch as on a GPU")]
CUSTOM_OPS = [
    pytest.param("linear_cross_entropy_torch", id="torch"),
    pytest.param("linear_cross_entropy", id="triton"),
]
REFERENCE = pytest.param(linear_cross_entropy_reference, id="reference")
SHAPES = [
    pytest.param(1, 1, 2, 2, id="one row, one column, two tokens"),
    pytest.param(5, 17, 2, 128, id="two tokens, the rest padding"),
    pytest.param(37, 33, 257, 257, id="bytes, not padded"),
    pytest.param(37, 33, 257, 384, id="bytes, padded"),
    pytest.param(257, 64, 257, 384, id="more rows than any block"),
    pytest.param(3, 16, 50257, 50304, id="GPT-2's vocabulary, few rows"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "V", "Vp"), SHAPES)
@pytest.mark.parametrize("op", PASSES)
def test_matches_reference(op, N, C, V, Vp, dtype):
    compare(op, inputs(N, C, V, Vp, dtype), vocab_size=V)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_float32_weight_with_low_precision_hidden_matches_reference(op, dtype):
    compare(op, inputs(37, 64, 257, 384, dtype, torch.float32), vocab_size=257)


@pytest.mark.parametrize("op", PASSES)
def test_a_sum_over_many_rows_does_not_overflow_float16(op):
    N = 300
    hidden, weight = torch.ones(N, 1, device=DEVICE).half(), torch.zeros(2, 1, device=DEVICE).half()
    targets = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    hidden *= 1024  # so the sum is 153,600; float16's largest number is 65,504
    *_, dweight = values_and_gradients(op, [hidden, weight, targets], [torch.ones((), device=DEVICE)])
    torch.testing.assert_close(dweight, torch.tensor([[-512.0], [512.0]], device=DEVICE).half())


@pytest.mark.parametrize("op", PASSES)
def test_another_ignore_index_is_left_out(op):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    targets = targets.where(targets >= 0, 5)
    compare(op, [hidden, weight, targets], vocab_size=257, ignore_index=5)


@pytest.mark.parametrize("op", [*PASSES, REFERENCE])
def test_ignored_rows_count_for_nothing(op):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    kept = targets != -100
    loss, dhidden, dweight = values_and_gradients(op, [hidden, weight, targets], [torch.ones((), device=DEVICE)])
    alone = values_and_gradients(op, [hidden[kept], weight, targets[kept]], [torch.ones((), device=DEVICE)])
    assert (dhidden[~kept] == 0).all()
    for got, expected in zip((loss, dhidden[kept], dweight), alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*PASSES, REFERENCE])
def test_all_ignored_is_no_loss_and_no_gradient(op, dtype):
    hidden, weight, targets = inputs(37, 33, 257, 384, dtype)
    targets.fill_(-100)
    for result in values_and_gradients(op, [hidden, weight, targets], [torch.ones((), device=DEVICE)]):
        assert (result == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*PASSES, REFERENCE])
def test_padding_takes_no_probability_and_no_gradient(op, dtype):
    hidden, weight, targets = inputs(37, 33, 257, 384, dtype)
    weight[257:] *= 100.0  # logits that would win every row
    dloss = [torch.ones((), device=DEVICE)]
    loss, dhidden, dweight = values_and_gradients(lambda *t: op(*t, vocab_size=257), [hidden, weight, targets], dloss)
    alone = values_and_gradients(op, [hidden, weight[:257].clone(), targets], dloss)
    assert (dweight[257:] == 0).all()
    assert (dweight[:257] != 0).any()
    for got, expected in zip((loss, dhidden, dweight[:257]), alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3 if dtype == torch.float32 else 2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*PASSES, REFERENCE])
def test_huge_logits_do_not_overflow(op, dtype):
    huge = torch.tensor(1e4, dtype=dtype).item()  # 9,984 in bfloat16
    hidden = torch.tensor([[huge], [-huge], [huge]], device=DEVICE, dtype=dtype)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], device=DEVICE, dtype=dtype)
    targets = torch.tensor([0, 1, 1], device=DEVICE)  # right, right, and wrong by 2 * huge
    loss, dhidden, dweight = values_and_gradients(op, [hidden, weight, targets], [torch.tensor(3.0, device=DEVICE)])
    assert loss.item() == pytest.approx(2 * huge / 3)
    torch.testing.assert_close(dhidden, torch.tensor([[0.0], [0.0], [2.0]], device=DEVICE, dtype=dtype))
    torch.testing.assert_close(dweight, torch.tensor([[huge], [-huge], [0.0]], device=DEVICE, dtype=dtype))


@pytest.mark.parametrize("op", [*PASSES, REFERENCE])
def test_equal_logits_give_ln_v(op):
    loss = op(
        torch.zeros(5, 4, device=DEVICE), randn(50304, 4, seed=0), torch.arange(5, device=DEVICE), vocab_size=50257
    )
    assert loss.item() == pytest.approx(math.log(50257), rel=1e-6)


STRIDED = [
    pytest.param(lambda t: t.T.contiguous().T, id="rows are columns in memory"),
    pytest.param(lambda t: t.repeat_interleave(2, dim=0)[::2], id="every second row"),
    pytest.param(lambda t: t.repeat_interleave(2, dim=1)[:, ::2], id="last axis not dense"),
]


@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_strided_inputs_give_the_same(op, strided):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    assert not strided(hidden).is_contiguous()
    compare(op, [strided(hidden), weight, targets], vocab_size=257)
    compare(op, [hidden, strided(weight), targets], vocab_size=257)
    compare(op, [hidden, weight, targets.repeat_interleave(2)[::2]], vocab_size=257)
    compare(op, [hidden[:1].expand_as(hidden), weight, targets], vocab_size=257)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_inputs_stay_unchanged_and_runs_are_bitwise_equal(op):
    tensors = inputs(MANY, 64, 257, 384)
    before = [t.clone() for t in tensors]
    first = values_and_gradients(op, tensors, [torch.ones((), device=DEVICE)])
    assert_bitwise(tensors, before)
    assert_bitwise(values_and_gradients(op, tensors, [torch.ones((), device=DEVICE)]), first)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_losses_that_are_added_add_their_gradients(op):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    _, dhidden, dweight = values_and_gradients(op, [hidden, weight, targets], [torch.ones((), device=DEVICE)])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = op(*leaves, targets)
    (2.0 * loss + op(*leaves, targets)).backward()
    torch.testing.assert_close(hidden.grad, 3 * dhidden, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.grad, 3 * dweight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["only hidden", "only weight"])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_one_wanted_gradient_is_enough(op, wanted):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    _, *expected = values_and_gradients(op, [hidden, weight, targets], [torch.ones((), device=DEVICE)])
    leaves = [t.detach().requires_grad_(want) for t, want in zip((hidden, weight), wanted, strict=True)]
    op(*leaves, targets).backward()
    for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*PASSES, REFERENCE])
def test_no_grad_gives_the_same_loss(op, dtype):
    hidden, weight, targets = inputs(37, 33, 257, 384, dtype)
    expected = op(hidden.detach().requires_grad_(), weight.detach().requires_grad_(), targets)
    with torch.no_grad():
        assert torch.equal(op(hidden, weight, targets), expected.detach())
    with torch.inference_mode():
        assert torch.equal(op(hidden, weight, targets), expected.detach())


@pytest.mark.parametrize("op", [PASSES[0], PASSES[2], REFERENCE])
def test_passes_gradcheck(op):
    hidden, weight, targets = inputs(4, 3, 5, 8, torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: op(h, w, targets, vocab_size=5), leaves)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_compiles_fullgraph(op, dtype):
    torch._dynamo.reset()
    tensors, dloss = inputs(37, 33, 257, 384, dtype, torch.float32), [torch.ones((), device=DEVICE)]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(lambda *t: op(*t, vocab_size=257), tensors, dloss)
    assert_bitwise(values_and_gradients(lambda *t: compiled(*t, vocab_size=257), tensors, dloss), expected)
    with torch.no_grad():
        assert torch.equal(compiled(*tensors, vocab_size=257), expected[0])


@pytest.mark.parametrize("needs_grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", [torch.clone, lambda t: t.T.contiguous().T], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("name", CUSTOM_OPS)
def test_passes_opcheck(name, layout, needs_grad):
    hidden, weight, targets = inputs(7, 5, 11, 16)
    arguments = (layout(hidden).requires_grad_(needs_grad), layout(weight).requires_grad_(needs_grad), targets)
    torch.library.opcheck(getattr(torch.ops.gpt2, name).default, (*arguments, 11, -100, needs_grad))


def test_reference_is_minus_the_log_of_the_targets_probability():
    hidden, weight, targets = inputs(7, 5, 11, 16, torch.float64)
    losses = []
    for row, target in zip((hidden @ weight.T).tolist(), targets.tolist(), strict=True):
        if target != -100:
            losses.append(-math.log(math.exp(row[target]) / sum(math.exp(z) for z in row[:11])))
    loss = linear_cross_entropy_reference(hidden, weight, targets, vocab_size=11)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_reference_gradients_are_softmax_minus_onehot():
    tensors = inputs(7, 5, 11, 16, torch.float64, ignored=False)
    hidden, weight, targets = tensors
    probs = (hidden @ weight[:11].T).softmax(dim=-1)
    dlogits = (probs - F.one_hot(targets, 11)) / 7
    got = values_and_gradients(
        lambda *t: linear_cross_entropy_reference(*t, vocab_size=11),
        tensors,
        [torch.ones((), dtype=torch.float64, device=DEVICE)],
    )
    torch.testing.assert_close(got[1], dlogits @ weight[:11], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[2], F.pad(dlogits.T @ hidden, (0, 0, 0, 5)), rtol=1e-12, atol=1e-14)


OUTSIDE = pytest.mark.parametrize(
    "target",
    [257, 383, 384, -1, -101, 2**32 + 7],
    ids=["first padding", "last padding", "past Vp", "-1", "-101", "7 in its low 32 bits"],
)


@OUTSIDE
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the loss is NaN instead: a check would synchronise")
def test_rejects_targets_outside_the_vocabulary(target):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    targets[17] = target
    with pytest.raises(ValueError, match=f"linear_cross_entropy: targets must be 0 to 256 or -100, got {target}$"):
        linear_cross_entropy_torch(hidden, weight, targets, vocab_size=257)


@OUTSIDE
@pytest.mark.parametrize("op", IMPLEMENTATIONS[DEVICE.type == "cpu" :])
def test_a_target_outside_the_vocabulary_is_a_nan_loss(op, target):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    targets[17] = target
    assert op(hidden, weight, targets, vocab_size=257).isnan()


def make(shape, dtype=torch.float32, device=DEVICE):
    return torch.ones(shape, dtype=dtype, device=device)


LABELS = make(6, torch.int64)
REJECTED = [
    pytest.param(make((2, 3, 4)), make((9, 4)), LABELS, {}, "(2, 3, 4)", id="hidden with three axes"),
    pytest.param(make((0, 4)), make((9, 4)), make(0, torch.int64), {}, "(0, 4)", id="no rows"),
    pytest.param(make((6, 4)), make((9, 5)), LABELS, {}, "(9, 5)", id="weight of another width"),
    pytest.param(make((6, 4)), make(4), LABELS, {}, "(4,)", id="weight with one axis"),
    pytest.param(make((6, 4)), make((9, 4)), make(5, torch.int64), {}, "(5,)", id="too few targets"),
    pytest.param(make((6, 4)), make((9, 4)), make((6, 1), torch.int64), {}, "(6, 1)", id="targets with two axes"),
    pytest.param(make((6, 4)), make((9, 4)), make(6, torch.int32), {}, "torch.int32", id="int32 targets"),
    pytest.param(make((6, 4)), make((9, 4)), make(6), {}, "torch.float32", id="floating targets"),
    pytest.param(make((6, 4)), make((9, 4)), make(6, torch.int64, "meta"), {}, "meta", id="targets on another device"),
    pytest.param(make((6, 4)), make((9, 4), device="meta"), LABELS, {}, "meta", id="weight on another device"),
    pytest.param(make((6, 4), torch.int64), make((9, 4)), LABELS, {}, "torch.int64", id="hidden of integers"),
    pytest.param(make((6, 4)), make((9, 4), torch.int8), LABELS, {}, "torch.int8", id="weight of integers"),
    pytest.param(make((6, 4)), make((9, 4)), LABELS, {"vocab_size": 10}, "10", id="a vocabulary over Vp"),
    pytest.param(make((6, 4)), make((9, 4)), LABELS, {"vocab_size": 0}, "0", id="no vocabulary"),
]


@pytest.mark.parametrize(("hidden", "weight", "targets", "options", "came"), REJECTED)
@pytest.mark.parametrize("op", [*IMPLEMENTATIONS, REFERENCE])
def test_rejects_with_what_came(op, hidden, weight, targets, options, came):
    with pytest.raises(ValueError, match=r"linear_cross_entropy: .*must be.*, got ") as raised:
        op(hidden, weight, targets, **options)
    assert str(raised.value).endswith(f"got {came}")
