"""`gpt2 plan`."""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from engine import flags
from engine.errors import BadInput, nearest

if TYPE_CHECKING:
    from engine.planning.plan import Request

PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
MOST_GPUS, MOST_TOKENS = 1_000_000, 10**18
MOST_HOURS, MOST_MONEY = 1e9, 1e15
NUMBER = r"\d[\d_,]*(?:\.\d+)?(?:e[+-]?\d+)?"


def plan(args: list[str], prog: str) -> None:
    """Prints what a training run will take: memory, time, communication, disk, energy, cost."""
    import tyro

    @dataclass(frozen=True)
    class Plan:
        """Estimates what a training run will take, before it is paid for. Needs no GPU."""

        preset: tyro.conf.Positional[str]  # whose model and step are planned
        gpus: int = 1  # GPUs, one process each
        gpu: str = "h100"  # kind of GPU: h100, h200, a100 or "rtx a6000"
        tokens: str = "10B"  # tokens to train on, as 10B, 2.5e9 or 524288
        parallel: str = "ddp"  # ddp, fsdp or hsdp, as for gpt2 train
        recompute: str = "none"  # none, attention or block, as for gpt2 train
        recipe: str = "preset"  # preset or fast, as for gpt2 train: fast takes Muon
        precision: str = "bf16"  # bf16, fp16, tf32 or fp32, as for gpt2 train
        gpus_per_node: int = 8  # GPUs of one host, which NVLink or PCIe connects
        price_per_gpu_hour: float | None = None  # for the cost, in any currency
        budget: str | None = None  # 24h: hours on all GPUs; 500: money, with --price-per-gpu-hour
        json: bool = False  # print the plan as JSON

    asked = flags.checked(Plan, args, prog)
    import json

    from engine.planning import plan as planning
    from engine.planning import summary

    made = planning.make(request(asked))
    print(json.dumps(made, indent=2) if asked.json else summary.text(made))


def request(asked: Any) -> "Request":
    """What the flags of `plan` ask for. Raises BadInput."""
    import dataclasses

    from engine.chips import CHIPS
    from engine.config import PRESETS
    from engine.config.presets import Recipe, with_recipe
    from engine.planning.communication import ITEMSIZE
    from engine.planning.plan import WAYS, Request
    from engine.planning.roofline_ops import RECOMPUTE

    if asked.preset not in PRESETS:
        got = f"{asked.preset!r}{nearest(asked.preset, PRESETS)}"
        raise BadInput(f"plan: the preset must be one that exists, got {got}")
    chips = {name.lower(): chip for name, chip in CHIPS.items()}
    choices = {"gpu": chips, "parallel": WAYS, "recompute": RECOMPUTE, "precision": ITEMSIZE}
    choices["recipe"] = get_args(Recipe)
    for name, known in choices.items():
        value = getattr(asked, name)
        if (value.lower() if name == "gpu" else value) not in known:
            raise BadInput(f"plan: --{name} must be one that is known, got {value!r}{nearest(value.lower(), known)}")
    for name in ("gpus", "gpus_per_node"):
        if not 1 <= (value := getattr(asked, name)) <= MOST_GPUS:
            raise BadInput(f"plan: --{name.replace('_', '-')} must be 1 to {MOST_GPUS:,}, got {value}")
    if asked.gpus > asked.gpus_per_node and asked.gpus % asked.gpus_per_node:
        raise BadInput(
            f"plan: --gpus must be a multiple of the {asked.gpus_per_node} of --gpus-per-node, or fewer, got "
            f"{asked.gpus}; the nearest is {asked.gpus // asked.gpus_per_node * asked.gpus_per_node}"
        )
    price = asked.price_per_gpu_hour
    if price is not None and not 0 < price < math.inf:
        raise BadInput(f"plan: --price-per-gpu-hour must be above 0 and finite, got {price}")
    if not 1 <= (tokens := number(asked.tokens)) <= MOST_TOKENS:
        raise BadInput(
            f"plan: --tokens must be a number of 1 to {MOST_TOKENS:g} such as 10B, 2.5e9 or 524288, got "
            f"{asked.tokens!r}"
        )
    changes = {"parallel": asked.parallel, "recompute": asked.recompute, "precision": asked.precision}
    config = dataclasses.replace(with_recipe(PRESETS[asked.preset], asked.recipe), **changes)
    inputs = (asked.preset, config, asked.gpus, chips[asked.gpu.lower()], asked.precision, round(tokens))
    return Request(*inputs, asked.gpus_per_node, price, budget_hours(asked.budget, price, asked.gpus))


def number(text: str) -> float:
    """A number such as 10B, 2.5e9 or 524,288; NaN if it is none."""
    match = re.fullmatch(rf"({NUMBER})\s*([kmbgt]?)", text.strip().lower())
    try:
        return float(match[1].replace(",", "").replace("_", "")) * PREFIXES[match[2]] if match else math.nan
    except (ValueError, OverflowError):
        return math.nan


def budget_hours(text: str | None, price: float | None, gpus: int) -> float | None:
    """Hours on all GPUs that a budget buys. Raises BadInput if it is none, or money without a price."""
    if text is None:
        return None
    words = text.strip().lower()
    hours = re.fullmatch(rf"({NUMBER})\s*h(ours?)?", words)
    value = number(hours[1] if hours else words.replace("$", ""))
    if not 1e-6 <= value <= (MOST_HOURS if hours else MOST_MONEY):
        raise BadInput(
            f"plan: --budget must be hours such as 24h, up to {MOST_HOURS:g}, or money such as 5000, up to "
            f"{MOST_MONEY:g}, got {text!r}"
        )
    if hours:
        return value
    if price is None:
        raise BadInput(
            f"plan: --budget in money must come with --price-per-gpu-hour, got {text!r} alone; for hours write {text}h"
        )
    return value / (price * gpus)
