"""GPT-2: the model, its sizes, weight import and export, and sampling.

    from model import GPT2, GPT2Config

    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=64))
    loss = model(tokens, targets)    # each (B, T) int64

The import of this package is fast: PyTorch is imported with GPT2.
"""

from typing import TYPE_CHECKING, Any

from model.presets import PRESETS, GPT2Config

if TYPE_CHECKING:
    from model.gpt2 import GPT2

__all__ = ["GPT2", "PRESETS", "GPT2Config"]


def __getattr__(name: str) -> Any:
    """Imports GPT2, and with it PyTorch, on first use."""
    if name == "GPT2":
        from model.gpt2 import GPT2

        return GPT2
    raise AttributeError(f"module 'model' has no attribute {name!r}")
