"""Inputs of every op at given sizes, its outputs and gradients, and their error.

Self-check, tuning and benchmarks all use these, so that what is checked is what is timed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.work import Sizes

# Names of each op's outputs, then of its gradients, in the order of `values`.
TENSORS = {
    "attention": "out dqkv",
    "attention_documents": "out dqkv",
    "layer_norm": "y dx dweight dbias",
    "add_layer_norm": "y summed dx dresidual dweight dbias",
    "gelu": "y dx",
    "bias_gelu": "y dx dbias",
    "linear_cross_entropy": "loss dhidden dweight",
}


def inputs_of(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random inputs of an op: activations of unit variance, logits too."""
    B, T, H, D, C = sizes.B, sizes.T, sizes.H, sizes.D, sizes.C

    def randn(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(std).add_(mean).to(dtype)

    if name == "attention":
        return [randn(B, T, 3, H, D)]
    if name == "attention_documents":
        return [randn(B, T, 3, H, D), document_starts(B, T, device)]
    if name == "linear_cross_entropy":  # logits of variance 1
        targets = torch.randint(sizes.V, (sizes.N,), device=device)
        return [randn(sizes.N, C), randn(sizes.Vp, C, std=C**-0.5), targets]
    if name in ("gelu", "bias_gelu"):
        return [randn(B, T, 4 * C)] + [randn(4 * C, std=0.1)] * (name == "bias_gelu")
    streams = [randn(B, T, C) for _ in range(2 if name == "add_layer_norm" else 1)]
    return [*streams, randn(C, mean=1.0, std=0.1), randn(C, std=0.1)]


def document_starts(B: int, T: int, device: torch.device) -> Tensor:
    """First row of each row's document, (B, T) int32. Lengths are geometric with a mean of T / 2."""
    begins = torch.rand(B, T, device=device) < 2.0 / T
    rows = torch.arange(T, device=device, dtype=torch.int32)
    return torch.where(begins, rows, 0).cummax(dim=1).values.contiguous()


def outputs_of(fn: Callable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The op's outputs, as a tuple even if there is one."""
    outputs = fn(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of sum(outputs * douts) in every floating input, dense: what the layer before can use."""
    leaves = [t for t in inputs if t.is_floating_point()]
    return [gradient.contiguous() for gradient in torch.autograd.grad(outputs, leaves, douts)]


def values(fn: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then gradients."""
    outputs = outputs_of(fn, inputs)
    return [*(output.detach() for output in outputs), *gradients(outputs, inputs, douts)]


def with_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as leaves: the floating ones ask for their gradient."""
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||, in float64; NaN or infinite where `got` is. Raises ValueError if shapes differ."""
    if got.shape != truth.shape:
        raise ValueError(f"the shape must be {tuple(truth.shape)}, got {tuple(got.shape)}")
    truth = truth.double()
    return ((got.double() - truth).norm() / truth.norm()).item()
