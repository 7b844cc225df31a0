"""GPU memory of a training step, by an estimate, and the largest micro-batch that fits."""

import torch

from engine.config import TrainConfig
from model.presets import activation_bytes, num_parameters

MICRO_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # sequences, of which a GPU takes the first that fits
MARGIN = 0.1  # share of the free memory left for fragments, workspaces and what the estimate leaves out


def step_bytes(config: TrainConfig, micro_batch_size: int, dtype: torch.dtype, shards: int = 1) -> int:
    """Estimate of the GPU memory that one step takes, compiled and with AdamW.

    shards: ranks that share one copy of weights, gradients and moments.
    """
    model, tokens = config.model, micro_batch_size * config.sequence_length
    parameters = num_parameters(model)
    block = (parameters - model.n_embd * (model.padded_vocab_size + model.n_positions)) // model.n_layer
    # Under FSDP with resharding a rank holds the whole weights of two blocks and of the embeddings only.
    whole = parameters if shards == 1 or not config.reshard else parameters - max(0, model.n_layer - 2) * block
    per_whole = 4 + (dtype.itemsize if dtype.itemsize < 4 or shards > 1 else 0)  # this micro-batch's gradients, casts
    dweight = 4 * model.padded_vocab_size * model.n_embd
    logits = min(tokens, 8192) * model.padded_vocab_size * (dtype.itemsize + 4)  # a chunk's, and a float32 copy
    gradients = 10 * tokens * model.n_embd * dtype.itemsize  # of one block's activations
    stored = activation_bytes(model, tokens, dtype.itemsize, config.recompute)
    return 16 * parameters // shards + per_whole * whole + dweight + logits + gradients + stored


def largest_micro_batch(config: TrainConfig, dtype: torch.dtype, free_bytes: int, shards: int = 1) -> int:
    """The largest of MICRO_BATCHES whose estimate fits into free_bytes with a margin; 1 if none does."""
    room = free_bytes * (1 - MARGIN)
    return next((size for size in MICRO_BATCHES if step_bytes(config, size, dtype, shards) <= room), 1)
