"""Attention within documents: right for many lengths, exactly nothing from outside, and blocks outside are not read."""

import math

import pytest
import torch
from test_attention import IMPLEMENTATIONS, inputs, pytorch
from test_attention_dropout import kept_weights
from test_attention_variants import choose, launched_with
from tolerances import (
    DEVICE,
    assert_accurate,
    assert_bitwise,
    poisoned_memory,  # noqa: F401  (a fixture)
    set_tiles,  # noqa: F401  (a fixture)
    values_and_gradients,
    widened,
)

from kernels import dispatch
from kernels.alternatives import attention_flash
from kernels.attention import attention_reference, attention_torch, attention_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WITH_REFERENCE = [*IMPLEMENTATIONS, pytest.param(attention_reference, id="reference")]
T = 37
LENGTHS = {  # of the documents in 37 tokens; a block is 16 or 32
    "one document": [37],
    "each token alone": [1] * 37,
    "borders of blocks": [16, 16, 5],
    "around borders": [15, 2, 14, 2, 4],
    "a long one in the middle": [3, 30, 4],
    "a short one first": [1, 36],
    "a short one last": [36, 1],
    "random": [7, 1, 12, 5, 12],
}


def starts_of(*documents):
    """(B, T) int32: the row where the document of each row begins. documents: lengths, of each sequence."""
    rows = [[sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)] for lengths in documents]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def within(op, starts, **options):
    return lambda x: op(x, starts=starts, **options)


def compare(op, qkv, dout, starts):
    exact = values_and_gradients(within(attention_reference, starts), widened([qkv]), widened([dout]))
    theirs = values_and_gradients(within(attention_torch, starts), [qkv], [dout])
    assert_accurate(values_and_gradients(within(op, starts), [qkv], [dout]), theirs, exact, qkv.dtype, "out dqkv")


def test_the_definition_is_attention_of_each_document_alone():
    qkv, dout = (t.double() for t in inputs((len(LENGTHS), T, 2, 4)))
    got = values_and_gradients(within(attention_reference, starts_of(*LENGTHS.values())), [qkv], [dout])
    for row, lengths in enumerate(LENGTHS.values()):
        begin = 0
        for n in lengths:
            part = (slice(row, row + 1), slice(begin, begin + n))
            expected = values_and_gradients(pytorch, [qkv[part]], [dout[part]])
            assert_accurate([t[part] for t in got], expected, expected, torch.float64, "out dqkv")
            begin += n


@pytest.mark.parametrize(
    ("op", "tile", "names"),
    [
        pytest.param(attention_torch, (16, 16), [*LENGTHS], id="torch"),
        pytest.param(attention_triton, (32, 16), [*LENGTHS][1::2], id="triton, more queries than keys"),
        pytest.param(attention_triton, (16, 32), [*LENGTHS][::2], id="triton, more keys"),
        *(
            pytest.param(attention_triton, tile, [*LENGTHS], id=f"triton, {tile}", marks=pytest.mark.slow)
            for tile in ((16, 16), (32, 16), (16, 32), (64, 16), (16, 64))
        ),
    ],
)
def test_documents_of_any_length_match_reference(op, tile, names, set_tiles):  # noqa: F811
    choose(set_tiles, {}, *tile)
    compare(op, *inputs((len(names), T, 1, 16)), starts_of(*(LENGTHS[name] for name in names)))


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
@pytest.mark.parametrize("documents", [[[1]], [[5, 60]]], ids=str)
def test_the_shipped_tiles_match_reference(op, documents):
    compare(op, *inputs((1, sum(documents[0]), 1, 17)), starts_of(*documents))


@pytest.mark.parametrize("settings", [{"PAIR_BLOCKS": 1}, {"ONE_LAUNCH": 1}, {"EXP2_POLYNOMIAL": 1}], ids=str)
def test_a_variant_matches_reference(settings, set_tiles):  # noqa: F811
    choose(set_tiles, settings)
    compare(attention_triton, *inputs((1, T, 1, 16), torch.float16), starts_of(LENGTHS["around borders"]))
    assert launched_with(settings)


def test_one_document_has_the_bits_of_no_documents(set_tiles):  # noqa: F811
    choose(set_tiles, {}, 32, 16)
    qkv, dout = inputs((1, T, 1, 16))
    got = values_and_gradients(within(attention_triton, starts_of([T])), [qkv], [dout])
    assert_bitwise(got, values_and_gradients(attention_triton, [qkv], [dout]))


def test_a_document_that_begins_with_a_block_has_the_bits_that_it_has_alone(set_tiles):  # noqa: F811
    choose(set_tiles, {}, 32, 16)
    qkv, dout = inputs((1, 51, 1, 16))
    got = values_and_gradients(within(attention_triton, starts_of([32, 19])), [qkv], [dout])
    for part in (slice(0, 32), slice(32, 51)):
        alone = values_and_gradients(attention_triton, [qkv[:, part]], [dout[:, part]])
        assert_bitwise([t[:, part] for t in got], alone)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the rows that do overflow
@pytest.mark.parametrize("op", WITH_REFERENCE)
def test_nothing_of_another_document_enters_a_result(op, set_tiles):  # noqa: F811
    choose(set_tiles, {}, 16, 16)
    starts = starts_of([7, 13, 5])
    own = torch.zeros(25, dtype=torch.bool, device=DEVICE)
    own[7:20] = True
    qkv, dout = inputs((1, 25, 1, 16))
    before = values_and_gradients(within(op, starts), [qkv], [dout])
    huge = 1e30 if op is attention_triton else 1e15  # products of 1e30 are infinite: NaN on PyTorch's ops
    for tensor in (qkv, dout):
        tensor[:, ~own] *= huge
    after = values_and_gradients(within(op, starts), [qkv], [dout])
    assert_bitwise([t[:, own] for t in after], [t[:, own] for t in before])


@pytest.mark.parametrize("op", WITH_REFERENCE)
def test_the_gradient_of_a_document_in_another_is_exactly_0(op, set_tiles):  # noqa: F811
    choose(set_tiles, {}, 16, 32)
    qkv, dout = inputs((1, 25, 1, 16))
    dout[:, :7], dout[:, 20:] = 0.0, 0.0
    dqkv = values_and_gradients(within(op, starts_of([7, 13, 5])), [qkv], [dout])[1]
    assert (dqkv[:, :7] == 0).all()
    assert (dqkv[:, 20:] == 0).all()
    assert (dqkv[:, 7:20, 2] != 0).all()


@pytest.mark.parametrize(
    ("lengths", "poisoned", "clean"),
    [
        pytest.param([16, 16, 8], [slice(0, 16), slice(32, 40)], slice(16, 32), id="the documents around"),
        pytest.param([20, 20], [slice(0, 16)], slice(32, 40), id="blocks before that of the begin"),
        pytest.param([5, 13, 22], [slice(32, 40)], slice(0, 16), id="blocks after that of the end"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the rows that are NaN
def test_blocks_outside_are_skipped_not_masked(lengths, poisoned, clean, set_tiles):  # noqa: F811
    choose(set_tiles, {}, 16, 16)
    qkv, dout = inputs((1, 40, 1, 16))
    starts = starts_of(lengths)
    expected = values_and_gradients(within(attention_reference, starts), [qkv], [dout])
    for part in poisoned:
        qkv[:, part], dout[:, part] = math.nan, math.nan  # 0 * NaN would show
    got = values_and_gradients(within(attention_triton, starts), [qkv], [dout])
    torch.testing.assert_close([t[:, clean] for t in got], [t[:, clean] for t in expected], rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_same_weights_with_and_without_documents():
    starts = starts_of([5, 1, 11])
    masks = []
    for options in ({}, {"starts": starts}):
        torch.manual_seed(0)
        masks.append(kept_weights(attention_triton, (1, 17, 1, 17), dropout_p=0.4, **options))
    columns = torch.arange(17, device=DEVICE)
    seen = (columns <= columns[:, None]) & (columns >= starts[:, None, :, None])
    assert torch.equal(masks[1], masks[0] & seen)

    qkv, dout = inputs((1, 17, 1, 17))

    def dropped(x):
        q, k, v = x.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(17)).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) * masks[1] / 0.6 @ v).transpose(1, 2).contiguous()

    torch.manual_seed(0)
    got = values_and_gradients(within(attention_triton, starts, dropout_p=0.4), [qkv], [dout])
    exact = values_and_gradients(dropped, [qkv.double()], [dout.double()])
    assert_accurate(got, got, exact, torch.float32, "out dqkv")


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_other_documents_neither_break_nor_recompile_a_graph(op):
    torch._dynamo.reset()
    qkv, dout = inputs((1, 17, 1, 16))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    try:
        for lengths in ([17], [1, 9, 7]):
            starts = starts_of(lengths)
            got = values_and_gradients(within(compiled, starts), [qkv], [dout])
            expected = values_and_gradients(within(attention_reference, starts), [qkv], [dout])
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")


def test_documents_pass_opcheck():
    qkv, dout = inputs((1, 5, 1, 16))
    options = (None, True, 0.0, 0.25, starts_of([2, 3]))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # a compiled graph is tested above
    torch.library.opcheck(torch.ops.gpt2.attention.default, (qkv.requires_grad_(), *options), test_utils=checks)
    backward = (dout, qkv.detach(), *torch.ops.gpt2.attention(qkv.detach(), *options), *options)
    torch.library.opcheck(torch.ops.gpt2.attention_backward.default, backward, test_utils=checks)


REJECTED = [
    pytest.param(torch.zeros(2, 4), {}, "starts must be int32, got torch.float32", id="floats"),
    pytest.param(torch.zeros(2, 4).long(), {}, "starts must be int32, got torch.int64", id="int64"),
    pytest.param(torch.zeros(4).int(), {}, r"starts must be \(2, 4\), got \(4,\)", id="one row"),
    pytest.param(torch.zeros(2, 5).int(), {}, r"starts must be \(2, 4\), got \(2, 5\)", id="one token too many"),
    pytest.param(torch.zeros(4, 2).int().T, {}, r"starts must be contiguous, got \(1, 2\)", id="transposed"),
    pytest.param(torch.zeros(2, 4, device="meta").int(), {}, "starts must be on .*, got meta", id="another device"),
    pytest.param(
        torch.zeros(2, 4).int(), {"is_causal": False}, "is_causal must be True where starts are given, got False",
        id="not causal",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("starts", "options", "sentence"), REJECTED)
@pytest.mark.parametrize("op", WITH_REFERENCE)
def test_rejects_with_what_came(op, starts, options, sentence):
    starts = starts if starts.is_meta else starts.to(DEVICE)
    with pytest.raises(ValueError, match=f"^attention: {sentence}$"):
        op(torch.zeros(2, 4, 3, 1, 16, device=DEVICE), starts=starts, **options)


def test_a_pinned_backend_leaves_documents_to_pytorch_and_dispatch_says_so():
    qkv, _ = inputs((2, 5, 2, 16))
    starts = starts_of([2, 3], [5])
    torch.testing.assert_close(attention_flash(qkv, starts=starts), attention_torch(qkv, starts=starts))
    tuned = {"attention": "flash"}
    for has_documents, expected in ((False, "flash"), (True, "torch")):
        ops = dispatch.select("auto", "cpu", torch.float32, 16, tuned=tuned, has_documents=has_documents)
        assert ops.choices[0].implementation == expected
