"""Validation loss on a fixed set of tokens, shared among all ranks.

The set is the same whatever the batch size, the number of ranks or the step: windows spread evenly over the
validation stream, in batches of a fixed size. Ranks take whole batches and the sum is made in batch order on every
rank, so the figure is the same to the last bit on any number of them.
"""

import math

import numpy as np
import torch

from engine.config import TrainConfig
from engine.data import TokenStream
from engine.distributed import Ranks, is_sharded, outside_training
from engine.errors import BadInput
from model.gpt2 import GPT2

BATCH_TOKENS = 8192


def windows(stream: TokenStream, config: TrainConfig) -> np.ndarray:
    """The numbers of the validation windows, spread evenly. Raises BadInput if the stream has none."""
    present = stream.num_windows(config.sequence_length)
    if present == 0:
        raise BadInput(
            f"data: the validation split must hold at least {config.sequence_length + 1} tokens, got {len(stream)}; "
            "prepare more text or a larger --val-fraction, or lower --context"
        )
    count = min(present, max(1, config.eval_tokens // config.sequence_length))
    return np.arange(count) * present // count


@torch.no_grad()
def mean_loss(raw_model: GPT2, stream: TokenStream, chosen: np.ndarray, config: TrainConfig, ranks: Ranks) -> float:
    """Mean loss per token over the chosen windows, in nats, with dropout off. Leaves the model as it was."""
    size = max(1, BATCH_TOKENS // config.sequence_length)  # sequences
    batches = np.split(chosen, range(size, len(chosen), size))
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
                batch = stream.windows(numbers, config.sequence_length).to(ranks.device)  # (B, T + 1)
                loss = raw_model(batch[:, :-1], batch[:, 1:])
                if index < len(batches):
                    sums[index] = loss.double() * len(batch)
    finally:
        raw_model.train(was_training)
    return ranks.sum(sums).sum().item() / len(chosen)
