"""GPT-2: the model, its sizes, weight import and export, and sampling."""

from model.presets import PRESETS, GPT2Config

__all__ = ["GPT2", "PRESETS", "GPT2Config"]


def __getattr__(name: str):
    """Imports GPT2, and with it PyTorch, on first use."""
    if name == "GPT2":
        from model.gpt2 import GPT2

        return GPT2
    raise AttributeError(f"module 'model' has no attribute {name!r}")
