"""What every op shares: the checks that turn a wrong call into a sentence instead of a fault inside a kernel."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(holds: bool, what: str, got: object) -> None:
    """Raises ValueError "<what>, got <got>" unless `holds`."""
    if not holds:
        raise ValueError(f"{what}, got {got}")


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is floating and all are on one device."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        require(tensor.device == device, f"{op}: all inputs must be on one device, {name} on {device}", tensor.device)
        require(tensor.dtype in FLOATING, f"{op}: {name} must be float32, bfloat16, float16 or float64", tensor.dtype)


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` has exactly this shape."""
    require(tuple(tensor.shape) == shape, f"{op}: {name} must be {shape}", tuple(tensor.shape))
