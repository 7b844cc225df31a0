"""Sampling: draws one token at a time from the model's distribution over the next token.

temperature divides the logits; 0 takes the most likely token. top_k keeps the k most likely tokens.
top_p keeps the smallest set of most likely tokens whose probabilities sum to at least p. Only the
last `context` tokens are read, n_positions at most. The vocabulary's padding has no logits, so an id
that the tokenizer lacks is never drawn. Logits that are not finite are an error: the most likely of
them would be a token without a meaning.
Source: Holtzman et al. 2020, arXiv:1904.09751 (top_p).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny  # temperature and top_p; float32 would round smaller ones to 0


class NotFinite(ValueError):
    """Logits of a model that has diverged."""


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Divides logits (B, V) by the temperature, and sets those outside top_k and top_p to -inf.

    The largest is subtracted first, which changes no probability: no quotient overflows to infinity.
    """
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, SMALLEST)
    if top_k is not None and top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, float("-inf"))
    if top_p is not None and top_p < 1.0:
        sorted_logits, indices = logits.sort(dim=-1, descending=True)
        probs = sorted_logits.softmax(dim=-1)
        probs_above = probs.cumsum(dim=-1) - probs  # total probability of all more likely tokens
        outside = probs_above >= max(top_p, SMALLEST)  # float32 would round a smaller one to 0
        removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, outside)
        logits = logits.masked_fill(removed, float("-inf"))
    return logits


def _check(model, tokens: Tensor, max_new_tokens: int, temperature: float, top_k, top_p, context) -> None:
    wrong = []
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
        wrong.append(f"tokens must be (B, T) int64 with T >= 1, got {tuple(tokens.shape)} {tokens.dtype}")
    elif tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        wrong.append(
            f"tokens must be 0 to {model.config.vocab_size - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )
    if max_new_tokens < 0:
        wrong.append(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0.0 <= temperature < math.inf:
        wrong.append(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        wrong.append(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        wrong.append(f"top_p must be above 0 and at most 1, got {top_p}")
    if context is not None and not 1 <= context <= model.config.n_positions:
        wrong.append(f"context must be 1 to the model's {model.config.n_positions} positions, got {context}")
    if wrong:
        raise ValueError("generate: " + "; ".join(wrong))


def stream(
    model,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    context: int | None = None,
) -> Iterator[Tensor]:
    """Yields each next token, (B, 1) int64, as it is drawn.

    context: most positions read; None: the model's n_positions. With a seed the draws are
    reproducible. PyTorch's global random state is neither read nor changed. Raises ValueError,
    before drawing, if an argument is wrong, and NotFinite, while drawing, if a logit is not finite.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k, top_p, context)
    context = model.config.n_positions if context is None else context
    return _stream(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, context)


def _stream(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, context) -> Iterator[Tensor]:
    generator = torch.Generator(device=tokens.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = next_logits(model, tokens, context)  # (B, V)
            if odd := int((~logits.isfinite()).sum()):
                raise NotFinite(
                    f"generate: the model's logits must be finite, got {odd} of {logits.numel()} that are not"
                )
            if temperature == 0.0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                probs = filter_logits(logits, temperature, top_k, top_p).softmax(dim=-1)
                token = torch.multinomial(probs, 1, generator=generator)
            tokens = torch.cat([tokens, token], dim=1)
            yield token
    finally:
        model.train(was_training)


@torch.no_grad()
def next_logits(model, tokens: Tensor, context: int) -> Tensor:
    """Float32 logits (B, V) of the token that follows tokens (B, T), of which the last `context` are read."""
    return model.last_logits(tokens[:, -context:]).float()


def generate(model, tokens: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Returns tokens (B, T) int64 followed by max_new_tokens drawn tokens: (B, T + max_new_tokens).

    `options` are the keyword arguments of `stream`.
    """
    return torch.cat([tokens, *stream(model, tokens, max_new_tokens, **options)], dim=1)
