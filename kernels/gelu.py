"""GELU in its tanh form, and the bias add fused in front of it.

    gelu(x) = 0.5 x (1 + tanh(u)),   u = sqrt(2 / pi) (x + 0.044715 x^3);   bias_gelu(x, bias) = gelu(x + bias)

x, y: any shape, for bias_gelu (..., F) with bias (F,); float32, bfloat16 or float16. Arithmetic is float32 or
wider; y has x's dtype. GPT-2 was trained with this form, not with the exact erf form.
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import check_floating, check_shape, require


def _check_bias(x: Tensor, bias: Tensor) -> None:
    require(x.ndim >= 1, "bias_gelu: x must be (..., F)", tuple(x.shape))
    check_floating("bias_gelu", x=x, bias=bias)
    check_shape("bias_gelu", "bias", bias, (x.shape[-1],))


def gelu_reference(x: Tensor) -> Tensor:
    """The definition. Every other implementation is tested against it."""
    check_floating("gelu", x=x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    u = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1.0 + torch.tanh(u))).to(x.dtype)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The definition."""
    _check_bias(x, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    return gelu_reference(x.to(wide) + bias.to(wide)).to(x.dtype)


def gelu_torch(x: Tensor) -> Tensor:
    """PyTorch's F.gelu."""
    check_floating("gelu", x=x)
    return F.gelu(x, approximate="tanh")


def bias_gelu_torch(x: Tensor, bias: Tensor) -> Tensor:
    """An add and F.gelu. One pass only under torch.compile."""
    _check_bias(x, bias)
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")
