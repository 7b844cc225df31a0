"""Causal self-attention on packed queries, keys and values.

    out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h]) v[b, j, h],   j <= i when causal

qkv: (B, T, 3, H, D) with T >= 1, a view of the fused projection's output. out: (B, T, H, D), which
the next linear layer views as (B, T, H * D) without a copy. Scores and softmax are float32 or
wider; out has qkv's dtype. `scale` is 1 / sqrt(D) by default. `dropout_p` is the probability of
dropping an attention weight; outputs are not dropped.

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
diagonal with a mask, and then stops. Dropout applies to w_ij after lse_i is computed: kept w_ij and
dw_ij are divided by 1 - p, dropped ones are 0. delta_i is still dout_i . out_i.
Sources: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; Milakov & Gimelshein 2018,
arXiv:1805.02867 (online softmax); Dao et al. 2022, arXiv:2205.14135, section 3 and appendix B; Dao
2023, arXiv:2307.08691, section 3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import check_floating, check_triton, register, require, tl, triton
from kernels.tiles import with_config


def _check(qkv: Tensor, dropout_p: float, scale: float | None) -> None:
    require(qkv.ndim == 5 and qkv.shape[2] == 3, "attention: qkv must be (B, T, 3, H, D)", tuple(qkv.shape))
    require(min(qkv.shape) > 0, "attention: every size of qkv must be at least 1", tuple(qkv.shape))
    require(0.0 <= dropout_p < 1.0, "attention: dropout_p must be at least 0 and below 1", dropout_p)
    require(scale is None or 0.0 < scale < math.inf, "attention: scale must be positive and finite", scale)
    check_floating("attention", qkv=qkv)


def attention_reference(
    qkv: Tensor, *, is_causal: bool = True, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """The definition. Every other implementation is tested against it."""
    _check(qkv, dropout_p, scale)
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
    """PyTorch's scaled_dot_product_attention on strided views of qkv, which is not copied."""
    _check(qkv, dropout_p, scale)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, D) views; backward packs dqkv in one copy
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).contiguous()  # no copy after flash kernels: they store out as (B, T, H, D)


# The kernels read q, k and v in place from qkv. Row t of q begins at
# qkv_ptr + b * b_stride + t * t_stride + h * h_stride; k is one part_stride further on, v two.
# Scores and lse are in base 2, exp(x) = exp2(x / ln 2), because GPUs compute exp2 in hardware.


@triton.jit
def _load_rows(
    ptr, stride, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr
):
    """Loads a tile (ROWS, BLOCK_D); 0 from column HEAD_DIM and, if BOUNDED, from row `limit`."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + rows * stride + dims
    if BOUNDED:
        tile = tl.load(ptrs, mask=(rows < limit) & (dims < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(ptrs, mask=dims < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def _store_rows(ptr, stride, limit, tile, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the first `limit` rows and HEAD_DIM columns of a tile (ROWS, BLOCK_D)."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + rows * stride + dims, tile.to(ptr.dtype.element_ty), mask=(rows < limit) & (dims < HEAD_DIM))


@triton.jit
def _is_kept(seed_ptr, head, rows, cols, DROPOUT_P: tl.constexpr):
    """Dropout mask, True where a weight is kept.

    Its 24 random bits depend only on seed, column, row and head, so all kernels draw the same mask.
    """
    zeros = tl.zeros_like(rows + cols)
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), zeros + cols, zeros + rows, zeros + head, zeros)
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= DROPOUT_P  # 2^-24


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr, seed_ptr, b_stride, t_stride, part_stride, h_stride, T, H,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head's output and their log-sum-exp."""
    LOG2_SCALE: tl.constexpr = SCALE * 1.4426950408889634  # 1 / ln 2
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks  # 0 to B * H - 1
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # rows with the most keys first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr = qkv_ptr + b * b_stride + h * h_stride
    rows = start_m + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr + start_m.to(tl.int64) * t_stride, t_stride, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)

    end = tl.minimum(start_m + BLOCK_M, T) if IS_CAUSAL else T
    full_end = (start_m if IS_CAUSAL else T) // BLOCK_N * BLOCK_N  # before this key no row needs a mask
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for start_n in tl.range(full_end if MASKED else 0, end if MASKED else full_end, BLOCK_N):
            k_ptr = q_ptr + part_stride + tl.cast(start_n, tl.int64) * t_stride
            k = _load_rows(k_ptr, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            v = _load_rows(k_ptr + part_stride, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            cols = start_n + tl.arange(0, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if MASKED:
                seen = cols[None, :] <= rows[:, None] if IS_CAUSAL else cols[None, :] < T
                scores = tl.where(seen, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, axis=1) * LOG2_SCALE)
            weights = tl.exp2(scores * LOG2_SCALE - new_max[:, None])
            rescale = tl.exp2(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(weights, axis=1)
            if DROPOUT_P > 0.0:
                weights = tl.where(_is_kept(seed_ptr, head, rows[:, None], cols[None, :], DROPOUT_P), weights, 0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            row_max = new_max

    out_ptr += (b * T + start_m) * H * HEAD_DIM + h * HEAD_DIM
    out = acc / (row_sum * (1.0 - DROPOUT_P))[:, None]
    _store_rows(out_ptr, H * HEAD_DIM, T - start_m, out, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, row_max + tl.log2(row_sum), mask=rows < T)


@triton.jit
def _attention_bwd_dq_kernel(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr,
    b_stride, t_stride, part_stride, h_stride, T, H,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head's dq.

    It also writes their delta, which the dk and dv kernel reads.
    """
    LOG2_SCALE: tl.constexpr = SCALE * 1.4426950408889634
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr = qkv_ptr + b * b_stride + h * h_stride
    rows = start_m + tl.arange(0, BLOCK_M)
    limit = T - start_m
    q = _load_rows(q_ptr + start_m.to(tl.int64) * t_stride, t_stride, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out_offset = (b * T + start_m) * H * HEAD_DIM + h * HEAD_DIM
    out = _load_rows(out_ptr + out_offset, H * HEAD_DIM, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dout = _load_rows(dout_ptr + out_offset, H * HEAD_DIM, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    stats = head.to(tl.int64) * T + rows
    tl.store(delta_ptr + stats, delta, mask=rows < T)
    lse = tl.load(lse_ptr + stats, mask=rows < T, other=float("inf"))  # rows past the end get weight 0

    end = tl.minimum(start_m + BLOCK_M, T) if IS_CAUSAL else T
    full_end = (start_m if IS_CAUSAL else T) // BLOCK_N * BLOCK_N
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for start_n in tl.range(full_end if MASKED else 0, end if MASKED else full_end, BLOCK_N):
            k_ptr = q_ptr + part_stride + tl.cast(start_n, tl.int64) * t_stride
            k = _load_rows(k_ptr, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            v = _load_rows(k_ptr + part_stride, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            cols = start_n + tl.arange(0, BLOCK_N)
            weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2_SCALE - lse[:, None])
            if MASKED:
                seen = cols[None, :] <= rows[:, None] if IS_CAUSAL else cols[None, :] < T
                weights = tl.where(seen, weights, 0.0)
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if DROPOUT_P > 0.0:
                kept = _is_kept(seed_ptr, head, rows[:, None], cols[None, :], DROPOUT_P)
                dweights = tl.where(kept, dweights * (1.0 / (1.0 - DROPOUT_P)), 0.0)
            dscores = weights * (dweights - delta[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    dqkv_ptr += (b * T + start_m) * 3 * H * HEAD_DIM + h * HEAD_DIM
    _store_rows(dqkv_ptr, 3 * H * HEAD_DIM, limit, dq * SCALE, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _attention_bwd_dkdv_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, b_stride, t_stride, part_stride, h_stride, T, H,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N rows of one head's dk and dv.

    Scores and weights are transposed, (keys, queries): they are the left factors of dk and dv.
    """
    LOG2_SCALE: tl.constexpr = SCALE * 1.4426950408889634
    blocks = tl.cdiv(T, BLOCK_N)
    head = tl.program_id(0) // blocks
    start_n = tl.program_id(0) % blocks * BLOCK_N  # the first keys have the most queries and start first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr = qkv_ptr + b * b_stride + h * h_stride
    k_ptr = q_ptr + part_stride + start_n.to(tl.int64) * t_stride
    cols = start_n + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = _load_rows(k_ptr + part_stride, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dout_ptr += b * T * H * HEAD_DIM + h * HEAD_DIM
    stats = head.to(tl.int64) * T

    # Indices of query blocks, BLOCK_M rows each. A mask is needed on the diagonal, and in the last
    # block if T ends inside it.
    first_block = start_n // BLOCK_M if IS_CAUSAL else 0
    full_end = T // BLOCK_M
    full_start = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M), tl.cdiv(T, BLOCK_M)) if IS_CAUSAL else 0
    on_diagonal = full_start - first_block
    at_end = tl.where((full_end * BLOCK_M < T) & (full_start <= full_end), 1, 0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for block in tl.range(0 if MASKED else full_start, on_diagonal + at_end if MASKED else full_end):
            start_m = (tl.where(block < on_diagonal, first_block + block, full_end) if MASKED else block) * BLOCK_M
            rows = start_m + tl.arange(0, BLOCK_M)
            start = tl.cast(start_m, tl.int64)
            q = _load_rows(q_ptr + start * t_stride, t_stride, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
            dout = _load_rows(
                dout_ptr + start * H * HEAD_DIM, H * HEAD_DIM, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED
            )
            lse = tl.load(lse_ptr + stats + rows, mask=rows < T, other=float("inf"))
            delta = tl.load(delta_ptr + stats + rows, mask=rows < T, other=0.0)
            weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * LOG2_SCALE - lse[None, :])
            if MASKED and IS_CAUSAL:
                weights = tl.where(cols[:, None] <= rows[None, :], weights, 0.0)
            dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept_weights = weights
            if DROPOUT_P > 0.0:
                kept = _is_kept(seed_ptr, head, rows[None, :], cols[:, None], DROPOUT_P)
                kept_weights = tl.where(kept, weights * (1.0 / (1.0 - DROPOUT_P)), 0.0)
                dweights = tl.where(kept, dweights * (1.0 / (1.0 - DROPOUT_P)), 0.0)
            dv = tl.dot(kept_weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dscores = weights * (dweights - delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    dqkv_ptr += (b * T + start_n) * 3 * H * HEAD_DIM + h * HEAD_DIM + H * HEAD_DIM
    _store_rows(dqkv_ptr, 3 * H * HEAD_DIM, T - start_n, dk * SCALE, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_rows(dqkv_ptr + H * HEAD_DIM, 3 * H * HEAD_DIM, T - start_n, dv, BLOCK_N, HEAD_DIM, BLOCK_D)


def _allocate(
    qkv: Tensor, seed: Tensor | None, is_causal: bool, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)  # out, lse


def _fill(outputs, qkv: Tensor, seed: Tensor | None, is_causal: bool, dropout_p: float, scale: float) -> None:
    out, lse = outputs
    _launch("attention_fwd", "BLOCK_M", _attention_fwd_kernel, qkv, (qkv, out, lse, seed), is_causal, dropout_p, scale)


def _allocate_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _fill_backward(dqkv: Tensor, dout, qkv, out, lse, seed, is_causal, dropout_p, scale) -> None:
    dout, delta = dout.contiguous(), torch.empty_like(lse)
    tensors = (dout, qkv, out, lse, delta, dqkv, seed)
    options = (is_causal, dropout_p, scale)
    _launch("attention_bwd_dq", "BLOCK_M", _attention_bwd_dq_kernel, qkv, tensors, *options)
    tensors = (dout, qkv, lse, delta, dqkv, seed)
    _launch("attention_bwd_dkdv", "BLOCK_N", _attention_bwd_dkdv_kernel, qkv, tensors, *options)


def _launch(name, owned, kernel, qkv: Tensor, tensors, is_causal: bool, dropout_p: float, scale: float) -> None:
    """Launches a kernel with this architecture's tile for this head width.

    `owned` names the tile size that divides the rows among programs: "BLOCK_M" or "BLOCK_N".
    """
    B, T, _, H, D = qkv.shape
    BLOCK_D = triton.next_power_of_2(D)
    is_float32 = qkv.dtype == torch.float32
    # Triton refuses "tf32" on most AMD GPUs, also where the factors have 16 bits and it means nothing.
    is_tf32 = is_float32 and torch.get_float32_matmul_precision() != "highest"
    precision = "tf32" if is_tf32 else "ieee"
    kind = precision if is_float32 else "16bit"

    def start(**tile) -> None:
        kernel[(B * H * triton.cdiv(T, tile[owned]),)](
            *tensors,
            *(qkv.stride(axis) for axis in (0, 1, 2, 3)),
            T,
            H,
            SCALE=scale,
            DROPOUT_P=dropout_p,
            IS_CAUSAL=is_causal,
            HEAD_DIM=D,
            BLOCK_D=BLOCK_D,
            PRECISION=precision,
            **tile,
        )

    size = 4 * BLOCK_D if dropout_p > 0.0 else BLOCK_D  # random bits need registers, so use a wider head's tile
    with_config(f"{name}/{kind}", size, qkv.device, start)


_attention_backward = register("attention_backward", _allocate_backward, _fill_backward)


def _save(ctx, inputs, output) -> None:
    qkv, seed, *options = inputs
    ctx.save_for_backward(qkv, *output, seed)
    ctx.options = options


def _differentiate(ctx, dout, _dlse):
    dqkv = None if dout is None else _attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    return dqkv, None, None, None, None


_attention = register("attention", _allocate, _fill, save=_save, differentiate=_differentiate)


def attention_triton(
    qkv: Tensor, *, is_causal: bool = True, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Flash attention. It reads q, k and v in place and writes one packed dqkv, without copies.

    D is 16 to 256. float32 products use IEEE precision unless torch.set_float32_matmul_precision
    allows TF32. Dropout's seed is drawn from PyTorch's random state. Raises ValueError also if the
    stride of qkv's last axis is not 1.
    """
    _check(qkv, dropout_p, scale)
    check_triton("attention", qkv=qkv)
    D = qkv.shape[4]
    require(16 <= D <= 256, "attention: head width D must be 16 to 256 for Triton", D)
    require(qkv.stride(4) == 1, "attention: qkv's last axis must have stride 1 for Triton", qkv.stride())
    seed = torch.randint(2**62, (1,), device=qkv.device) if dropout_p > 0.0 else None
    return _attention(qkv, seed, is_causal, dropout_p, 1.0 / math.sqrt(D) if scale is None else scale)[0]
