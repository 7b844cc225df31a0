"""Learning rate of every step.

Source: Brown et al. 2020, arXiv:2005.14165, appendix B.
"""

import math

from engine.config import TrainConfig


def warmup_steps(config: TrainConfig) -> int:
    """Warm-up steps: ceil(warmup_tokens / tokens_per_step), at most a tenth of the run."""
    wanted = math.ceil(config.optim.warmup_tokens / config.tokens_per_step)
    return min(wanted, max(1, config.num_steps // 10))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate at `step` (0-based): linear warm-up to lr, cosine down to min_lr_ratio * lr."""
    peak, warmup = config.optim.lr, warmup_steps(config)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.num_steps - warmup))
    lowest = peak * config.optim.min_lr_ratio
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))
