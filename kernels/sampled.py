"""Cross-entropy of the language-model head over a sample of the vocabulary, for training.

    Z_i = sum over frequent tokens and targets of exp z_ij  +  R / S * sum over the sample of exp z_ij
    loss = mean over targets not ignored of  log Z_i - z_i[target_i],   z = hidden weight^T

The frequent tokens and all targets of the call are always computed. Of the R other tokens S are
drawn uniformly without replacement, the same for all rows. Given hidden and targets each of the R is
in the sample with probability S / R, so the mean of Z_i over samples is the full softmax's Z_i.
The matrix products shrink to (frequent + targets + S) / V, and a weight R / S is a bias of
log(R / S) on its logit, so the rest is an ordinary cross-entropy.

The loss is biased low, because the logarithm is concave. To second order

    E[log Z_i] - log(exact Z_i) = -Var(Z_i) / (2 Z_i^2),   Var(Z_i) = R^2 / S (1 - S / R) s_i^2

with s_i^2 the variance of exp z_ij over the R tokens (divided by R - 1). The gradient is that of the
estimate, and its bias is of the same order. With S >= R nothing is left out, and the loss is exact.

hidden: (N, C) and weight: (Vp, C), any floating dtype; targets: (N,) int64; loss: scalar, float32 at
least. Draws from PyTorch's global generator. PyTorch only: on a GPU the number of targets would
synchronise.
Source: Bengio & Senecal 2003, "Quick training of probabilistic neural nets by importance sampling";
Jean et al. 2015, arXiv:1412.2007, section 3, which shares one sample among the rows of a batch.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.launch import require

LOGITS = 8_000_000  # held at once: 32 MB in float32, of which there are several copies


def sampled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    frequent: Tensor,
    size: int,
    ignore_index: int = -100,
) -> Tensor:
    """Mean loss over frequent tokens, targets and a sample of `size` of the others.

    frequent: (F,) int64. Raises ValueError if a target is outside the vocabulary.
    """
    require(size >= 1, "sampled_cross_entropy: size must be at least 1", size)
    V = weight.shape[0] if vocab_size is None else vocab_size
    is_valid = targets != ignore_index
    is_outside = is_valid & ((targets < 0) | (targets >= V))
    if is_outside.any():
        got = targets[is_outside][0].item()
        require(False, f"sampled_cross_entropy: targets must be 0 to {V - 1} or {ignore_index}", got)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens, log_weights = draw(torch.cat([frequent, targets[is_valid]]), V, size, wide)
    columns = torch.empty(V, dtype=torch.int64).index_copy_(0, tokens, torch.arange(len(tokens)))
    labels = torch.where(is_valid, columns[torch.where(is_valid, targets, 0)], -1)
    kept = F.embedding(tokens, weight).to(hidden.dtype)  # (n, C)

    def loss(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = F.linear(rows, kept).to(wide).add_(log_weights)
        return F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")

    chunk = max(1, LOGITS // len(tokens))
    if len(hidden) > chunk:  # backward computes the logits of each chunk again, so that one chunk's are held at once
        loss = functools.partial(checkpoint, loss, use_reentrant=False, preserve_rng_state=False)
    total = sum(map(loss, hidden.split(chunk), labels.split(chunk)), torch.zeros((), dtype=wide))
    return total / is_valid.sum().clamp(min=1)


def draw(certain: Tensor, vocab_size: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens to compute, each once, and the logarithms of their weights: (n,) int64, and (n,) of this dtype.

    They are the certain ones, of weight 1, and `size` of the R others, of weight R / size.
    """
    is_certain = torch.zeros(vocab_size, dtype=torch.bool)
    is_certain[certain] = True
    certain, others = is_certain.nonzero().squeeze(1), (~is_certain).nonzero().squeeze(1)
    sample = others[torch.randperm(len(others))[:size]]
    log_weights = torch.zeros(len(certain) + len(sample), dtype=dtype)
    log_weights[len(certain) :] = math.log(len(others) / max(1, len(sample)) or 1.0)
    return torch.cat([certain, sample]), log_weights
