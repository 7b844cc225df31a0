"""A model of 2 layers and 32 channels over 257 bytes, and tokens for it."""

import dataclasses

import torch

from model import GPT2, GPT2Config

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=257)


def build(config: GPT2Config = TINY, seed: int = 0, **changes) -> GPT2:
    """A model whose weights follow the seed; the global random state is left where it leads."""
    torch.manual_seed(seed)
    return GPT2(dataclasses.replace(config, **changes))


def some_tokens(B: int = 2, T: int = 16, vocab_size: int = 257, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
