"""What share of a GPU's peak trainings of GPT-2 reached: measured here, published by others, or assumed.

MFU counts 6 (N - wpe) + 12 L C T FLOPs per token (model.presets.flops_per_token) against the dense
bf16 peak of engine.chips.
"""

import math
from dataclasses import dataclass
from typing import Literal

from model.presets import PRESETS, GPT2Config, num_parameters

Kind = Literal["measured", "published", "assumption"]
ASSUMED_MFU = 0.40
NEAR = 2.0  # a figure of another size counts as this size's up to this ratio of parameters


@dataclass(frozen=True)
class Efficiency:
    """A share of the peak and where it comes from."""

    mfu: float
    kind: Kind
    source: str
    gpu: str = ""
    model: str = ""  # a preset


KNOWN = (
    Efficiency(
        0.478,
        "measured",
        "this engine, 1 H200, GPT-2 124M, bf16, 552,619 tokens/s (bench/results/nvidia-h200/gpu.json)",
        "H200",
        "gpt2",
    ),
    Efficiency(
        0.405,
        "published",
        "llm.c, 8 H100, GPT-2 124M, 468,000 tokens/s per GPU (modded-nanogpt's records, 2024-10-13)",
        "H100",
        "gpt2",
    ),
    Efficiency(
        0.487,
        "published",
        "llm.c, 8 H100, GPT-2 1558M, 46,800 tokens/s per GPU (its scripts/run_gpt2_1558M.sh)",
        "H100",
        "gpt2-xl",
    ),
    Efficiency(
        0.60,
        "published",
        "llm.c, 8 A100 of 80 GB, GPT-2 124M, 218,000 tokens/s per GPU (its scripts/run_gpt2_124M.sh)",
        "A100",
        "gpt2",
    ),
)


def of(gpu: str, config: GPT2Config, precision: str) -> Efficiency:
    """The known figure of this GPU nearest in size, called an assumption where size or precision is another."""
    known = [each for each in KNOWN if each.gpu == gpu]
    if not known:
        return Efficiency(ASSUMED_MFU, "assumption", f"no training on this GPU is known; {ASSUMED_MFU:.0%} of its peak")

    def distance(each: Efficiency) -> float:
        return abs(math.log(num_parameters(config) / num_parameters(PRESETS[each.model])))

    best = min(known, key=distance)
    if distance(best) <= math.log(NEAR) and precision in ("bf16", "fp16"):
        return best
    return Efficiency(best.mfu, "assumption", f"as of {best.source}")
