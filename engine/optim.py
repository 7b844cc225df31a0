"""AdamW with GPT-3's settings, and the learning rate of every step.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101; settings of Brown et al. 2020, arXiv:2005.14165, appendix B.
"""

import math

import torch
from torch import nn

from engine.config import TrainConfig


def warmup_steps(config: TrainConfig) -> int:
    """Steps of linear warm-up: warmup_tokens' worth, at most a tenth of the run."""
    asked = math.ceil(config.optim.warmup_tokens / config.tokens_per_step)
    return min(asked, max(1, config.num_steps // 10))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the update at `step`, from 0: a linear rise to lr, then half a cosine down to min_lr_ratio * lr."""
    peak, rise = config.optim.lr, warmup_steps(config)
    if step < rise:
        return peak * (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, config.num_steps - rise))
    lowest = peak * config.optim.min_lr_ratio
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over the model's parameters; matrices and embeddings decay, biases and LayerNorm do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optim = config.optim
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
