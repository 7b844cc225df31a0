"""Column sums in a fixed order, for the gradients of parameters that all rows share.

    out[c] = sum_p partials[p, c]

In a backward kernel each program sums the gradient over its own rows in registers, and writes the
sum as one row of partials. column_sum adds these P rows, without atomics or locks, so two runs give
the same bits. partials: (P, C) float32; out: (C,), any floating dtype.
"""

from torch import Tensor

from kernels.launch import tl, triton
from kernels.tiles import with_config


@triton.jit
def _column_sum_kernel(partials_ptr, out_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program adds all P rows of BLOCK_C columns."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (cols < C)[None, :]
        total += tl.load(partials_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0), mask=cols < C)


def column_sum(partials: Tensor, out: Tensor) -> None:
    """Writes the sums over the rows of partials (P, C) into out (C,)."""
    P, C = partials.shape

    def start(BLOCK_P: int, BLOCK_C: int, num_warps: int) -> None:
        tile = {"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C}
        _column_sum_kernel[(triton.cdiv(C, BLOCK_C),)](partials, out, P, C, **tile, num_warps=num_warps)

    with_config("column_sum", C, partials.device, start)
