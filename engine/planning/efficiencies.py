"""What share of a GPU's peak trainings of GPT-2 reached: measured here, published by others, or assumed.

MFU counts 6 (N - wpe) + 12 L C T FLOPs per token (model.presets.flops_per_token) against the dense
bf16 peak of engine.chips. The published ones are of 8 GPUs, with their all-reduce.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from engine.config import TrainConfig
from model.presets import PRESETS, num_parameters

Kind = Literal["measured", "published", "assumption"]
ASSUMED_MFU = 0.40
NEAR = 2.0  # a figure of another micro-batch counts as this one's up to this ratio of sizes


@dataclass(frozen=True)
class Efficiency:
    """A share of the peak and where it comes from."""

    mfu: float
    kind: Kind
    source: str
    gpu: str = ""
    model: str = ""  # a preset
    micro_batch_size: int = 0  # sequences of one GPU


KNOWN = (
    Efficiency(
        0.478,
        "measured",
        "this engine, 1 H200, GPT-2 124M, bf16, 552,619 tokens/s (bench/results/nvidia-h200/gpu.json)",
        "H200",
        "gpt2",
        64,
    ),
    Efficiency(
        0.405,
        "published",
        "llm.c, 8 H100, GPT-2 124M, 468,000 tokens/s per GPU with its all-reduce (modded-nanogpt, 2024-10-13)",
        "H100",
        "gpt2",
        64,
    ),
    Efficiency(
        0.487,
        "published",
        "llm.c, 8 H100, GPT-2 1558M, 46,800 tokens/s per GPU with its all-reduce (scripts/run_gpt2_1558M.sh)",
        "H100",
        "gpt2-xl",
        16,
    ),
    Efficiency(
        0.60,
        "published",
        "llm.c, 8 A100 of 80 GB, GPT-2 124M, 218,000 tokens/s per GPU with its all-reduce (scripts/run_gpt2_124M.sh)",
        "A100",
        "gpt2",
        64,
    ),
)


def of(gpu: str, config: TrainConfig, precision: str, micro_batch_size: int) -> Efficiency:
    """The known figure of this GPU nearest in size, called an assumption unless the training is alike.

    Alike: the same model in bf16 with ddp, nothing recomputed, in micro-batches of about the size.
    """
    known = [each for each in KNOWN if each.gpu == gpu]
    if not known:
        return Efficiency(ASSUMED_MFU, "assumption", f"no training on this GPU is known; {ASSUMED_MFU:.0%} of its peak")
    count = num_parameters(config.model)
    best = min(known, key=lambda each: abs(math.log(count / num_parameters(PRESETS[each.model]))))
    is_near = 1 / NEAR <= micro_batch_size / best.micro_batch_size <= NEAR
    way = (config.model, precision, config.parallel, config.recompute)
    if is_near and way == (PRESETS[best.model], "bf16", "ddp", "none"):
        return best
    return replace(best, kind="assumption", source=f"as of {best.source}")
