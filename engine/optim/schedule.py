"""Learning rate of every step.

Sources: Brown et al. 2020, arXiv:2005.14165, appendix B; Hu et al. 2024 (MiniCPM), arXiv:2404.06395.
"""

import math

from engine.config import TrainConfig


def warmup_steps(config: TrainConfig) -> int:
    """Warm-up steps: ceil(warmup_tokens / tokens_per_step), at most a tenth of the run."""
    wanted = math.ceil(config.optim.warmup_tokens / config.tokens_per_step)
    return min(wanted, max(1, config.num_steps // 10))


def decay_begins(config: TrainConfig) -> int:
    """Step from which the learning rate falls: the last at the peak."""
    warmup = warmup_steps(config)
    if config.optim.schedule == "cosine":
        return warmup
    return max(warmup, config.num_steps - max(1, round(config.optim.decay_share * config.num_steps)))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate at `step` (0-based): linear warm-up to lr, then down to min_lr_ratio * lr at the end.

    cosine: half a period, from the end of the warm-up. wsd (warm-up, stable, decay): lr until
    decay_share of the run is left, then linear decay.
    """
    optim, warmup = config.optim, warmup_steps(config)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    begins = decay_begins(config)
    progress = min(1.0, max(0, step - begins) / max(1, config.num_steps - begins))
    height = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
    lowest = optim.lr * optim.min_lr_ratio
    return lowest + (optim.lr - lowest) * height


def describe(config: TrainConfig) -> str:
    """The schedule in words."""
    optim = config.optim
    begins = decay_begins(config)
    stable = f"constant to step {begins:,}, " if begins > warmup_steps(config) else ""
    fall = "cosine" if optim.schedule == "cosine" else "linear"
    warmup = f"linear warm-up over {warmup_steps(config):,} steps"
    return f"{warmup}, {stable}{fall} to {100 * optim.min_lr_ratio:.0f}% at step {config.num_steps:,}"
