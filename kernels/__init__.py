"""Ops of GPT-2 for PyTorch: attention, LayerNorm, GELU, and the language-model head with its loss.

    import torch
    from kernels import select

    ops = select("auto", "cuda", torch.bfloat16, head_dim=64)
    print(ops.explain())        # what each op runs on, and why
    out = ops.attention(qkv)    # (B, T, 3, H, D) -> (B, T, H, D)

`auto` takes Triton where it can run and PyTorch's own ops elsewhere, so the same program runs on a
CPU. The ops are differentiable and work under torch.compile; `Ops` has their shapes. An input of
another shape or dtype is a ValueError that says what must hold and what came.

An implementation can also be imported by name. Every op has three of one signature, in
kernels/attention.py, layer_norm.py, gelu.py and cross_entropy.py: `attention_reference` is the
definition, `attention_torch` PyTorch's best way, `attention_triton` our kernel.

The import of this package is fast: PyTorch is imported with the first name that is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.dispatch import Backend, Choice, Ops, select

__all__ = ["Backend", "Choice", "Ops", "select"]


def __getattr__(name: str) -> Any:
    """Imports a name of __all__, and with it PyTorch, on first use."""
    if name in __all__:
        from kernels import dispatch

        return getattr(dispatch, name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
