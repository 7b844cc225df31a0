"""GPT-2, its sizes, its weights in and out, and sampling from it."""

from model.presets import PRESETS, GPT2Config

__all__ = ["GPT2", "PRESETS", "GPT2Config"]


def __getattr__(name: str):
    """Imports PyTorch only when GPT2 itself is asked for."""
    if name == "GPT2":
        from model.gpt2 import GPT2

        return GPT2
    raise AttributeError(f"module 'model' has no attribute {name!r}")
