"""LayerNorm over the last axis, alone and fused with the residual add before it.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
    add_layer_norm: summed = x + residual,   y = LayerNorm(summed)

x, residual, y, summed: (..., C), float32, bfloat16 or float16; y and summed have x's dtype.
weight, bias: (C,), any of these dtypes. mean and var are over a row's C elements, in float32 or
wider; var is biased (divided by C).

Backward: let n = (x - mean) rstd and g = dy weight. mean and rstd depend on every x_j of a row:

    dmean/dx_j = 1 / C,   drstd/dx_j = -rstd^2 n_j / C
    dn_i/dx_j = rstd ([i = j] - 1 / C - n_i n_j / C)

so that, with sum(...) over a row's C elements,

    dx = rstd (g - sum(g) / C - n sum(g n) / C)
    dweight = sum over rows of dy n,   dbias = sum over rows of dy

In add_layer_norm, x and residual have the same gradient: dx above plus dsummed.
Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.column_sum import column_sum
from kernels.launch import (
    check_floating,
    check_shape,
    check_triton,
    num_programs,
    register,
    require,
    tl,
    triton,
)
from kernels.tiles import with_config


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
    """The definition. Returns (y, summed)."""
    _check_residual(x, residual)
    summed = x + residual
    return layer_norm_reference(summed, weight, bias, eps), summed


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """PyTorch's F.layer_norm, with the parameters cast to x's dtype."""
    _check("layer_norm", x, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add, then F.layer_norm. Returns (y, summed).

    A single pass over memory only under torch.compile.
    """
    _check_residual(x, residual)
    summed = x + residual
    return layer_norm_torch(summed, weight, bias, eps), summed


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    summed_ptr,
    mean_ptr,
    rstd_ptr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises one row, after adding the residual's row if there is a residual."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    x = tl.load(x_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
        summed = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * C + cols, summed, mask=mask)
        x = summed.to(tl.float32)  # the rounded sum, which is what backward reads
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)

    # The row is in registers, so var is computed from x - mean: E[x^2] - E[x]^2 would cancel where
    # the mean is large.
    mean = tl.sum(x, axis=0) / C
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + EPS)
    tl.store(y_ptr + row * C + cols, centred * rstd * weight + bias, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dsummed_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    N,
    rows_per_program,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_PARAMETERS: tl.constexpr,
):
    """One program computes dx of rows_per_program consecutive rows.

    With SUM_PARAMETERS it also sums dweight and dbias over these rows in registers. It writes each
    sum once, as one row of (P, C) partials.
    """
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    offsets = first.to(tl.int64) * C + cols
    for row in tl.range(first, last):
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        dnormed = dy * weight
        dx = rstd * (dnormed - tl.sum(dnormed, axis=0) / C - normed * (tl.sum(dnormed * normed, axis=0) / C))
        if dsummed_ptr is not None:
            dx += tl.load(dsummed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx, mask=mask)
        if SUM_PARAMETERS:
            dweight += dy * normed
            dbias += dy
        offsets += C
    if SUM_PARAMETERS:
        tl.store(dweight_ptr + program * C + cols, dweight, mask=mask)
        tl.store(dbias_ptr + program * C + cols, dbias, mask=mask)


@triton.jit
def _layer_norm_bwd_parameters_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    N,
    C,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program sums dweight and dbias of BLOCK_C columns over rows_per_program rows.

    It runs if a row is too wide for the kernel above to keep both sums in registers.
    """
    col_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // col_blocks
    cols = tl.program_id(0) % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        offsets = rows[:, None].to(tl.int64) * C + cols[None, :]
        mask = (rows < last)[:, None] & (cols < C)[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < last, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)
        dweight += dy * (x - mean[:, None]) * rstd[:, None]
        dbias += dy
    tl.store(dweight_ptr + program * C + cols, tl.sum(dweight, axis=0), mask=cols < C)
    tl.store(dbias_ptr + program * C + cols, tl.sum(dbias, axis=0), mask=cols < C)


def _fill_forward(outputs, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> None:
    y, summed, mean, rstd = outputs
    C = x.shape[-1]
    tensors = [None if t is None else t.contiguous() for t in (x, residual, weight, bias)]

    def start(num_warps: int) -> None:
        _layer_norm_fwd_kernel[(mean.numel(),)](
            *tensors, y, summed, mean, rstd, C=C, EPS=eps, BLOCK_C=triton.next_power_of_2(C), num_warps=num_warps
        )

    with_config("layer_norm_fwd", C, x.device, start)


def _allocate(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), rows, torch.empty_like(rows)  # y, mean, rstd


def _allocate_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _allocate(x, weight, bias, eps)
    return y, torch.empty_like(y), mean, rstd  # y, summed, mean, rstd


def _allocate_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=bias_dtype)


def _fill_backward(outputs, dy, dsummed, x, weight, mean, rstd, bias_dtype) -> None:
    dx, dweight, dbias = outputs
    N, C = mean.numel(), x.shape[-1]
    tensors = [None if t is None else t.contiguous() for t in (dy, dsummed, x, weight)]
    is_wide = C > 8192  # a row and the sums of dweight and dbias then exceed the registers of 16 warps

    def start(programs_per_multiprocessor: int, num_warps: int) -> None:
        rows_per_program = max(1, triton.cdiv(N, num_programs(x.device, programs_per_multiprocessor)))
        P = triton.cdiv(N, rows_per_program)
        partials = x.new_empty(2, P, C, dtype=torch.float32)
        _layer_norm_bwd_kernel[(P,)](
            *tensors,
            mean,
            rstd,
            dx,
            *partials,
            N,
            rows_per_program,
            C=C,
            BLOCK_C=triton.next_power_of_2(C),
            SUM_PARAMETERS=not is_wide,
            num_warps=num_warps,
        )
        if is_wide:
            grid = (P * triton.cdiv(C, 256),)
            _layer_norm_bwd_parameters_kernel[grid](
                tensors[0], tensors[2], mean, rstd, *partials, N, C, rows_per_program, BLOCK_ROWS=4, BLOCK_C=256
            )
        column_sum(partials, dweight, dbias)

    with_config("layer_norm_bwd", C, x.device, start)


_layer_norm_backward = register("layer_norm_backward", _allocate_backward, _fill_backward)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype


def _differentiate(ctx, dy, _dmean, _drstd):
    x, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        return None, None, None, None
    dx, dweight, dbias = _layer_norm_backward(dy, None, x, weight, mean, rstd, ctx.bias_dtype)
    return dx, dweight, dbias, None


def _save_add(ctx, inputs, output) -> None:
    _, _, weight, bias, _ = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(summed, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype


def _differentiate_add(ctx, dy, dsummed, _dmean, _drstd):
    summed, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only `summed` was used
        return dsummed, dsummed, None, None, None
    dx, dweight, dbias = _layer_norm_backward(dy, dsummed, summed, weight, mean, rstd, ctx.bias_dtype)
    return dx, dx, dweight, dbias, None


_layer_norm = register(
    "layer_norm",
    _allocate,
    lambda outputs, x, weight, bias, eps: _fill_forward((outputs[0], None, *outputs[1:]), x, None, weight, bias, eps),
    save=_save,
    differentiate=_differentiate,
)
_add_layer_norm = register(
    "add_layer_norm", _allocate_add, _fill_forward, save=_save_add, differentiate=_differentiate_add
)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm in one pass over x.

    Backward is one pass over x and dy, two if C > 8,192; a small kernel then sums dweight and dbias.
    """
    _check("layer_norm", x, weight, bias)
    check_triton("layer_norm", x=x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Returns (y, summed), computed in one pass over x and residual.

    Both inputs share one gradient tensor, which is written once.
    """
    _check_residual(x, residual)
    _check("add_layer_norm", x, weight, bias)
    check_triton("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    y, summed, _, _ = _add_layer_norm(x, residual, weight, bias, eps)
    return y, summed
