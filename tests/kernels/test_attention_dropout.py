"""Dropout of attention weights: choice, rate and scale, the same in forward and backward."""

import math

import pytest
import torch
from tolerances import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_bitwise,
    poisoned_memory,  # noqa: F401  (a fixture)
    randn,
    set_tiles,  # noqa: F401  (a fixture)
    values_and_gradients,
)
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention_torch, attention_triton
from kernels.tiles import FIELDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = [
    pytest.param(attention_torch, id="torch"),
    pytest.param(attention_triton, id="triton"),
]
CAUSAL = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
LARGE = (2, 65, 2, 80)  # B, T, H, D: more than a tile of tokens; heads wide enough to hold a row of weights
SMALL = (2, 17, 2, 17)
P = 0.4


def kept_weights(op, shape=SMALL, dtype=torch.float32, **options):
    """Mask of the weights that the op keeps, (B, H, T, T).

    Equal keys make every weight positive; unit vectors as values make the output equal the weights.
    """
    B, T, H, D = shape
    qkv = torch.zeros(B, T, 3, H, D, device=DEVICE, dtype=dtype)
    qkv[:, :, 2] = torch.eye(T, D, device=DEVICE)[None, :, None]
    return op(qkv.requires_grad_(), **options)[..., :T].transpose(1, 2) != 0  # runs the training kernel


def with_kept_weights(qkv, kept, is_causal):
    """Attention by its definition in qkv's precision, with a given dropout mask."""
    T, D = qkv.shape[1], qkv.shape[4]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(D)
    if is_causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=DEVICE).triu(1), -math.inf)
    return ((scores.softmax(-1) * kept / (1 - P)) @ v).transpose(1, 2)


def compare(op, shape, dtype, is_causal):
    """Compares output and gradients with the definition under the op's own dropout mask."""
    options = {"is_causal": is_causal, "dropout_p": P}
    B, T, H, D = shape
    qkv, dout = randn(B, T, 3, H, D, seed=0, dtype=dtype), randn(B, T, H, D, seed=1, dtype=dtype)
    torch.manual_seed(0)
    kept = kept_weights(op, shape, dtype, **options)
    torch.manual_seed(0)
    got = values_and_gradients(lambda x: op(x, **options), [qkv], [dout])
    theirs = values_and_gradients(lambda x: with_kept_weights(x, kept, is_causal), [qkv], [dout])
    exact = values_and_gradients(
        lambda x: with_kept_weights(x, kept, is_causal).contiguous(), [qkv.double()], [dout.double()]
    )
    assert_accurate(got, theirs, exact, dtype, "out dqkv")


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_forward_and_backward_drop_the_same_weights(op, dtype, is_causal):
    compare(op, LARGE, dtype, is_causal)


@CAUSAL
@pytest.mark.parametrize("op", [attention_triton], ids=["triton"])
def test_no_two_kernels_need_the_same_tile(op, is_causal, set_tiles):  # noqa: F811
    tiles = {"attention_fwd": (64, 32), "attention_bwd_dq": (32, 64), "attention_bwd_dkdv": (16, 32)}

    def lookup(name, arch, size):
        kernel = name.partition("/")[0]
        return dict(zip(FIELDS[kernel], (*tiles[kernel], 4, 2), strict=True))

    set_tiles(lookup)
    compare(op, (1, 65, 2, 80), torch.float32, is_causal)


@pytest.mark.slow
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_weights_are_kept_and_scaled_so_that_the_mean_stays(op):
    B, T, H, p = 4, 64, 4, 0.25
    qkv = torch.zeros(B, T, 3, H, T, device=DEVICE)
    qkv[:, :, 2] = torch.eye(T, device=DEVICE)[None, :, None]  # so that the output is the matrix of weights
    torch.manual_seed(0)
    weights = op(qkv, dropout_p=p, is_causal=False)  # (B, T, H, T), each 1/T before dropout
    kept = weights != 0
    assert torch.allclose(weights[kept], torch.tensor(1.0 / (T * (1 - p)), device=DEVICE), rtol=1e-5)
    sigma = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * sigma
    rows = {tuple(row.tolist()) for row in kept.flatten(0, 2).int()}
    assert len(rows) > 0.99 * B * T * H  # no two rows, heads or batches share their choice
    columns = {tuple(column.tolist()) for column in kept.transpose(1, 3).flatten(0, 2).int()}
    assert len(columns) > 0.99 * B * T * H


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_the_choice_follows_the_random_state(op):
    choices = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        choices.append(kept_weights(op, dropout_p=P))
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])
    assert not torch.equal(kept_weights(op, dropout_p=P), choices[2])  # the next call of a run


def test_the_same_seed_tensor_gives_the_same_choice():
    def with_seed(seed):
        tensor = torch.tensor([seed], device=DEVICE)
        return kept_weights(lambda qkv: torch.ops.gpt2.attention(qkv, tensor, False, P, 1.0)[0])

    first = with_seed(2**62 - 1)
    assert torch.equal(with_seed(2**62 - 1), first)
    assert not torch.equal(with_seed(2**62 - 2), first)
    assert not torch.equal(with_seed(2**32 - 1), first)  # all of its bits count


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_recomputing_drops_the_same_weights(op):
    qkv, dout = randn(2, 17, 3, 2, 16, seed=0), randn(2, 17, 2, 16, seed=1)

    def run(function):
        torch.manual_seed(0)
        return values_and_gradients(function, [qkv], [dout])

    expected = run(lambda x: op(x, dropout_p=P))
    assert_bitwise(run(lambda x: checkpoint(op, x, dropout_p=P, use_reentrant=False)), expected)
    other = run(lambda x: checkpoint(op, x, dropout_p=P, use_reentrant=False, preserve_rng_state=False))
    assert not torch.equal(other[1], expected[1])
