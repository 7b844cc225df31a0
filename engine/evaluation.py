"""Validation loss on a fixed set of tokens, computed by all ranks, and text samples.

The windows are spread evenly over the validation stream, in batches of a fixed size. They do not
depend on batch size, number of ranks or step. Each rank evaluates whole batches, and every rank
adds the batches' sums in the same order. So the loss has the same bits on any number of ranks.
"""

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine import device
from engine.distributed import Ranks, is_sharded, outside_training
from engine.errors import BadInput
from engine.tokens.shards import TokenStream
from engine.tokens.tokenizer import Tokenizer
from model import generate
from model.gpt2 import GPT2

BATCH_TOKENS = 8192  # tokens per forward pass
STOP_EVERY = 16  # tokens of several samples after which their text is looked at


def windows(stream: TokenStream, context: int, eval_tokens: int) -> np.ndarray:
    """Indices of the validation windows, spread evenly.

    Raises BadInput if the stream has no whole window.
    """
    num_windows = stream.num_windows(context)
    if num_windows == 0:
        raise BadInput(
            f"data: the validation split must hold at least {context + 1} tokens, got {len(stream)}; "
            "prepare more text or a larger --val-fraction, or lower --context"
        )
    count = min(num_windows, max(1, eval_tokens // context))
    return np.arange(count) * num_windows // count


def num_batches(num_windows: int, context: int) -> int:
    """Batches of an evaluation, over all ranks."""
    return math.ceil(num_windows / max(1, BATCH_TOKENS // context))


@torch.no_grad()
def mean_loss(
    raw_model: GPT2,
    stream: TokenStream,
    windows: np.ndarray,
    context: int,
    ranks: Ranks,
    progress: Callable[[], None] = lambda: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss over the windows, in nats per token, without dropout. All ranks call it.

    progress: called after each batch. is_interrupted: whether this rank is asked to stop; if any
    is, the rest is left out and the mean is None on every rank. A sharded model evaluates all.
    Each module's mode is then as before.
    """
    size = max(1, BATCH_TOKENS // context)  # sequences per batch
    batches = np.split(windows, range(size, len(windows), size))
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
    return None if interrupted else sum(losses) / len(windows)


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
