"""Validation loss on a fixed set of tokens, computed by all ranks, and text samples.

The windows are spread evenly over the validation stream, in batches of a fixed size. They do not
depend on batch size, number of ranks or step. Each rank evaluates whole batches, and every rank
adds the batches' sums in the same order. So the loss has the same bits on any number of ranks.
Of several data sets the loss is the mean of each one's loss, by the weights of the training data.
"""

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import device
from engine.distributed import Ranks, is_sharded, outside_training
from engine.errors import BadInput
from engine.tokens import mixture
from engine.tokens.mixture import Stream
from engine.tokens.tokenizer import Tokenizer
from model import generate
from model.gpt2 import GPT2

BATCH_TOKENS = 8192  # tokens per forward pass
STOP_EVERY = 16  # tokens of several samples after which their text is looked at


def windows(stream: Stream, context: int, eval_tokens: int) -> np.ndarray:
    """Indices of the validation windows, spread evenly over each set, which has its share of them by weight.

    Raises BadInput if a set has no whole window.
    """
    sets = mixture.members(stream, context)
    whole, found = sum(one.parts for one in sets), []
    for one in sets:
        if one.num_windows == 0:
            of = f" of {one.directory}" if one.directory else ""
            raise BadInput(
                f"data: the validation split{of} must hold at least {context + 1} tokens, got {len(one.stream)}; "
                "prepare more text or a larger --val-fraction, or lower --context"
            )
        count = min(one.num_windows, max(1, eval_tokens * one.parts // whole // context))
        found.append(one.first + np.arange(count) * one.num_windows // count)
    return np.concatenate(found)


def of_sets(stream: Stream, windows: np.ndarray, context: int) -> list[np.ndarray]:
    """The windows of each set."""
    firsts = [one.first for one in mixture.members(stream, context)]
    return np.split(windows, np.searchsorted(windows, firsts[1:]))


def num_batches(num_windows: int, context: int) -> int:
    """Batches of an evaluation, over all ranks."""
    return math.ceil(num_windows / max(1, BATCH_TOKENS // context))


@torch.no_grad()
def mean_losses(
    raw_model: GPT2,
    stream: Stream,
    windows: np.ndarray,
    context: int,
    ranks: Ranks,
    progress: Callable[[], None] = lambda: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> list[float] | None:
    """Mean loss over the windows of each data set, in nats per token, without dropout. All ranks call it.

    progress: called after each batch. is_interrupted: whether this rank is asked to stop; if any
    is, the rest is left out and the result is None on every rank. A sharded model evaluates all.
    Each module's mode is then as before.
    """
    size = max(1, BATCH_TOKENS // context)  # sequences per batch
    sets = of_sets(stream, windows, context)
    batches = [batch for own in sets for batch in np.split(own, range(size, len(own), size))]
    wide = device.widest(ranks.device)
    sums = torch.zeros(len(batches) + 1, dtype=wide, device=ranks.device)  # the last: ranks interrupted
    end = len(batches)
    if is_sharded(raw_model):  # each forward needs all ranks: spare ranks repeat the last batch and drop its loss
        end = math.ceil(end / ranks.world_size) * ranks.world_size
    with generate.evaluation_mode(raw_model), outside_training(raw_model):
        for index in range(ranks.rank, end, ranks.world_size):
            if not is_sharded(raw_model) and is_interrupted():
                sums[-1] = 1.0
                break
            indices = batches[min(index, len(batches) - 1)]
            batch = stream.windows(indices, context).to(ranks.device)  # (B, T + 1)
            loss = raw_model(batch[:, :-1], batch[:, 1:])
            if index < len(batches):
                sums[index] = loss.to(wide) * len(batch)
            progress()
    *losses, interrupted = ranks.sum(sums).tolist()
    left = iter(losses)
    counts = [num_batches(len(own), context) for own in sets]
    return None if interrupted else [sum(islice(left, n)) / len(own) for own, n in zip(sets, counts, strict=True)]


def mean_loss(raw_model: GPT2, stream: Stream, *rest: Any, **options: Any) -> float | None:
    """The mean of the sets' losses by their weights. The arguments are those of mean_losses."""
    losses = mean_losses(raw_model, stream, *rest, **options)
    return None if losses is None else mixture.mean(stream, losses)


def perplexity(loss: float) -> float:
    """e^loss; infinity where a float cannot hold it, from a loss of 710 up."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def num_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of the text that tokens stand for. An end-of-text token stands for none."""
    counts = np.bincount(tokens.reshape(-1), minlength=tokenizer.vocab_size)
    counts[tokenizer.end_of_text] = 0
    return sum(int(counts[token]) * len(tokenizer.decode_bytes([token])) for token in np.flatnonzero(counts))


def weighted_bytes(stream: Stream, windows: np.ndarray, predicted: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of the text of the windows' targets, (n, T), as if each set had its weight's share of them."""
    counts = [len(own) for own in of_sets(stream, windows, predicted.shape[1])]
    sets = np.split(predicted, np.cumsum(counts)[:-1])
    return round(mixture.mean(stream, [num_bytes(own, tokenizer) / own.size for own in sets]) * predicted.size)


def sample(
    raw_model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    context: int,
    seed: int,
    goes_on: Callable[[], bool] = lambda: True,
) -> str:
    """Prompt and its continuation by the current weights.

    context: most positions read. goes_on: called after each token, whether to draw another. The same
    seed makes the same random draws at every step. A sharded model needs the call on all ranks.
    No CUDA graph, whose memory would stay beside that of training. Raises NotFinite if a logit is not finite.
    """
    tokens = torch.tensor([tokenizer.encode(prompt).tolist()], device=raw_model.wte.weight.device)
    with outside_training(raw_model):
        options = {"temperature": 0.8, "top_k": 50, "seed": seed, "context": context, "use_graph": False}
        for token in generate.stream(raw_model, tokens, max_new_tokens, **options):
            tokens = torch.cat([tokens, token], dim=1)
            if not goes_on():
                break
    return tokenizer.decode(tokens[0])


class Row:
    """Text of a row's tokens, up to an end-of-text token. A character may span several tokens.

    stop: strings before the first of which the text ends. What may begin one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.has_ended = "", False

    def add(self, token: int) -> str:
        """The text that is sure now. All that was held if this token ends it."""
        if token == self.tokenizer.end_of_text:
            return self.end()
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        ready = len(self.held)
        if found := [at for string in self.stop if (at := self.held.find(string)) >= 0]:
            ready, self.has_ended = min(found), True
        else:
            ready -= max(
                (n for string in self.stop for n in range(1, len(string)) if self.held.endswith(string[:n])), default=0
            )
        text, self.held = self.held[:ready], self.held[ready:]
        return text

    def end(self) -> str:
        """Ends the text. Returns what was held back."""
        self.has_ended = True
        return self.held + self.decoder.decode(b"", final=True)


def pieces(drawn: Iterable[Tensor], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """Text of each drawn token, as of Row."""
    row = Row(tokenizer, stop)
    for token in drawn:
        yield row.add(token.item())
        if row.has_ended:
            return
    yield row.end()


def continuations(drawn: Iterable[Tensor], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> list[str]:
    """Text of each row of the drawn tokens, (B, 1) each, as of Row. Draws until each row has ended."""
    drawn, rows, texts = iter(drawn), [], []
    while columns := list(islice(drawn, STOP_EVERY)):
        block = torch.cat(columns, dim=1).tolist()
        if not rows:
            rows, texts = [Row(tokenizer, stop) for _ in block], [[] for _ in block]
        for row, text, tokens in zip(rows, texts, block, strict=True):
            for token in tokens:
                if not row.has_ended:
                    text.append(row.add(token))
        if all(row.has_ended for row in rows):
            break
    return ["".join(text) + ("" if row.has_ended else row.end()) for row, text in zip(rows, texts, strict=True)]
