"""Tolerances of an op against its float64 definition: one table, and one comparison that uses it.

    float32, float64:    error <= TOLERANCE * scale
    bfloat16, float16:   error <= 2 * PyTorch's error + TOLERANCE * scale

PyTorch's error is that of its own op in the same precision. An error is the largest over all elements, against
float64 on the same rounded inputs. scale is the largest exact value, or 1 if all are smaller.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

import kernels.tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MANY = 4099 if DEVICE.type == "cuda" else 37  # rows; the interpreter takes 10 ms for each

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-8,  # half its epsilon: one rounding of the result
    torch.float16: 2.0**-11,  # half its epsilon
}

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]


def slow_beside_fp32(shapes: Sequence, *long: str) -> list:
    """Every shape in every dtype. Shapes with one of these words in their id, at which the interpreter takes seconds,
    are slow tests in the low precisions: those are rounded alike at the other shapes."""
    found = []
    for shape, dtype in product(shapes, DTYPES):
        is_slow = dtype.id != "fp32" and DEVICE.type == "cpu" and any(word in shape.id for word in long)
        marks = pytest.mark.slow if is_slow else ()
        found.append(pytest.param(*shape.values, *dtype.values, id=f"{shape.id}-{dtype.id}", marks=marks))
    return found


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills fresh memory with NaN, so that an element that no op wrote shows. Deterministic algorithms only."""
    was_on, was_warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=DEVICE.type != "cpu")  # cuBLAS would ask for a workspace
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def values_and_gradients(op: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the op, then the gradient of sum(outputs * douts) for every floating input. Keeps strides."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = op(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf.requires_grad], douts)
    return [*(output.detach() for output in outputs), *gradients]


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Converts floating tensors to float64; others stay as they are."""
    return [t.double() if t.is_floating_point() else t for t in tensors]


def assert_accurate(
    got: Sequence[Tensor], pytorch: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype, names: str
) -> None:
    """Asserts the criterion at the top of this file for every tensor of `got`."""
    for name, ours, theirs, truth in zip(names.split(), got, pytorch, exact, strict=True):
        assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
        assert ours.isfinite().all(), f"{name}: not finite"
        scale = max(1.0, truth.abs().max().item())
        allowed = TOLERANCE[dtype] * scale
        if dtype in (torch.bfloat16, torch.float16):
            allowed += 2.0 * (theirs.double() - truth).abs().max().item()
        error = (ours.double() - truth).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Asserts errors within TOLERANCE * largest expected value: the same sums in another order."""
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        assert error <= TOLERANCE[theirs.dtype] * scale, f"tensor {i}: error {error:.3g} at scale {scale:.3g}"


def assert_bitwise(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Asserts that every tensor has the same dtype, shape and bits."""
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def set_tiles(monkeypatch):
    """Function that replaces kernels.tiles.lookup for this test, also where its answers are cached."""

    def replace(lookup: Callable) -> None:
        monkeypatch.setattr(kernels.tiles, "lookup", lookup)
        kernels.tiles.use({})

    yield replace
    kernels.tiles.use({})
