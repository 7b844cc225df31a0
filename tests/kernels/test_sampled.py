"""Sampled cross-entropy against float64 definitions, over all samples where their number allows it."""

import itertools
import math

import pytest
import torch
from tolerances import TOLERANCE
from torch import Tensor

from kernels import sampled
from kernels.cross_entropy import linear_cross_entropy_reference
from kernels.sampled import sampled_cross_entropy

V, FREQUENT, SIZE = 12, torch.tensor([7, 2]), 3
TARGETS = torch.tensor([2, 5, 9, 5])  # so 2, 5, 7 and 9 are certain, and 8 others are not
OTHERS = [0, 1, 3, 4, 6, 8, 10, 11]


def inputs(N: int = 4, C: int = 5, Vp: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, C, dtype=torch.float64), torch.randn(Vp, C, dtype=torch.float64)


def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor = TARGETS, seed: int = 0, **changes) -> Tensor:
    torch.manual_seed(seed)
    options = {"vocab_size": V, "frequent": FREQUENT, "size": SIZE} | changes
    return sampled_cross_entropy(hidden, weight, targets, **options)


@pytest.fixture
def samples(monkeypatch):
    """Iterates over all samples: each pass of the loop draws the next one."""

    def each():
        for chosen in itertools.combinations(range(len(OTHERS)), SIZE):
            monkeypatch.setattr(torch, "randperm", lambda n, chosen=chosen: torch.tensor(chosen))
            yield [OTHERS[place] for place in chosen]

    return each


def partitions(samples, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(estimates of row 1's partition function, one per sample; its exact value)."""
    hidden, target = hidden[1:2], TARGETS[1:2]
    certain = torch.tensor([2, 7, 9])  # with its target, those of the whole batch
    estimates = [loss_of(hidden, weight, target, frequent=certain) + hidden[0] @ weight[target[0]] for _ in samples()]
    return torch.stack(estimates).exp(), (weight[:V] @ hidden[0]).exp().sum()


def test_the_mean_partition_function_over_all_samples_is_the_full_one(samples):
    estimates, exact = partitions(samples, *inputs())
    assert len(estimates) == math.comb(len(OTHERS), SIZE)
    assert estimates.std() > 0.1 * exact
    torch.testing.assert_close(estimates.mean(), exact, rtol=1e-12, atol=0)


def test_variance_and_bias_are_those_of_the_docstring(samples):
    hidden, weight = inputs()
    weight = 0.3 * weight  # so that third-order terms are small
    estimates, exact = partitions(samples, hidden, weight)
    R, values = len(OTHERS), (weight[OTHERS] @ hidden[1]).exp()
    variance = R**2 / SIZE * (1 - SIZE / R) * values.var()
    torch.testing.assert_close(estimates.var(correction=0), variance, rtol=1e-12, atol=0)
    bias = estimates.log().mean() - exact.log()
    assert bias < 0
    assert bias.item() == pytest.approx(-(variance / (2 * exact**2)).item(), rel=0.1)


def test_loss_and_gradients_are_those_of_a_weighted_softmax(samples):
    hidden, weight = inputs()
    for sample in itertools.islice(samples(), 0, None, 11):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(h, w)
        loss.backward()
        weights = torch.zeros(16, dtype=torch.float64)  # of each token's exponential
        weights[[2, 5, 7, 9]], weights[sample] = 1.0, len(OTHERS) / SIZE
        terms = weights * (hidden @ weight.T).exp()
        onehot = torch.nn.functional.one_hot(TARGETS, 16)
        expected = (terms.sum(1).log() - (hidden * weight[TARGETS]).sum(1)).mean()
        dz = (terms / terms.sum(1, keepdim=True) - onehot) / len(TARGETS)
        for ours, theirs in ((loss.detach(), expected), (h.grad, dz @ weight), (w.grad, dz.T @ hidden)):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("changes", [{"frequent": torch.arange(V)}, {"size": V}], ids=["all frequent", "all sampled"])
def test_with_every_token_it_is_the_full_loss_with_its_gradients(changes):
    found = []
    for loss in (
        lambda *args: loss_of(*args, **changes),
        lambda *args: linear_cross_entropy_reference(*args, vocab_size=V),
    ):
        h, w = (tensor.requires_grad_() for tensor in inputs())
        value = loss(h, w, TARGETS)
        found.append((value, *torch.autograd.grad(value, (h, w))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_in_chunks_of_rows_it_is_the_same_loss_with_the_same_gradients(monkeypatch):
    found, (hidden, weight), real = [], inputs(), torch.nn.functional.cross_entropy
    for held, rows in ((sampled.LOGITS, 4), (20, 2), (1, 1)):
        sizes = []
        monkeypatch.setattr(sampled, "LOGITS", held)
        monkeypatch.setattr(
            sampled.F, "cross_entropy", lambda z, *a, s=sizes, **k: s.append(len(z)) or real(z, *a, **k)
        )
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(h, w)
        assert sizes == [rows] * (4 // rows)
        torch.rand(1)  # backward draws nothing, whatever was drawn since
        found.append((loss, *torch.autograd.grad(loss, (h, w))))
    for chunked in found[1:]:
        torch.testing.assert_close(chunked, found[0], rtol=1e-12, atol=1e-14)


def test_ignored_rows_count_for_nothing():
    hidden, weight = inputs()
    targets = torch.tensor([2, -100, 9, -100])
    assert loss_of(hidden, weight, targets) == loss_of(hidden[::2], weight, targets[::2])
    high = torch.where(targets < 0, 5 * V, targets)
    assert loss_of(hidden, weight, high, ignore_index=5 * V) == loss_of(hidden, weight, targets)
    assert loss_of(hidden, weight, torch.full((4,), -100)) == 0.0


def test_the_sample_is_a_function_of_the_seed():
    hidden, weight = inputs()
    losses = {seed: loss_of(hidden, weight, seed=seed).item() for seed in range(5)}
    assert len(set(losses.values())) > 1
    assert all(loss_of(hidden, weight, seed=seed).item() == losses[seed] for seed in losses)


def test_bfloat16_hidden_keeps_the_logarithm_of_a_weight_exact():
    """Logits of zero have no rounding: the loss is ln V, which bfloat16 would miss by 1e-2."""
    loss = sampled_cross_entropy(
        torch.zeros(4, 5).bfloat16(), torch.zeros(1000, 5), TARGETS, frequent=FREQUENT, size=SIZE
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(1000), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_hidden_s_gradients_in_chunks_are_float64_s_of_the_same_sample(monkeypatch, dtype):
    """Weight, logits and gradients are rounded, so three roundings are allowed."""
    monkeypatch.setattr(sampled, "LOGITS", 100)  # 28 tokens: eight chunks of three rows
    hidden, weight = inputs(N=24, C=16, Vp=64)
    hidden, weight, found = hidden.to(dtype), 0.3 * weight.float(), []
    for each in ((hidden, weight), (hidden.double(), weight.double())):
        h, w = (tensor.clone().requires_grad_() for tensor in each)
        found.append(torch.autograd.grad(loss_of(h, w, 2 * torch.arange(24), vocab_size=64), (h, w)))
    assert [gradient.dtype for gradient in found[0]] == [dtype, torch.float32]
    for ours, exact in zip(*found, strict=True):
        error = (ours.double() - exact).abs().max()
        assert error <= 3 * TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("target", [V, -1])
def test_a_target_outside_the_vocabulary_is_refused(target):
    with pytest.raises(ValueError, match=f"targets must be 0 to 11 or -100, got {target}"):
        loss_of(*inputs(), torch.tensor([2, target, 9, 5]))


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        loss_of(*inputs(), size=0)
