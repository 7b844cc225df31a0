"""What one would otherwise run in place of an op: what `gpt2 tune` and the benchmarks also time.

Each has the signature of its op in kernels/attention.py or kernels/cross_entropy.py. attention_*:
scaled_dot_product_attention with its backend pinned, on strided views of qkv. A backend that cannot
run such inputs on this device raises RuntimeError. linear_cross_entropy_unchunked stores all logits:
under torch.compile, Inductor fuses its softmax.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention_torch


def attention_sdpa(
    qkv: Tensor,
    *,
    backends: Sequence[SDPBackend],
    is_causal: bool = True,
    dropout_p: float = 0.0,
    scale: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """PyTorch's attention by one of these backends. qkv: (B, T, 3, H, D); out: (B, T, H, D).

    One position, as a prompt may have, is left to PyTorch's choice: cuDNN refuses it. So are
    documents, whose mask FlashAttention refuses.
    """
    if qkv.shape[1] == 1 or starts is not None:
        return attention_torch(qkv, is_causal=is_causal, dropout_p=dropout_p, scale=scale, starts=starts)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    with sdpa_kernel(list(backends)):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).contiguous()


def attention_cudnn(qkv: Tensor, **options) -> Tensor:
    """PyTorch's attention by cuDNN."""
    return attention_sdpa(qkv, backends=(SDPBackend.CUDNN_ATTENTION,), **options)


def attention_flash(qkv: Tensor, **options) -> Tensor:
    """PyTorch's FlashAttention; a CPU has its own."""
    return attention_sdpa(qkv, backends=(SDPBackend.FLASH_ATTENTION,), **options)


def attention_efficient(qkv: Tensor, **options) -> Tensor:
    """PyTorch's memory-efficient attention."""
    return attention_sdpa(qkv, backends=(SDPBackend.EFFICIENT_ATTENTION,), **options)


def attention_math(qkv: Tensor, **options) -> Tensor:
    """PyTorch's attention from matrix products and a softmax."""
    return attention_sdpa(qkv, backends=(SDPBackend.MATH,), **options)


def linear_cross_entropy_unchunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None = None, ignore_index: int = -100
) -> Tensor:
    """A matrix product, then the cross-entropy of its logits in float32 or wider."""
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :vocab_size]
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)
