"""Choice of each op's implementation, with the reason. No other module decides this."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kernels import attention, cross_entropy, gelu, layer_norm
from kernels.launch import HAS_TRITON, INTERPRETED, TRITON_FLOATING
from kernels.tiles import architecture

Backend = Literal["auto", "triton", "torch"]

# Module of each op, which defines <op>_reference, <op>_torch and <op>_triton.
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
    """Implementation of one op, "triton" or "torch", and the reason in words."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op:<21} {self.implementation}: {self.reason}"


@dataclass(frozen=True)
class Ops:
    """The model's six ops, each bound to its chosen implementation. `choices` gives the reasons."""

    attention: Callable
    layer_norm: Callable
    add_layer_norm: Callable
    gelu: Callable
    bias_gelu: Callable
    linear_cross_entropy: Callable
    choices: tuple[Choice, ...]

    def explain(self) -> str:
        """One line per op: its implementation and the reason."""
        return "\n".join(str(choice) for choice in self.choices)

    def summary(self) -> str:
        """One line such as "triton: sm_90". If ops differ, each choice is followed by its ops."""
        groups: dict[str, list[str]] = {}
        for choice in self.choices:
            groups.setdefault(f"{choice.implementation}: {choice.reason}", []).append(choice.op)
        if len(groups) == 1:
            return next(iter(groups))
        return "; ".join(f"{choice_text} ({', '.join(ops)})" for choice_text, ops in groups.items())


def select(backend: Backend, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Ops:
    """Chooses an implementation of every op, for inputs of this device, dtype and head width.

    "auto" takes Triton where it can run and PyTorch elsewhere. Raises ValueError if the backend is
    unknown. Raises ValueError, with the reason, if it is "triton" and an op cannot run on Triton
    here.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'kernels: the backend must be "auto", "triton" or "torch", got {backend!r}')
    device = torch.device(device)
    choices = []
    for op in MODULES:
        obstacle = triton_obstacle(op, device, dtype, head_dim)
        if backend == "torch":
            choices.append(Choice(op, "torch", "asked for"))
        elif obstacle is not None and backend == "triton":
            raise ValueError(
                f"kernels: the triton backend must be able to run every op, {op} cannot: {obstacle}; "
                'use "auto" or "torch"'
            )
        elif obstacle is not None:
            choices.append(Choice(op, "torch", obstacle))
        elif INTERPRETED and backend == "auto":
            choices.append(Choice(op, "torch", "Triton's interpreter is for tests, ask for triton to run it"))
        else:
            choices.append(Choice(op, "triton", "interpreter" if INTERPRETED else architecture(device)))
    functions = {choice.op: getattr(MODULES[choice.op], f"{choice.op}_{choice.implementation}") for choice in choices}
    return Ops(**functions, choices=tuple(choices))


def triton_obstacle(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Reason that `op` cannot run on Triton here, or None if it can.

    Under TRITON_INTERPRET=1 the tensors may be on the CPU.
    """
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    elif not torch.cuda.is_available():
        return "no CUDA device"
    elif device.type != "cuda":
        return f"the tensors are on {device.type}"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{architecture(device)} < sm_80"
    elif not has_c_compiler():
        return "no C compiler, which Triton needs to build its launchers"
    if dtype not in TRITON_FLOATING:
        return f"{str(dtype).removeprefix('torch.')} is not float32, bfloat16 or float16"
    if op == "attention" and head_dim < 16:
        return f"head_dim {head_dim} < 16"
    if op == "attention" and head_dim > 256:
        return f"head_dim {head_dim} > 256"
    return None


def has_c_compiler() -> bool:
    """True if Triton finds a C compiler: the one in CC or, without CC, clang or gcc on PATH."""
    named = os.environ.get("CC")
    return any(shutil.which(name) for name in (["clang", "gcc"] if named is None else [named]))
