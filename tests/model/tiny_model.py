"""A model of 2 layers, 32 channels and 257 tokens, and input for it."""

import dataclasses

import torch

from model import GPT2, GPT2Config

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=257)


def build(config: GPT2Config = TINY, seed: int = 0, **changes) -> GPT2:
    """Model with the weights of this seed. Leaves the global random state seeded."""
    torch.manual_seed(seed)
    return GPT2(dataclasses.replace(config, **changes))


def some_tokens(B: int = 2, T: int = 16, vocab_size: int = 257, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
