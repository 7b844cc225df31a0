"""Column sums in a fixed order, for the gradients of parameters that all rows share.

    out[c] = sum_p partials[p, c]

In a backward kernel each program sums the gradient over its own rows in registers, and writes the
sum as one row of partials. column_sum adds these P rows, without atomics or locks, so two runs give
the same bits. partials: (P, C) float32; out: (C,), any floating dtype. LayerNorm has two parameters,
so one launch can take two outs, with partials (2, P, C).
"""

from torch import Tensor

from kernels.launch import tl, triton
from kernels.tiles import with_config


@triton.jit
def _column_sum_kernel(partials_ptr, out_ptr, second_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program adds all P rows of BLOCK_C columns of out or, in the later half, of second."""
    col_blocks = tl.cdiv(C, BLOCK_C)
    index = tl.program_id(0) // col_blocks
    partials_ptr += index * P * C
    cols = tl.program_id(0) % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (cols < C)[None, :]
        total += tl.load(partials_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0)
    if index == 0:
        tl.store(out_ptr + cols, tl.sum(total, axis=0), mask=cols < C)
    elif second_ptr is not None:
        tl.store(second_ptr + cols, tl.sum(total, axis=0), mask=cols < C)


def column_sum(partials: Tensor, out: Tensor, second: Tensor | None = None) -> None:
    """Writes the sums over the rows of partials (P, C) into out (C,).

    With a second out, partials is (2, P, C). The two may have different dtypes.
    """
    P, C = partials.shape[-2:]

    def start(BLOCK_P: int, BLOCK_C: int, num_warps: int) -> None:
        tile = {"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C}
        grid = (triton.cdiv(C, BLOCK_C) * (1 if second is None else 2),)
        _column_sum_kernel[grid](partials, out, second, P, C, **tile, num_warps=num_warps)

    with_config("column_sum", C, partials.device, start)
