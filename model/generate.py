"""Sampling: draws one token at a time from the model's distribution over the next token.

repetition_penalty divides the positive logits of the tokens in the row so far, prompt included, and
multiplies the negative ones. temperature divides the logits; 0 takes the most likely token. top_k
keeps the k most likely tokens. top_p keeps the smallest set of most likely tokens whose
probabilities sum to at least p. min_p keeps the tokens that are at least p times as likely as the
most likely one. They apply in this order. The vocabulary's padding has no logits, so an id that the
tokenizer lacks is never drawn. Logits that are not finite are an error: the most likely of them
would be a token without a meaning.

At most `context` tokens are read, n_positions at most. The learned positions are absolute, so a
window that slides gives every token a new position, and what the cache holds is of no use. Hence a
full window drops its first quarter at once: the rest is read anew and the next quarter fills from
the cache. Which tokens are read depends on the length of the text alone (window_start).
Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1 (repetition_penalty); Holtzman et al. 2020,
arXiv:1904.09751 (top_p); Nguyen et al. 2024, arXiv:2407.01082 (min_p).
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model.cache import Decoder

SMALLEST = torch.finfo(torch.float32).tiny  # temperature and top_p; float32 would round smaller ones to 0
SLIDES = 4  # a full window drops 1 / SLIDES of its tokens
COPIES_FROM = 48  # new tokens of one float32 row from which it pays to copy the weights; else a quarter of it
LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # of models, see evaluation_mode


class NotFinite(ValueError):
    """Logits of a model that has diverged."""


@contextmanager
def evaluation_mode(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Context manager in which a model is in evaluation mode. Then each module has its own mode again.

    modules: the model's, if they are known: to list them takes a while. Other threads that enter it
    for the same model wait.
    """
    with LOCKS.setdefault(model, threading.RLock()):
        training = [module for module in modules or model.modules() if module.training]
        for module in training:  # nn.Module's own setter is slow, and this is done for each token
            vars(module)["training"] = False
        try:
            yield
        finally:
            for module in training:
                vars(module)["training"] = True


@dataclass(frozen=True)
class Options:
    """How a token is drawn. Of stream's arguments those that need no model."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def wrong(self) -> list[str]:
        """What is wrong with them, in sentences."""
        wrong = []
        if not 0.0 <= self.temperature < math.inf:
            wrong.append(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None:
            wrong += _not_integer("top_k", self.top_k, 1, math.inf, "at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            wrong.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            wrong.append(f"min_p must be 0 to 1, got {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            wrong.append(f"repetition_penalty must be 0.01 to 100, got {self.repetition_penalty}")
        return wrong


def _not_integer(name: str, value, least: int, most: float, limits: str) -> list[str]:
    """What is wrong with a value that must be an integer within these limits."""
    if not isinstance(value, Integral):
        return [f"{name} must be an integer, got {value!r}"]
    return [] if least <= value <= most else [f"{name} must be {limits}, got {value}"]


def filter_logits(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> Tensor:
    """Divides logits (B, V) by the temperature, and sets those outside top_k, top_p and min_p to -inf.

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
    if min_p is not None and min_p > 0.0:
        logits = logits.masked_fill(logits < math.log(min_p), float("-inf"))  # the largest is 0
    return logits


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens of `seen`, (B, V) bool, less likely if the penalty is above 1."""
    return torch.where(seen, torch.where(logits > 0.0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, options: Options, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row, (B, 1) int64, from logits (B, V). Row i reads generators[i] alone."""
    if options.temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    probs = filter_logits(logits, options.temperature, options.top_k, options.top_p, options.min_p).softmax(dim=-1)
    noise = torch.empty_like(probs)  # exponential; the largest quotient is at each token with its probability
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return probs.div_(noise).argmax(dim=-1, keepdim=True)


def window_start(length: int, context: int) -> int:
    """Index of the first token that is read of a text of this length.

    At most `context` tokens are read, and more than 3/4 of it of a longer text.
    """
    step = max(1, context // SLIDES)
    return max(0, -((context - length) // step) * step)


def stream(
    model,
    tokens: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    context: int | None = None,
    end_of_text: int | None = None,
    use_cache: bool = True,
    use_graph: bool | None = None,
    is_compiled: bool = False,
) -> Iterator[Tensor]:
    """Yields each next token, (B, 1) int64, as it is drawn.

    tokens: (B, T) int64, or a list of B prompts of any lengths, each (T,). Each row is continued as
    if it were alone: row i's draws depend on seed + i. context: most positions read; None: the
    model's n_positions. end_of_text: id after which a row has this id only; when all rows have it,
    the stream ends. use_cache: keep keys and values of what was read, else read the whole window for
    each token. use_graph: replay the decode step as a CUDA graph; None: on a GPU, unless the model
    is sharded. is_compiled: by torch.compile, which takes a minute before the first token.

    With a seed the draws are reproducible. PyTorch's global random state is neither read nor
    changed. The model is in evaluation mode only while a token is computed, so the stream may be
    left at any token. Threads with streams of one model take turns; none should train it meanwhile,
    for it may lose dropout. Raises ValueError, before drawing, if an argument is wrong, and
    NotFinite, while drawing, if a logit is not finite.
    """
    options = Options(temperature, top_k, top_p, min_p, repetition_penalty)
    _check(model, tokens, max_new_tokens, options, context, end_of_text, seed, use_graph)
    decoder = None
    with torch.inference_mode(False):  # inference tensors could not be changed outside of that mode
        text = Text(tokens, max_new_tokens, model.config.n_positions if context is None else context)
        if use_cache and max_new_tokens > 0:
            if use_graph is None:
                use_graph = text.tokens.device.type == "cuda" and not hasattr(model, "unshard")
            is_single = len(text.tokens) == 1 and model.compute_dtype == torch.float32
            decoder = Decoder(
                model,
                len(text.tokens),
                text.widest(max_new_tokens),
                uses_graph=use_graph,
                is_compiled=is_compiled,
                copies_weights=max_new_tokens >= COPIES_FROM // (1 if is_single else 4),
            )
    generators = [torch.Generator(device=text.tokens.device) for _ in text.tokens]
    for row, generator in enumerate(generators):
        generator.manual_seed(int(seed) + row) if seed is not None else generator.seed()
    return _stream(model, text, max_new_tokens, options, generators, end_of_text, decoder)


class Text:
    """Tokens of all rows so far, (B, T), of which shorter rows begin later: `lengths` are those of the rows."""

    def __init__(self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, context: int):
        self.lengths, self.context = [prompt.shape[0] for prompt in prompts], context
        self.width = max(self.lengths)
        size, device = self.width + max_new_tokens, prompts[0].device
        self.buffer = torch.zeros(len(prompts), size, dtype=torch.int64, device=device)
        for row, prompt in zip(self.buffer, prompts, strict=True):
            row[self.width - len(prompt) : self.width] = prompt

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, : self.width]

    def append(self, tokens: Tensor) -> None:
        """Adds one token to each row."""
        self.buffer[:, self.width : self.width + 1] = tokens
        self.width += 1
        self.lengths = [length + 1 for length in self.lengths]

    def starts(self) -> list[int]:
        """The first token that is read, of each row."""
        return [window_start(length, self.context) for length in self.lengths]

    def widest(self, max_new_tokens: int) -> int:
        """Most tokens of a row that are read at once."""
        return min(self.context, max(self.lengths) + max_new_tokens - 1)

    def seen(self, vocab_size: int) -> Tensor:
        """Which tokens each row has, (B, V) bool."""
        seen = torch.zeros(len(self.buffer), vocab_size, dtype=torch.bool, device=self.buffer.device)
        for row, tokens, length in zip(seen, self.tokens, self.lengths, strict=True):
            row[tokens[self.width - length :]] = True
        return seen


def _check(model, tokens, max_new_tokens, options: Options, context, end_of_text, seed, use_graph) -> None:
    V, n_positions = model.config.vocab_size, model.config.n_positions
    wrong = _wrong_prompts(tokens, V)
    B = 1 if wrong else len(tokens)
    wrong += _not_integer("max_new_tokens", max_new_tokens, 0, math.inf, "at least 0")
    wrong += options.wrong()
    if context is not None:
        wrong += _not_integer("context", context, 1, n_positions, f"1 to the model's {n_positions} positions")
    if end_of_text is not None:
        wrong += _not_integer("end_of_text", end_of_text, 0, V - 1, f"0 to {V - 1}")
    if seed is not None:  # PyTorch takes any 64 bits, with a sign or without; the last row's is seed + B - 1
        wrong += _not_integer("seed", seed, -(2**63), 2**64 - B, f"-2^63 to 2^64 - {B}")
    if use_graph and (kind := model.wte.weight.device.type) != "cuda":
        wrong.append(f"use_graph must be False or None unless the model is on a CUDA device, got a model on {kind}")
    if wrong:
        raise ValueError("generate: " + "; ".join(wrong))


def _wrong_prompts(tokens, vocab_size: int) -> list[str]:
    """What is wrong with the prompts, in sentences."""
    is_batch = isinstance(tokens, Tensor)
    if not is_batch and (not isinstance(tokens, Sequence) or isinstance(tokens, str)):
        return [f"tokens must be a tensor or a list of tensors, got {type(tokens).__name__}"]
    rows, shape = ([tokens], 2) if is_batch else (tokens, 1)
    names = "(B, T) int64 with T >= 1" if is_batch else "a list of (T,) int64 with T >= 1"
    wrong = []
    for row in rows:
        if not isinstance(row, Tensor):
            wrong.append(f"tokens must be {names}, got one of type {type(row).__name__}; make it a tensor")
        elif row.ndim != shape or row.dtype != torch.int64 or row.shape[-1] == 0:
            wrong.append(f"tokens must be {names}, got {tuple(row.shape)} {row.dtype}")
        elif row.numel() and not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
            wrong.append(f"tokens must be 0 to {vocab_size - 1}, got {int(row.min())} to {int(row.max())}")
    if not wrong and len(tokens) == 0:
        wrong.append("tokens must be at least one prompt, got none")
    return wrong


def _stream(model, text: Text, max_new_tokens, options, generators, end_of_text, decoder) -> Iterator[Tensor]:
    seen, starts, modules = None, None, list(model.modules())
    with torch.inference_mode(False):
        ended = torch.zeros(len(text.tokens), 1, dtype=torch.bool, device=text.tokens.device)
        if options.repetition_penalty != 1.0:
            seen = text.seen(model.config.vocab_size)
    for _ in range(max_new_tokens):
        before, starts = starts, text.starts()
        with torch.inference_mode(False):  # not around yield, which would set the reader's mode
            with evaluation_mode(model, modules):
                if decoder is None:
                    logits = next_logits(model, text)
                elif starts == before:
                    logits = decoder.step(text.tokens[:, -1:])
                else:  # the prompt, or a window that has slid
                    lengths = [length - start for length, start in zip(text.lengths, starts, strict=True)]
                    logits = decoder.prefill(text.tokens, lengths)
            token = _chosen(logits, seen, options, generators)
            if end_of_text is not None:
                token = token.masked_fill(ended, end_of_text)
                ended |= token == end_of_text
            text.append(token)
        yield token
        if end_of_text is not None and bool(ended.all()):
            return


def _chosen(logits: Tensor, seen: Tensor | None, options: Options, generators) -> Tensor:
    """The next token of each row, which is added to `seen`. Raises NotFinite."""
    if not logits.sum().isfinite() and (odd := int((~logits.isfinite()).sum())):
        raise NotFinite(f"generate: the model's logits must be finite, got {odd} of {logits.numel()} that are not")
    if seen is not None:
        logits = penalize(logits, seen, options.repetition_penalty)
    token = draw(logits, options, generators)
    if seen is not None:
        seen.scatter_(1, token, True)
    return token


@torch.no_grad()
def next_logits(model, text: Text) -> Tensor:
    """Float32 logits (B, V) of the token after each row, without a cache. Rows of other lengths are read alone."""
    starts = text.starts()
    if len(set(text.lengths)) == 1:
        return model.last_logits(text.tokens[:, starts[0] :]).float()
    rows = zip(text.tokens, text.lengths, starts, strict=True)
    alone = [row[None, text.width - length + start :] for row, length, start in rows]
    return torch.cat([model.last_logits(row) for row in alone]).float()


def generate(model, tokens: Tensor | Sequence[Tensor], max_new_tokens: int, **options) -> Tensor | list[Tensor]:
    """Returns tokens (B, T) int64 followed by max_new_tokens drawn tokens: (B, T + max_new_tokens).

    Fewer if all rows have ended before. Of a list of prompts, the list of these, each with its
    continuation. `options` are the keyword arguments of `stream`.
    """
    drawn = list(stream(model, tokens, max_new_tokens, **options))
    if isinstance(tokens, Tensor):
        return torch.cat([tokens, *drawn], dim=1)
    new = torch.cat(drawn, dim=1) if drawn else [prompt[:0] for prompt in tokens]
    return [torch.cat([prompt, row]) for prompt, row in zip(tokens, new, strict=True)]
