"""LayerNorm over the last axis, and the residual add fused in front of it.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps),   mean and var over the last axis
    add_layer_norm: summed = x + residual,   y = LayerNorm(summed)

x, residual, y, summed: (..., C), float32, bfloat16 or float16; weight, bias: (C,), any of these dtypes.
Statistics are float32 or wider and var is biased (divided by C); y and summed have x's dtype.
Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import check_floating, check_shape, require


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    require(x.ndim >= 1 and x.shape[-1] > 0, f"{op}: x must be (..., C) with C >= 1", tuple(x.shape))
    check_floating(op, x=x, weight=weight, bias=bias)
    check_shape(op, "weight", weight, (x.shape[-1],))
    check_shape(op, "bias", bias, (x.shape[-1],))


def _check_residual(x: Tensor, residual: Tensor) -> None:
    check_floating("add_layer_norm", x=x, residual=residual)
    check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    require(residual.dtype == x.dtype, f"add_layer_norm: residual must have x's dtype {x.dtype}", residual.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition. Every other implementation is tested against it."""
    _check("layer_norm", x, weight, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) - x.to(wide).mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (centred * rstd * weight.to(wide) + bias.to(wide)).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The definition: (y, summed)."""
    _check_residual(x, residual)
    summed = x + residual
    return layer_norm_reference(summed, weight, bias, eps), summed


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """PyTorch's F.layer_norm, parameters cast to x's dtype."""
    _check("layer_norm", x, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """An add and F.layer_norm: (y, summed). One pass only under torch.compile."""
    _check_residual(x, residual)
    summed = x + residual
    return layer_norm_torch(summed, weight, bias, eps), summed
