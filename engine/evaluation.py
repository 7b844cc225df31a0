"""Validation loss on a fixed set of tokens, computed by all ranks, and text samples.

The windows are spread evenly over the validation stream, in batches of a fixed size. They do not
depend on batch size, number of ranks or step. Each rank evaluates whole batches, and every rank
adds the batches' sums in the same order. So the loss has the same bits on any number of ranks.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from engine.distributed import Ranks, is_sharded, outside_training
from engine.errors import BadInput
from engine.tokens.shards import TokenStream
from engine.tokens.tokenizer import Tokenizer
from model import generate
from model.gpt2 import GPT2

BATCH_TOKENS = 8192  # tokens per forward pass


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


@torch.no_grad()
def mean_loss(
    raw_model: GPT2,
    stream: TokenStream,
    windows: np.ndarray,
    context: int,
    ranks: Ranks,
    progress: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over the windows, in nats per token, without dropout. All ranks call it.

    progress: called after each batch. Restores the model's training mode.
    """
    size = max(1, BATCH_TOKENS // context)  # sequences per batch
    batches = np.split(windows, range(size, len(windows), size))
    sums = torch.zeros(len(batches), dtype=torch.float64, device=ranks.device)
    end = len(batches)
    if is_sharded(raw_model):  # each forward needs all ranks: spare ranks repeat the last batch and drop its loss
        end = math.ceil(end / ranks.world_size) * ranks.world_size
    was_training = raw_model.training
    raw_model.eval()
    try:
        with outside_training(raw_model):
            for index in range(ranks.rank, end, ranks.world_size):
                indices = batches[min(index, len(batches) - 1)]
                batch = stream.windows(indices, context).to(ranks.device)  # (B, T + 1)
                loss = raw_model(batch[:, :-1], batch[:, 1:])
                if index < len(batches):
                    sums[index] = loss.double() * len(batch)
                progress()
    finally:
        raw_model.train(was_training)
    return ranks.sum(sums).sum().item() / len(windows)


def sample(
    raw_model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    seed: int,
    ranks: Ranks,
    progress: Callable[[], None] = lambda: None,
) -> str:
    """Continues a prompt with the current weights. All ranks call it; rank 0 has the text.

    progress: called after each token. Returns prompt and continuation. The same
    seed makes the same random draws at every step.
    """
    if not ranks.is_first and not is_sharded(raw_model):  # a sharded model runs on all ranks or on none
        return ""
    tokens = torch.tensor([tokenizer.encode(prompt).tolist()], device=raw_model.wte.weight.device)
    with outside_training(raw_model):
        for token in generate.stream(raw_model, tokens, max_new_tokens, temperature=0.8, top_k=50, seed=seed):
            tokens = torch.cat([tokens, token], dim=1)
            progress()
    return tokenizer.decode(tokens[0])
