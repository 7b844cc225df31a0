"""GELU, tanh form, alone and fused with the bias add before it.

    gelu(x) = 0.5 x (1 + tanh(u)),   u = sqrt(2 / pi) (x + 0.044715 x^3)
    bias_gelu(x, bias) = gelu(x + bias)

gelu: x and y have any shape. bias_gelu: x, y: (..., F); bias: (F,). All are float32, bfloat16 or
float16. The computation is in float32 or wider; y has x's dtype. GPT-2 was trained with this form,
not with the exact erf form.

Let s = (1 + tanh u) / 2 = sigmoid(2 u). Then gelu(x) = x s, and

    dgelu/dx = s + x s (1 - s) 2 du/dx,   du/dx = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)

Backward recomputes s from x. dbias is the sum of dx over rows.
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.column_sum import column_sum
from kernels.launch import check_floating, check_shape, check_triton, num_programs, register, require, tl, triton
from kernels.tiles import with_config


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
    """Add, then F.gelu. A single pass over memory only under torch.compile."""
    _check_bias(x, bias)
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


@triton.jit
def _sigmoid_2u(x):
    """sigmoid(2 u) = (1 + tanh u) / 2, with one exp2 and no branch.

    Its limits are exact: where exp2 overflows it is 0, where exp2 underflows it is 1.
    """
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    return 1.0 / (1.0 + tl.exp2(-2.8853900817779268 * u))  # 2 / ln 2


@triton.jit
def _derivative(x):
    """dgelu/dx = s + x s (1 - s) 2 du/dx, with s = sigmoid(2 u)."""
    s = _sigmoid_2u(x)
    du = 0.7978845608028654 * (1.0 + 0.134145 * x * x)  # 3 * 0.044715
    return s + x * s * (1.0 - s) * 2.0 * du


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    """One program computes BLOCK_SIZE consecutive elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, x * _sigmoid_2u(x), mask=mask)


@triton.jit
def _gelu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    """One program computes BLOCK_SIZE consecutive elements of dx."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dy * _derivative(x), mask=mask)


@triton.jit
def _bias_gelu_fwd_kernel(x_ptr, bias_ptr, y_ptr, N, F, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """One program computes a tile of BLOCK_ROWS rows and BLOCK_COLS columns of y."""
    col_blocks = tl.cdiv(F, BLOCK_COLS)
    rows = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(0) % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    offsets = rows[:, None] * F + cols[None, :]
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    bias = tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(y_ptr + offsets, x * _sigmoid_2u(x), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,
    N,
    F,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One program computes dx of rows_per_program rows and BLOCK_COLS columns.

    It also sums dx over these rows and writes the sum as one row of dbias, (P, F) partials.
    """
    col_blocks = tl.cdiv(F, BLOCK_COLS)
    program = tl.program_id(0) // col_blocks
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    cols = tl.program_id(0) % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    bias = tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_ROWS)
    for _ in tl.range(first, last, BLOCK_ROWS):
        offsets = rows[:, None] * F + cols[None, :]
        mask = (rows < last)[:, None] & (cols < F)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dx = dy * _derivative(x)
        tl.store(dx_ptr + offsets, dx, mask=mask)
        dbias += dx
        rows += BLOCK_ROWS
    tl.store(dbias_ptr + program * F + cols, tl.sum(dbias, axis=0), mask=cols < F)


def _allocate(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fill(y: Tensor, x: Tensor) -> None:
    n, x = x.numel(), x.contiguous()

    def start(BLOCK_SIZE: int, num_warps: int) -> None:
        _gelu_fwd_kernel[(triton.cdiv(n, BLOCK_SIZE),)](x, y, n, BLOCK_SIZE=BLOCK_SIZE, num_warps=num_warps)

    with_config("gelu_fwd", n, x.device, start)


def _allocate_backward(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fill_backward(dx: Tensor, dy: Tensor, x: Tensor) -> None:
    n, dy, x = x.numel(), dy.contiguous(), x.contiguous()

    def start(BLOCK_SIZE: int, num_warps: int) -> None:
        _gelu_bwd_kernel[(triton.cdiv(n, BLOCK_SIZE),)](dy, x, dx, n, BLOCK_SIZE=BLOCK_SIZE, num_warps=num_warps)

    with_config("gelu_bwd", n, x.device, start)


def _allocate_bias(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fill_bias(y: Tensor, x: Tensor, bias: Tensor) -> None:
    N, width, x, bias = x[..., :1].numel(), x.shape[-1], x.contiguous(), bias.contiguous()

    def start(BLOCK_ROWS: int, BLOCK_COLS: int, num_warps: int) -> None:
        grid = (triton.cdiv(N, BLOCK_ROWS) * triton.cdiv(width, BLOCK_COLS),)
        tile = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLS": BLOCK_COLS}
        _bias_gelu_fwd_kernel[grid](x, bias, y, N, width, **tile, num_warps=num_warps)

    with_config("bias_gelu_fwd", width, x.device, start)


def _allocate_bias_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _fill_bias_backward(outputs, dy: Tensor, x: Tensor, bias: Tensor) -> None:
    dx, dbias = outputs
    N, width = x[..., :1].numel(), x.shape[-1]
    tensors = [t.contiguous() for t in (dy, x, bias)]

    def start(programs_per_multiprocessor: int, BLOCK_ROWS: int, BLOCK_COLS: int, num_warps: int) -> None:
        col_blocks = triton.cdiv(width, BLOCK_COLS)
        programs = max(1, num_programs(x.device, programs_per_multiprocessor) // max(1, col_blocks))
        rows_per_program = max(1, triton.cdiv(N, programs))
        P = triton.cdiv(N, rows_per_program)
        partials = x.new_empty(P, width, dtype=torch.float32)
        tile = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLS": BLOCK_COLS}
        _bias_gelu_bwd_kernel[(P * col_blocks,)](
            *tensors, dx, partials, N, width, rows_per_program, **tile, num_warps=num_warps
        )
        column_sum(partials, dbias)

    with_config("bias_gelu_bwd", width, x.device, start)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_gelu_backward = register("gelu_backward", _allocate_backward, _fill_backward)
_gelu = register(
    "gelu", _allocate, _fill, save=_save, differentiate=lambda ctx, dy: _gelu_backward(dy, *ctx.saved_tensors)
)
_bias_gelu_backward = register("bias_gelu_backward", _allocate_bias_backward, _fill_bias_backward)
_bias_gelu = register(
    "bias_gelu",
    _allocate_bias,
    _fill_bias,
    save=_save,
    differentiate=lambda ctx, dy: _bias_gelu_backward(dy, *ctx.saved_tensors),
)


def gelu_triton(x: Tensor) -> Tensor:
    """GELU in one pass. Backward is one pass too: it reads x again and recomputes s."""
    check_floating("gelu", x=x)
    check_triton("gelu", x=x)
    return _gelu(x)


def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """Bias add and GELU in one pass. Backward is one pass and a small kernel that sums dbias."""
    _check_bias(x, bias)
    check_triton("bias_gelu", x=x, bias=bias)
    return _bias_gelu(x, bias)
