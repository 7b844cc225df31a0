"""Validation loss on a fixed set of tokens, computed by all ranks, and the text sample that goes with it.

The set does not depend on batch size, number of ranks or step: windows spread evenly over the validation stream, in
batches of a fixed size. Each rank takes whole batches, and every rank adds the batches' sums in the same order. So the
loss has the same bits on any number of ranks.
"""

import math

import numpy as np
import torch

from engine.distributed import Ranks, is_sharded, outside_training
from engine.errors import BadInput
from engine.tokens.shards import TokenStream
from engine.tokens.tokenizer import Tokenizer
from model.generate import generate
from model.gpt2 import GPT2

BATCH_TOKENS = 8192


def windows(stream: TokenStream, context: int, eval_tokens: int) -> np.ndarray:
    """Numbers of the validation windows, spread evenly. Raises BadInput if the stream has no whole window."""
    present = stream.num_windows(context)
    if present == 0:
        raise BadInput(
            f"data: the validation split must hold at least {context + 1} tokens, got {len(stream)}; "
            "prepare more text or a larger --val-fraction, or lower --context"
        )
    count = min(present, max(1, eval_tokens // context))
    return np.arange(count) * present // count


@torch.no_grad()
def mean_loss(raw_model: GPT2, stream: TokenStream, windows: np.ndarray, context: int, ranks: Ranks) -> float:
    """Mean loss per token over the windows, in nats, without dropout. All ranks call it. Leaves the model as it was."""
    size = max(1, BATCH_TOKENS // context)  # sequences
    batches = np.split(windows, range(size, len(windows), size))
    sums = torch.zeros(len(batches), dtype=torch.float64, device=ranks.device)
    end = len(batches)
    if is_sharded(raw_model):  # each forward needs all ranks: in the last round some repeat the last batch, uncounted
        end = math.ceil(end / ranks.world_size) * ranks.world_size
    was_training = raw_model.training
    raw_model.eval()
    try:
        with outside_training(raw_model):
            for index in range(ranks.rank, end, ranks.world_size):
                numbers = batches[min(index, len(batches) - 1)]
                batch = stream.windows(numbers, context).to(ranks.device)  # (B, T + 1)
                loss = raw_model(batch[:, :-1], batch[:, 1:])
                if index < len(batches):
                    sums[index] = loss.double() * len(batch)
    finally:
        raw_model.train(was_training)
    return ranks.sum(sums).sum().item() / len(windows)


def sample(raw_model: GPT2, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, *, seed: int, ranks: Ranks) -> str:
    """The prompt continued by the model as it is now; the same seed draws alike at every step. Rank 0 has the text."""
    if not ranks.is_first and not is_sharded(raw_model):  # a sharded model runs on all ranks or on none
        return ""
    tokens = torch.tensor([tokenizer.encode(prompt).tolist()], device=raw_model.wte.weight.device)
    with outside_training(raw_model):
        tokens = generate(raw_model, tokens, max_new_tokens, temperature=0.8, top_k=50, seed=seed)
    return tokenizer.decode(tokens[0])
