"""Inputs of the LM head's cross-entropy, and the comparison of an implementation with its definition."""

import math
from unittest import mock

import torch
import torch.nn.functional as F
from tolerances import DEVICE, assert_accurate, randn, values_and_gradients, widened

import kernels.cross_entropy
from kernels.cross_entropy import linear_cross_entropy_reference, linear_cross_entropy_torch

NAMES = "loss dhidden dweight"


def pytorch(hidden, weight, targets, *, vocab_size=None, ignore_index=-100):
    """PyTorch's own ops: the product in hidden's precision, its cross-entropy in float32."""
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :vocab_size]
    return F.cross_entropy(
        logits.to(torch.promote_types(hidden.dtype, torch.float32)), targets, ignore_index=ignore_index
    )


def torch_as_on_a_gpu(*args, **options):
    """PyTorch's implementation with the passes over the logits that it makes on a GPU."""
    few_passes = kernels.cross_entropy._fill_strip_in_few_passes
    with mock.patch.object(kernels.cross_entropy, "_fill_strip_on_a_cpu", few_passes):
        return linear_cross_entropy_torch(*args, **options)


def inputs(N, C, V, Vp, dtype=torch.float32, weight_dtype=None, ignored=True):
    """hidden, weight and targets, a third of them ignored; logits have a variance near 1."""
    hidden = randn(N, C, seed=0, dtype=dtype)
    weight = (randn(Vp, C, seed=1) / math.sqrt(C)).to(weight_dtype or dtype)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    if ignored and N > 2:
        targets[1::3] = -100
    return [hidden, weight, targets.to(DEVICE)]


def compare(op, tensors, **options):
    """Compares the loss, and the gradients of N * loss, which are of order 1."""
    hidden, weight, _ = tensors
    dloss = torch.tensor(float(hidden.shape[0]), device=DEVICE, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def run(function, inputs, dloss):
        return values_and_gradients(lambda *t: function(*t, **options), inputs, [dloss])

    got = run(op, tensors, dloss)
    exact = run(linear_cross_entropy_reference, widened(tensors), dloss.double())
    assert [t.dtype for t in got] == [dloss.dtype, hidden.dtype, weight.dtype]
    assert_accurate(got, run(pytorch, tensors, dloss), exact, hidden.dtype, NAMES)
