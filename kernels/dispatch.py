"""Choice of each op's implementation, with the reason. No other module decides this."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import alternatives, attention, cross_entropy, gelu, layer_norm
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
# What else an op may run on, <op>_<name> in kernels/alternatives.py. Only `gpt2 tune` chooses these.
ALTERNATIVES = {
    "attention": ("cudnn", "flash", "efficient", "math"),
    "linear_cross_entropy": ("unchunked",),
}


@dataclass(frozen=True)
class Choice:
    """Implementation of one op, "triton", "torch" or an alternative, and the reason in words."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op:<21} {self.implementation}: {self.reason}"


@dataclass(frozen=True)
class Ops:
    """The model's six ops, each bound to its chosen implementation. `choices` gives the reasons.

        attention(qkv, *, is_causal=True, dropout_p=0.0, scale=None, starts=None)
            (B, T, 3, H, D) -> (B, T, H, D); starts: (B, T) int32, the row where each row's document begins
        layer_norm(x, weight, bias, eps=1e-5)                           (..., C), (C,), (C,) -> (..., C)
        add_layer_norm(x, residual, weight, bias, eps=1e-5)             -> layer_norm(summed), summed = x + residual
        gelu(x)                                                         any shape; the tanh form
        bias_gelu(x, bias)                                              (..., F), (F,) -> gelu(x + bias)
        linear_cross_entropy(hidden, weight, targets, *, vocab_size=None, ignore_index=-100)
            (N, C), (Vp, C), (N,) int64 -> mean loss of the targets that are not ignored, () float32

    They take float32, bfloat16 and float16. Raise ValueError for other dtypes or shapes.
    """

    attention: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    gelu: Callable[..., Tensor]
    bias_gelu: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
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


def select(
    backend: Backend,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    dropout_p: float = 0.0,
    has_documents: bool = False,
    failed: Mapping[str, str] | None = None,
    tuned: Mapping[str, str] | None = None,
) -> Ops:
    """Chooses an implementation of every op, for inputs of this device, dtype and head width.

    "auto" takes what was found fastest, else Triton where it can run and is not slow by count, else
    PyTorch. dropout_p: of attention, in training. failed: op -> why its Triton kernels are not to
    be trusted here, from the self-check. tuned: op -> implementation, from `gpt2 tune`; only "auto"
    heeds it. has_documents: attention gets `starts`. Then a tuned SDPA backend does not count: not
    all take a mask, so with `starts` each leaves the choice to PyTorch. Raises ValueError if the
    backend or the device is unknown. Raises ValueError, with the reason, if the backend is "triton"
    and an op cannot run on Triton here.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'kernels: the backend must be "auto", "triton" or "torch", got {backend!r}')
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'kernels: the device must be one of PyTorch, such as "cuda", got {device!r}') from error
    choices = []
    for op in MODULES:
        obstacle = triton_obstacle(op, device, dtype, head_dim) or (failed or {}).get(op)
        if obstacle is not None and backend == "triton":
            raise ValueError(
                f"kernels: the triton backend must be able to run every op, {op} cannot: {obstacle}; "
                'use "auto" or "torch"'
            )
        slow = None
        if op == "attention" and obstacle is None and not INTERPRETED:
            slow = slow_attention(device, dtype, head_dim, dropout_p)
        was_tuned = (tuned or {}).get(op)
        if has_documents and op == "attention" and was_tuned in ALTERNATIVES[op]:
            was_tuned = None
        choices.append(_choose(op, backend, device, obstacle, slow, was_tuned))
    return Ops(
        **{choice.op: implementation(choice.op, choice.implementation) for choice in choices}, choices=tuple(choices)
    )


def _choose(
    op: str, backend: Backend, device: torch.device, obstacle: str | None, slow: str | None, tuned: str | None
) -> Choice:
    if backend == "torch":
        return Choice(op, "torch", "asked for")
    if backend == "auto" and tuned is not None and (tuned != "triton" or obstacle is None):
        return Choice(op, tuned, "tuned")
    if obstacle is not None:
        return Choice(op, "torch", obstacle)
    if INTERPRETED and backend == "auto":
        return Choice(op, "torch", "Triton's interpreter is for tests, ask for triton to run it")
    if slow is not None and backend == "auto":
        return Choice(op, "torch", f"SDPA, {slow}")
    return Choice(op, "triton", "interpreter" if INTERPRETED else architecture(device))


def implementation(op: str, name: str) -> Callable:
    """The function of an op's implementation: "reference", "triton", "torch" or an alternative.

    "attention_documents" is attention as a function of qkv and starts, for checks and benchmarks.
    """
    if op == "attention_documents":
        attend = implementation("attention", name)
        return lambda qkv, starts: attend(qkv, starts=starts)
    module = alternatives if name in ALTERNATIVES.get(op, ()) else MODULES[op]
    return getattr(module, f"{op}_{name}")


def triton_obstacle(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Reason that `op` cannot run on Triton here, or None if it can.

    Under TRITON_INTERPRET=1 the tensors may be on the CPU.
    """
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    elif device.type in ("mps", "xpu"):
        return f"our kernels have not been run on {device.type}"
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


def slow_attention(device: torch.device, dtype: torch.dtype, head_dim: int, dropout_p: float) -> str | None:
    """Reason that PyTorch's attention should be faster than ours, by a count of work, or None."""
    if dropout_p > 0.0:
        return "random bits cost our kernels five times the instructions"
    if dtype == torch.float32:
        return "our kernels are slow in float32"
    if head_dim > 64 and (padded := 1 << (head_dim - 1).bit_length()) != head_dim:
        return f"our kernels pad head_dim {head_dim} to {padded}"
    if head_dim >= 128 and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0):
        return f"our tiles are small at head_dim {head_dim} on {architecture(device)}"
    return None


def has_c_compiler() -> bool:
    """True if Triton finds a C compiler: the one in CC or, without CC, clang or gcc on PATH."""
    named = os.environ.get("CC")
    return any(shutil.which(name) for name in (["clang", "gcc"] if named is None else [named]))
