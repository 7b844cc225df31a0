"""Causal self-attention on packed queries, keys and values.

    out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h]) v[b, j, h],   j <= i when causal

qkv: (B, T, 3, H, D) with T >= 1, a view of the fused projection's output. out: (B, T, H, D), which
the next linear layer views as (B, T, H * D) without a copy. Scores and softmax are float32 or
wider; out has qkv's dtype. `scale` is 1 / sqrt(D) by default. `dropout_p` is the probability of
dropping an attention weight; outputs are not dropped.

starts: (B, T) int32, contiguous, or None. Row i then sees only the keys starts[b, i] <= j <= i: those
of its own document, which begins at row starts[b, i]. It needs a causal mask and has no gradient.
The values are assumed, not checked, since a check would synchronise: 0 <= starts[b, i] <= i, and
starts do not fall along T. Every row sees itself. A key outside has a weight of exactly 0, and its
finite values change no bit (on PyTorch's ops its scores must be finite too). NaN or an infinite
value outside may spoil a row, since 0 * inf is NaN; in the Triton kernels only within a block that
some row of the same program needs.

The Triton kernels never store a (T, T) matrix. Let s_ij = scale q_i . k_j be the scores,
lse_i = log sum_j exp(s_ij), and w_ij = exp(s_ij - lse_i) the weights.

1. Forward: online softmax. For the keys seen so far, a row keeps the maximum score m, the sum
   l = sum_j exp(s_ij - m) and the vector a = sum_j exp(s_ij - m) v_j. When a block of keys has a
   larger maximum m', l and a are first multiplied by exp(m - m'); then the block's terms are added.
   At the end out_i = a / l and lse_i = m + log l. Of the statistics, backward needs only lse_i.
2. Backward: the weights are recomputed from q, k and lse. Since out_i = sum_j w_ij v_j,
       dv_j = sum_i w_ij dout_i   and   dw_ij = dout_i . v_j.
   The gradient of softmax is ds_ij = w_ij (dw_ij - delta_i), where
       delta_i = sum_l w_il dw_il = dout_i . sum_l w_il v_l = dout_i . out_i
   is known before any key is visited. Then
       dq_i = scale sum_j ds_ij k_j   and   dk_j = scale sum_i ds_ij q_i.
3. No atomics: dq sums over keys, dk and dv sum over queries. So one kernel's programs own rows of
   dq, and another's own rows of dk and dv. Both recompute the scores: 7 matrix products, where one
   kernel with atomics needs 5. Each element is written once, from sums in a fixed order, so two
   runs give the same bits.

With a causal mask, a block of queries visits the keys before it without a mask, then those on its
diagonal with a mask, and then stops. With documents it skips the blocks of keys that none of its
rows sees, and masks those in which its rows' documents begin; a block of keys does the same with
queries. Dropout applies to w_ij after lse_i is computed: kept w_ij and dw_ij are divided by 1 - p,
dropped ones are 0. delta_i is still dout_i . out_i.
Sources: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; Milakov & Gimelshein 2018,
arXiv:1805.02867 (online softmax); Dao et al. 2022, arXiv:2205.14135, section 3 and appendix B; Dao
2023, arXiv:2307.08691, section 3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_kernels import (
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
    _attention_bwd_kernel,
    _attention_delta_kernel,
    _attention_fwd_kernel,
)
from kernels.launch import check_floating, check_shape, check_triton, register, require, triton
from kernels.tiles import with_config


def _check(qkv: Tensor, is_causal: bool, dropout_p: float, scale: float | None, starts: Tensor | None) -> None:
    require(qkv.ndim == 5 and qkv.shape[2] == 3, "attention: qkv must be (B, T, 3, H, D)", tuple(qkv.shape))
    require(min(qkv.shape) > 0, "attention: every size of qkv must be at least 1", tuple(qkv.shape))
    require(0.0 <= dropout_p < 1.0, "attention: dropout_p must be at least 0 and below 1", dropout_p)
    require(scale is None or 0.0 < scale < math.inf, "attention: scale must be positive and finite", scale)
    check_floating("attention", qkv=qkv)
    if starts is not None:
        require(is_causal, "attention: is_causal must be True where starts are given", is_causal)
        check_shape("attention", "starts", starts, tuple(qkv.shape[:2]))
        require(starts.dtype == torch.int32, "attention: starts must be int32", starts.dtype)
        require(starts.device == qkv.device, f"attention: starts must be on {qkv.device}, as qkv is", starts.device)
        require(starts.is_contiguous(), "attention: starts must be contiguous", starts.stride())


def _seen_keys(T: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """Causal mask (T, T), True where a query sees a key; with documents (B, 1, T, T)."""
    rows = torch.arange(T, device=device)
    seen = rows <= rows[:, None]
    return seen if starts is None else seen & (rows >= starts[:, None, :, None])


def attention_reference(
    qkv: Tensor,
    *,
    is_causal: bool = True,
    dropout_p: float = 0.0,
    scale: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """The definition. Every other implementation is tested against it."""
    _check(qkv, is_causal, dropout_p, scale, starts)
    T, D = qkv.shape[1], qkv.shape[4]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D) if scale is None else scale)  # (B, H, T, T)
    if is_causal:
        scores = scores.masked_fill(~_seen_keys(T, starts, qkv.device), float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return (weights @ v).permute(0, 2, 1, 3).to(qkv.dtype).contiguous()


def attention_torch(
    qkv: Tensor,
    *,
    is_causal: bool = True,
    dropout_p: float = 0.0,
    scale: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention on strided views of qkv, which is not copied.

    With `starts` it gets a mask of (B, 1, T, T) bytes and computes all T^2 scores.
    """
    _check(qkv, is_causal, dropout_p, scale, starts)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, D) views; backward packs dqkv in one copy
    mask = None if starts is None else _seen_keys(qkv.shape[1], starts, qkv.device)
    is_causal = is_causal and mask is None
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).contiguous()  # no copy after flash kernels: they store out as (B, T, H, D)


def _allocate(
    qkv: Tensor, seed: Tensor | None, is_causal: bool, dropout_p: float, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)  # out, lse


def _fill(outputs, qkv: Tensor, seed, is_causal: bool, dropout_p: float, scale: float, starts=None) -> None:
    tensors, options = (qkv, *outputs, seed, starts), (qkv, is_causal, dropout_p, scale)
    _launch("attention_fwd", "BLOCK_M", _attention_fwd_kernel, tensors, *options)


def _allocate_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _fill_backward(dqkv: Tensor, dout, qkv, out, lse, seed, is_causal, dropout_p, scale, starts=None) -> None:
    dout, delta = dout.contiguous(), torch.empty_like(lse)
    options = (qkv, is_causal, dropout_p, scale)

    def start(ONE_LAUNCH: int = 0, **tile) -> None:
        if ONE_LAUNCH:
            _compute_delta(dout, out, delta)
            programs = 2 * triton.cdiv(qkv.shape[1], tile["BLOCK_ROWS"])
            _start(_attention_bwd_kernel, programs, (dout, qkv, lse, delta, dqkv, seed, starts), *options, **tile)
        else:
            tensors = (dout, qkv, out, lse, delta, dqkv, seed, starts)
            _launch("attention_bwd_dq", "BLOCK_M", _attention_bwd_dq_kernel, tensors, *options)
            tensors = (dout, qkv, lse, delta, dqkv, seed, starts)
            _launch("attention_bwd_dkdv", "BLOCK_N", _attention_bwd_dkdv_kernel, tensors, *options)

    if qkv.dtype == torch.float32:
        start()
    else:
        size = triton.next_power_of_2(qkv.shape[4]) * (4 if dropout_p > 0.0 else 1)
        with_config("attention_bwd/16bit", size, qkv.device, start)


def _compute_delta(dout: Tensor, out: Tensor, delta: Tensor) -> None:
    B, T, H, D = out.shape
    grid = (B * H * triton.cdiv(T, 32),)
    BLOCK_D = triton.next_power_of_2(D)
    _attention_delta_kernel[grid](dout, out, delta, T, H, HEAD_DIM=D, BLOCK_D=BLOCK_D, BLOCK_M=32, num_warps=4)


def _launch(name, owned, kernel, tensors, qkv: Tensor, is_causal: bool, dropout_p: float, scale: float) -> None:
    """Launches a kernel with this architecture's tile for this head width.

    `owned` names the tile size that divides the rows among programs: "BLOCK_M" or "BLOCK_N".
    """

    def start(**tile) -> None:
        blocks = triton.cdiv(qkv.shape[1], tile[owned])
        programs = triton.cdiv(blocks, 2) if tile.get("PAIR_BLOCKS") else blocks
        _start(kernel, programs, tensors, qkv, is_causal, dropout_p, scale, **tile)

    kind = _precision(qkv) if qkv.dtype == torch.float32 else "16bit"
    size = triton.next_power_of_2(qkv.shape[4])
    if dropout_p > 0.0:  # random bits need registers, so use a wider head's tile
        size *= 2 if kind == "16bit" and owned == "BLOCK_M" else 4
    with_config(f"{name}/{kind}", size, qkv.device, start)


def _start(kernel, programs: int, tensors, qkv: Tensor, is_causal, dropout_p, scale, **tile) -> None:
    """Starts `programs` programs per head. In a tile, 0 stands for an option that is not given."""
    B, T, _, H, D = qkv.shape
    kernel[(B * H * programs,)](
        *tensors,
        *(qkv.stride(axis) for axis in (0, 1, 2, 3)),
        T,
        H,
        SCALE=scale,
        DROPOUT_P=dropout_p,
        IS_CAUSAL=is_causal,
        HEAD_DIM=D,
        BLOCK_D=triton.next_power_of_2(D),
        PRECISION=_precision(qkv),
        **{name: value for name, value in tile.items() if value},
    )


def _precision(qkv: Tensor) -> str:
    # Triton refuses "tf32" on most AMD GPUs, also where the factors have 16 bits and it means nothing.
    is_tf32 = qkv.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if is_tf32 else "ieee"


_attention_backward = register("attention_backward", _allocate_backward, _fill_backward)


def _save(ctx, inputs, output) -> None:
    qkv, seed, *ctx.options, starts = inputs
    ctx.save_for_backward(qkv, *output, seed, starts)


def _differentiate(ctx, dout, _dlse):
    *saved, starts = ctx.saved_tensors
    dqkv = None if dout is None else _attention_backward(dout, *saved, *ctx.options, starts)
    return dqkv, None, None, None, None, None


_attention = register("attention", _allocate, _fill, save=_save, differentiate=_differentiate)


def attention_triton(
    qkv: Tensor,
    *,
    is_causal: bool = True,
    dropout_p: float = 0.0,
    scale: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Flash attention. It reads q, k and v in place and writes one packed dqkv, without copies.

    D is 16 to 256. float32 products use IEEE precision unless torch.set_float32_matmul_precision
    allows TF32. Dropout's seed is drawn from PyTorch's random state. Raises ValueError also if the
    stride of qkv's last axis is not 1, or that of its tokens not below 2^23.
    """
    _check(qkv, is_causal, dropout_p, scale, starts)
    check_triton("attention", qkv=qkv)
    D = qkv.shape[4]
    require(16 <= D <= 256, "attention: head width D must be 16 to 256 for Triton", D)
    require(qkv.stride(4) == 1, "attention: qkv's last axis must have stride 1 for Triton", qkv.stride())
    # A kernel finds a row of its tile, 256 rows at most, at an offset of 32 bits.
    row_stride = max(qkv.stride(1), 3 * qkv.shape[3] * D)
    require(
        row_stride < 2**23,
        "attention: rows of qkv and dqkv must be less than 2^23 elements apart for Triton",
        row_stride,
    )
    seed = torch.randint(2**62, (1,), device=qkv.device) if dropout_p > 0.0 else None
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    return _attention(qkv, seed, is_causal, dropout_p, scale, starts)[0]
