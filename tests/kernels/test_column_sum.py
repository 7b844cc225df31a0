"""Sum over rows: close to the float64 sum, and in the same order every time."""

import pytest
import torch
from tolerances import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_bitwise,
    poisoned_memory,  # noqa: F401  (a fixture)
    randn,
)

from kernels.column_sum import column_sum

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = [pytest.param(column_sum, id="triton")]
SHAPES = [
    pytest.param(1, 1, id="one number"),
    pytest.param(1, 33, id="one row"),
    pytest.param(31, 31, id="one short of a block"),
    pytest.param(32, 32, id="a block"),
    pytest.param(33, 65, id="one over a block"),
    pytest.param(259, 17, id="many blocks of rows"),
    pytest.param(3, 1601, id="many blocks of columns"),
]


def summed(op, partials, dtype=torch.float32):
    out = torch.empty(partials.shape[1], device=DEVICE, dtype=dtype)
    op(partials, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "C"), SHAPES)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_matches_the_float64_sum(op, P, C, dtype):
    partials = torch.full((P + 40, C), float("nan"), device=DEVICE)[:P]  # rows past the end are NaN
    partials.copy_(randn(P, C, seed=0))
    before = partials.clone()
    got = summed(op, partials, dtype)
    assert_accurate([got], [partials.sum(0).to(dtype)], [partials.double().sum(0)], dtype, "sum")
    assert_bitwise([partials, summed(op, partials, dtype)], [before, got])


@pytest.mark.parametrize(("P", "C"), SHAPES)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_two_sums_in_one_launch_are_those_of_two(op, P, C):
    partials = randn(2, P, C, seed=0)
    first, second = torch.empty(C, device=DEVICE), torch.empty(C, device=DEVICE, dtype=torch.float16)
    op(partials, first, second)
    assert_bitwise([first, second], [summed(op, partials[0]), summed(op, partials[1], torch.float16)])


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_no_rows_give_zeros(op):
    assert (summed(op, torch.empty(0, 33, device=DEVICE)) == 0).all()


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_nothing_is_written_past_the_last_column(op):
    out = torch.full((64,), 7.0, device=DEVICE)
    op(torch.ones(5, 33, device=DEVICE), out[:33])
    torch.testing.assert_close(out, torch.tensor([5.0] * 33 + [7.0] * 31, device=DEVICE), rtol=0, atol=0)
