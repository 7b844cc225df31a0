"""Which implementation of each op runs, and why: the one place that decides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kernels import attention, cross_entropy, gelu, layer_norm

Backend = Literal["auto", "triton", "torch"]

# Each op and the file it lives in. A file offers <op>_torch, and <op>_triton once its kernel is written.
MODULES = {
    "attention": attention,
    "layer_norm": layer_norm,
    "add_layer_norm": layer_norm,
    "gelu": gelu,
    "bias_gelu": gelu,
    "linear_cross_entropy": cross_entropy,
}


@dataclass(frozen=True)
class Choice:
    """One op's implementation, "triton" or "torch", and the reason for it in words."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op:<21} {self.implementation}: {self.reason}"


@dataclass(frozen=True)
class Ops:
    """The six ops of the model, each bound to the implementation chosen for it; `choices` says why."""

    attention: Callable
    layer_norm: Callable
    add_layer_norm: Callable
    gelu: Callable
    bias_gelu: Callable
    linear_cross_entropy: Callable
    choices: tuple[Choice, ...]

    def explain(self) -> str:
        """One line per op: what runs and why."""
        return "\n".join(str(choice) for choice in self.choices)


def select(backend: Backend, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Ops:
    """Chooses an implementation of every op for inputs on `device`, of `dtype`, with heads `head_dim` wide.

    "auto" takes Triton where it can run and PyTorch elsewhere. Raises ValueError, with the reason, if the backend
    is unknown or is "triton" and some op cannot run on Triton here.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'kernels: the backend must be "auto", "triton" or "torch", got {backend!r}')
    device = torch.device(device)
    choices = []
    for op in MODULES:
        obstacle = _triton_obstacle(op, device, dtype, head_dim)
        if backend == "torch":
            choices.append(Choice(op, "torch", "asked for"))
        elif obstacle is None:
            choices.append(Choice(op, "triton", f"runs on {device}"))
        elif backend == "auto":
            choices.append(Choice(op, "torch", obstacle))
        else:
            raise ValueError(
                f"kernels: the triton backend must be able to run every op, {op} cannot: {obstacle}; "
                'use "auto" or "torch"'
            )
    functions = {choice.op: getattr(MODULES[choice.op], f"{choice.op}_{choice.implementation}") for choice in choices}
    return Ops(**functions, choices=tuple(choices))


def _triton_obstacle(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `op` cannot run on Triton here, or None if it can."""
    if not hasattr(MODULES[op], f"{op}_triton"):
        return "this version has no Triton kernel for it"
    if device.type != "cuda":
        return f"no CUDA device, the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if op == "attention" and not 16 <= head_dim <= 256:
        return f"head_dim {head_dim} is outside 16 to 256"
    return None
