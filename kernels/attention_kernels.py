"""Triton kernels of attention. kernels.attention explains the algorithm and launches them.

They read q, k and v in place from qkv. Row t of q begins at
qkv_ptr + b * b_stride + t * t_stride + h * h_stride; k is one part_stride further on, v two.
Scores and lse are in base 2, exp(x) = exp2(x / ln 2), because GPUs compute exp2 in hardware.

starts_ptr is None without documents. Else row i of sequence b sees no key before starts[b, i], and
starts do not fall. So no row of m to n sees a key before starts[m], and each sees those from
starts[n] to m: only keys from starts[m] to starts[n] need a mask. No row after the document of key n
sees a key of m to n, and each from n to the end of m's document sees them all.

Two constants, off by default, select another way to compute the same (kernels.tiles, VARIANTS):
EXP2_POLYNOMIAL and PAIR_BLOCKS. `_attention_bwd_kernel` is a third: both backward kernels in one.
EXP2_POLYNOMIAL has no effect with dropout, where random numbers keep the arithmetic units busy.
"""

from kernels.launch import tl, triton


@triton.jit
def _load_rows(
    ptr, stride, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr
):
    """Loads a tile (ROWS, BLOCK_D); 0 from column HEAD_DIM and, if BOUNDED, from row `limit`."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + rows * stride + dims  # in 32 bits: `attention_triton` bounds the stride
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
def _is_kept(seed_ptr, head, start_m, start_n, DROPOUT_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout mask of rows from start_m and columns from start_n, True where a weight is kept.

    Philox draws the 32 random bits of four columns at once. They depend only on seed, row, column
    and head, so all kernels draw the same mask, whatever their tiles.
    """
    zeros = tl.zeros((BLOCK_M, BLOCK_N // 4), dtype=tl.int32)
    rows = zeros + start_m + tl.arange(0, BLOCK_M)[:, None]
    fours = zeros + start_n // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    a, b, c, d = tl.philox(tl.load(seed_ptr), fours, rows, zeros + head, zeros)
    DROPPED: tl.constexpr = int(DROPOUT_P * 4294967296)  # of 2^32 equally likely numbers
    kept = tl.join(tl.join(a >= DROPPED, b >= DROPPED), tl.join(c >= DROPPED, d >= DROPPED))
    return tl.reshape(kept, (BLOCK_M, BLOCK_N))


@triton.jit
def _exp2_polynomial(x):
    """2^x for x <= 0 by multiply-adds. The relative error is below 1.02e-4; from x = -127 on it is 0.

    x = n + f with n the nearest integer, and 2^f, |f| <= 1/2, is a polynomial that is 1 at 0, with
    the least largest error (Cody & Waite 1980, chapter 6). n is added to the exponent's bits.
    """
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + 12582912.0  # 1.5 * 2^23: rounds x to an integer, which is now in the lowest bits
    f = x - (shifted - 12582912.0)
    power = ((0.055008951 * f + 0.242211014) * f + 0.6932829) * f + 1.0
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _exp2(x, EXP2_POLYNOMIAL: tl.constexpr):
    """2^x for x <= 0. With EXP2_POLYNOMIAL every second column leaves the exponential units free."""
    if EXP2_POLYNOMIAL:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        y = tl.interleave(tl.exp2(even), _exp2_polynomial(odd))
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _share(T, BLOCK: tl.constexpr, PAIR_BLOCKS: tl.constexpr):
    """This program's head, its block, the block opposite, and how many of the two it computes.

    With PAIR_BLOCKS a program computes both, so that all programs of a causal mask have equal work.
    """
    blocks = tl.cdiv(T, BLOCK)
    programs = tl.cdiv(blocks, 2) if PAIR_BLOCKS else blocks
    head = tl.program_id(0) // programs  # 0 to B * H - 1
    block = tl.program_id(0) % programs
    opposite = blocks - 1 - block
    count = tl.where(block < opposite, 2, 1) if PAIR_BLOCKS else 1
    return head, block, opposite, count


@triton.jit
def _is_seen(starts_ptr, rows, cols, T, IS_CAUSAL: tl.constexpr):
    """True where a query of `rows` sees a key of `cols`, which are a column and a row, or the reverse."""
    seen = cols <= rows if IS_CAUSAL else cols < T
    if starts_ptr is not None:
        seen &= cols >= tl.load(starts_ptr + rows, mask=rows < T, other=0)
    return seen


@triton.jit
def _key_starts(starts_ptr, T, start_m, full_end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For rows from start_m: the first key of the first block that a row sees, and of the first without a mask."""
    if starts_ptr is None:
        return 0, 0
    else:
        first = tl.load(starts_ptr + start_m)
        last = tl.load(starts_ptr + tl.minimum(start_m + BLOCK_M, T) - 1)
        return first // BLOCK_N * BLOCK_N, tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, full_end)


@triton.jit
def _document_end(starts_ptr, T, key):
    """First row after the document of `key`, T after the last one; by bisection, as starts do not fall."""
    low, high = key + 1, tl.maximum(T, key + 1)
    while low < high:
        middle = (low + high) // 2
        is_inside = tl.load(starts_ptr + middle) <= key
        low, high = tl.where(is_inside, middle + 1, low), tl.where(is_inside, high, middle)
    return low


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr, seed_ptr, starts_ptr, b_stride, t_stride, part_stride, h_stride, T, H,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXP2_POLYNOMIAL: tl.constexpr = 0, PAIR_BLOCKS: tl.constexpr = 0,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head's output and their log-sum-exp."""
    LOG2_SCALE: tl.constexpr = SCALE * 1.4426950408889634  # 1 / ln 2
    head, last, first, count = _share(T, BLOCK_M, PAIR_BLOCKS)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr = qkv_ptr + b * b_stride + h * h_stride
    DOCUMENTS: tl.constexpr = starts_ptr is not None
    if DOCUMENTS:
        starts_ptr += b * T
    for part in range(count):
        start_m = tl.where(part == 0, first, last) * BLOCK_M  # rows with the most keys first
        rows = start_m + tl.arange(0, BLOCK_M)
        start = start_m.to(tl.int64)
        q = _load_rows(q_ptr + start * t_stride, t_stride, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)

        end = tl.minimum(start_m + BLOCK_M, T) if IS_CAUSAL else T
        full_end = (start_m if IS_CAUSAL else T) // BLOCK_N * BLOCK_N  # before this key no row needs a mask
        begin, full_start = _key_starts(starts_ptr, T, start_m, full_end, BLOCK_M, BLOCK_N)
        skipped = full_end - full_start  # the blocks with a mask before full_start come after the full ones
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # A row may see no key of its first blocks, and -inf - -inf is NaN.
        row_max = tl.full((BLOCK_M,), -3e38 if DOCUMENTS else float("-inf"), dtype=tl.float32)
        for MASKED in tl.static_range(2):
            for key in tl.range(begin + skipped if MASKED else full_start, end if MASKED else full_end, BLOCK_N):
                start_n = tl.where(key < full_end, key - skipped, key) if MASKED and DOCUMENTS else key
                k_ptr = q_ptr + part_stride + tl.cast(start_n, tl.int64) * t_stride
                k = _load_rows(k_ptr, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
                v = _load_rows(k_ptr + part_stride, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if MASKED:
                    cols = start_n + tl.arange(0, BLOCK_N)
                    seen = _is_seen(starts_ptr, rows[:, None], cols[None, :], T, IS_CAUSAL)
                    scores = tl.where(seen, scores, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(scores, axis=1) * LOG2_SCALE)
                weights = _exp2(scores * LOG2_SCALE - new_max[:, None], EXP2_POLYNOMIAL and DROPOUT_P == 0.0)
                rescale = tl.exp2(row_max - new_max)
                row_sum = row_sum * rescale + tl.sum(weights, axis=1)
                if DROPOUT_P > 0.0:
                    kept = _is_kept(seed_ptr, head, start_m, start_n, DROPOUT_P, BLOCK_M, BLOCK_N)
                    weights = tl.where(kept, weights, 0.0)
                acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
                row_max = new_max

        out = acc / (row_sum * (1.0 - DROPOUT_P))[:, None]
        out_offset = (b * T + start) * H * HEAD_DIM + h * HEAD_DIM
        _store_rows(out_ptr + out_offset, H * HEAD_DIM, T - start_m, out, BLOCK_M, HEAD_DIM, BLOCK_D)
        tl.store(lse_ptr + head.to(tl.int64) * T + rows, row_max + tl.log2(row_sum), mask=rows < T)


@triton.jit
def _attention_delta_kernel(
    dout_ptr, out_ptr, delta_ptr, T, H, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """One program computes delta of BLOCK_M rows of one head."""
    head, block, _, _ = _share(T, BLOCK_M, False)
    start_m, b, h = block * BLOCK_M, (head // H).to(tl.int64), (head % H).to(tl.int64)
    out_offset = (b * T + start_m) * H * HEAD_DIM + h * HEAD_DIM
    out = _load_rows(out_ptr + out_offset, H * HEAD_DIM, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dout = _load_rows(dout_ptr + out_offset, H * HEAD_DIM, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    rows = start_m + tl.arange(0, BLOCK_M)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, delta, mask=rows < T)


@triton.jit
def _dq_rows(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
    b_stride, t_stride, part_stride, h_stride, T, H, head, start_m,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXP2_POLYNOMIAL: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """Computes dq of BLOCK_M rows of one head and, unless HAS_DELTA, their delta."""
    LOG2_SCALE: tl.constexpr = SCALE * 1.4426950408889634
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr = qkv_ptr + b * b_stride + h * h_stride
    rows = start_m + tl.arange(0, BLOCK_M)
    limit = T - start_m
    q = _load_rows(q_ptr + start_m.to(tl.int64) * t_stride, t_stride, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out_offset = (b * T + start_m) * H * HEAD_DIM + h * HEAD_DIM
    dout = _load_rows(dout_ptr + out_offset, H * HEAD_DIM, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    stats = head.to(tl.int64) * T + rows
    if HAS_DELTA:
        delta = tl.load(delta_ptr + stats, mask=rows < T, other=0.0)
    else:
        out = _load_rows(out_ptr + out_offset, H * HEAD_DIM, limit, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        tl.store(delta_ptr + stats, delta, mask=rows < T)
    lse = tl.load(lse_ptr + stats, mask=rows < T, other=float("inf"))  # rows past the end get weight 0

    end = tl.minimum(start_m + BLOCK_M, T) if IS_CAUSAL else T
    full_end = (start_m if IS_CAUSAL else T) // BLOCK_N * BLOCK_N
    DOCUMENTS: tl.constexpr = starts_ptr is not None
    if DOCUMENTS:
        starts_ptr += b * T
    begin, full_start = _key_starts(starts_ptr, T, start_m, full_end, BLOCK_M, BLOCK_N)
    skipped = full_end - full_start
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for key in tl.range(begin + skipped if MASKED else full_start, end if MASKED else full_end, BLOCK_N):
            start_n = tl.where(key < full_end, key - skipped, key) if MASKED and DOCUMENTS else key
            k_ptr = q_ptr + part_stride + tl.cast(start_n, tl.int64) * t_stride
            k = _load_rows(k_ptr, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            v = _load_rows(k_ptr + part_stride, t_stride, T - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights = _exp2(scores * LOG2_SCALE - lse[:, None], EXP2_POLYNOMIAL and DROPOUT_P == 0.0)
            if MASKED:
                cols = start_n + tl.arange(0, BLOCK_N)
                seen = _is_seen(starts_ptr, rows[:, None], cols[None, :], T, IS_CAUSAL)
                weights = tl.where(seen, weights, 0.0)
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if DROPOUT_P > 0.0:
                kept = _is_kept(seed_ptr, head, start_m, start_n, DROPOUT_P, BLOCK_M, BLOCK_N)
                dweights = tl.where(kept, dweights * (1.0 / (1.0 - DROPOUT_P)), 0.0)
            dscores = weights * (dweights - delta[:, None])
            if MASKED and DOCUMENTS:  # values of another document could make dweights infinite, and 0 * inf is NaN
                dscores = tl.where(seen, dscores, 0.0)
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    dqkv_ptr += (b * T + start_m) * 3 * H * HEAD_DIM + h * HEAD_DIM
    _store_rows(dqkv_ptr, 3 * H * HEAD_DIM, limit, dq * SCALE, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_rows(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
    b_stride, t_stride, part_stride, h_stride, T, H, head, start_n,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXP2_POLYNOMIAL: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv of BLOCK_N rows of one head.

    Scores and weights are transposed, (keys, queries): they are the left factors of dk and dv.
    """
    LOG2_SCALE: tl.constexpr = SCALE * 1.4426950408889634
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    DOCUMENTS: tl.constexpr = starts_ptr is not None
    if DOCUMENTS:
        starts_ptr += b * T
        first_end = _document_end(starts_ptr, T, start_n)
        last_end = _document_end(starts_ptr, T, tl.minimum(start_n + BLOCK_N, T) - 1)
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
    if DOCUMENTS:  # the mask is also needed from the end of the first key's document to that of the last key's
        full_end = tl.maximum(full_start, first_end // BLOCK_M)
        at_end = tl.cdiv(last_end, BLOCK_M) - full_end
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for block in tl.range(0 if MASKED else full_start, on_diagonal + at_end if MASKED else full_end):
            behind = full_end + (block - on_diagonal if DOCUMENTS else 0)
            start_m = (tl.where(block < on_diagonal, first_block + block, behind) if MASKED else block) * BLOCK_M
            rows = start_m + tl.arange(0, BLOCK_M)
            start = tl.cast(start_m, tl.int64)
            q = _load_rows(q_ptr + start * t_stride, t_stride, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
            dout = _load_rows(
                dout_ptr + start * H * HEAD_DIM, H * HEAD_DIM, T - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED
            )
            lse = tl.load(lse_ptr + stats + rows, mask=rows < T, other=float("inf"))
            delta = tl.load(delta_ptr + stats + rows, mask=rows < T, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            weights = _exp2(scores * LOG2_SCALE - lse[None, :], EXP2_POLYNOMIAL and DROPOUT_P == 0.0)
            if MASKED and IS_CAUSAL:
                seen = _is_seen(starts_ptr, rows[None, :], cols[:, None], T, True)
                weights = tl.where(seen, weights, 0.0)
            dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept_weights = weights
            if DROPOUT_P > 0.0:
                kept = tl.trans(_is_kept(seed_ptr, head, start_m, start_n, DROPOUT_P, BLOCK_M, BLOCK_N))
                kept_weights = tl.where(kept, weights * (1.0 / (1.0 - DROPOUT_P)), 0.0)
                dweights = tl.where(kept, dweights * (1.0 / (1.0 - DROPOUT_P)), 0.0)
            dv = tl.dot(kept_weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dscores = weights * (dweights - delta[None, :])
            if MASKED and DOCUMENTS:
                dscores = tl.where(seen, dscores, 0.0)
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    dqkv_ptr += (b * T + start_n) * 3 * H * HEAD_DIM + h * HEAD_DIM + H * HEAD_DIM
    _store_rows(dqkv_ptr, 3 * H * HEAD_DIM, T - start_n, dk * SCALE, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_rows(dqkv_ptr + H * HEAD_DIM, 3 * H * HEAD_DIM, T - start_n, dv, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _attention_bwd_dq_kernel(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
    b_stride, t_stride, part_stride, h_stride, T, H,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXP2_POLYNOMIAL: tl.constexpr = 0, PAIR_BLOCKS: tl.constexpr = 0,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head's dq.

    It also writes their delta, which the dk and dv kernel reads.
    """
    head, last, first, count = _share(T, BLOCK_M, PAIR_BLOCKS)
    for part in range(count):
        start_m = tl.where(part == 0, first, last) * BLOCK_M  # rows with the most keys first
        _dq_rows(
            dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
            b_stride, t_stride, part_stride, h_stride, T, H, head, start_m,
            SCALE, DROPOUT_P, IS_CAUSAL, HEAD_DIM, BLOCK_D, PRECISION, BLOCK_M, BLOCK_N, EXP2_POLYNOMIAL, False,
        )  # fmt: skip


@triton.jit
def _attention_bwd_dkdv_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
    b_stride, t_stride, part_stride, h_stride, T, H,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXP2_POLYNOMIAL: tl.constexpr = 0, PAIR_BLOCKS: tl.constexpr = 0,
):  # fmt: skip
    """One program computes BLOCK_N rows of one head's dk and dv."""
    head, first, last, count = _share(T, BLOCK_N, PAIR_BLOCKS)
    for part in range(count):
        start_n = tl.where(part == 0, first, last) * BLOCK_N  # keys with the most queries first
        _dkdv_rows(
            dout_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
            b_stride, t_stride, part_stride, h_stride, T, H, head, start_n,
            SCALE, DROPOUT_P, IS_CAUSAL, HEAD_DIM, BLOCK_D, PRECISION, BLOCK_M, BLOCK_N, EXP2_POLYNOMIAL,
        )  # fmt: skip


@triton.jit
def _attention_bwd_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
    b_stride, t_stride, part_stride, h_stride, T, H,
    SCALE: tl.constexpr, DROPOUT_P: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_STEP: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_ROWS rows of one head's dk and dv, the next one of its dq.

    Both read the same q, k, v and dout, at about the same time. delta is known.
    """
    blocks = tl.cdiv(T, BLOCK_ROWS)
    head, block = tl.program_id(0) // (2 * blocks), tl.program_id(0) // 2 % blocks
    if tl.program_id(0) % 2 == 0:
        _dkdv_rows(
            dout_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
            b_stride, t_stride, part_stride, h_stride, T, H, head, block * BLOCK_ROWS,
            SCALE, DROPOUT_P, IS_CAUSAL, HEAD_DIM, BLOCK_D, PRECISION, BLOCK_STEP, BLOCK_ROWS, False,
        )  # fmt: skip
    else:
        _dq_rows(
            dout_ptr, qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, starts_ptr,
            b_stride, t_stride, part_stride, h_stride, T, H, head, (blocks - 1 - block) * BLOCK_ROWS,
            SCALE, DROPOUT_P, IS_CAUSAL, HEAD_DIM, BLOCK_D, PRECISION, BLOCK_ROWS, BLOCK_STEP, False, True,
        )  # fmt: skip
