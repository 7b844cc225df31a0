"""Causal self-attention on packed queries, keys and values.

    out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h]) v[b, j, h],   j <= i when causal

qkv: (B, T, 3, H, D), the fused projection's output viewed in place; out: (B, T, H, D), so that the next
linear layer reads it as (B, T, H * D) without a copy. T >= 1. Scores and softmax are float32 or wider; out
has qkv's dtype. `scale` is 1 / sqrt(D) unless given. `dropout_p` drops attention weights, not outputs.
Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import check_floating, require


def _check(qkv: Tensor, dropout_p: float) -> None:
    require(qkv.ndim == 5 and qkv.shape[2] == 3, "attention: qkv must be (B, T, 3, H, D)", tuple(qkv.shape))
    require(min(qkv.shape) > 0, "attention: every size of qkv must be at least 1", tuple(qkv.shape))
    require(0.0 <= dropout_p < 1.0, "attention: dropout_p must be at least 0 and below 1", dropout_p)
    check_floating("attention", qkv=qkv)


def attention_reference(
    qkv: Tensor, *, is_causal: bool = True, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """The definition. Every other implementation is tested against it."""
    _check(qkv, dropout_p)
    T, D = qkv.shape[1], qkv.shape[4]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D) if scale is None else scale)  # (B, H, T, T)
    if is_causal:
        future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return (weights @ v).permute(0, 2, 1, 3).to(qkv.dtype).contiguous()


def attention_torch(
    qkv: Tensor, *, is_causal: bool = True, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """PyTorch's scaled_dot_product_attention on strided views of qkv: nothing is copied on the way in."""
    _check(qkv, dropout_p)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), a view
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).contiguous()  # flash kernels already lay it out as (B, T, H, D): then a view
