"""`gpt2 presets` and `gpt2 doctor`."""

import functools
import json
from dataclasses import dataclass

from engine import flags
from engine.errors import BadInput, nearest


@dataclass(frozen=True)
class Presets:
    """Lists the presets of gpt2 train: size, tokens, learning rate, memory, and the machine each is for."""

    json: bool = False  # print JSON


def presets(args: list[str], prog: str) -> None:
    """Prints a row for each preset."""
    asked = flags.checked(Presets, args, prog)
    from engine.config import presets as known

    print(json.dumps(known.rows(), indent=1) if asked.json else known.table())


@dataclass(frozen=True)
class Doctor:
    """Shows what this machine has, and what each op runs on here and why. Starts nothing."""

    preset: str = "gpt2"  # model preset, for its head_dim
    head_dim: int | None = None  # elements per attention head; None: the preset's
    precision: str = "auto"  # auto, bf16, fp16, tf32 or fp32, as for gpt2 train


def doctor(args: list[str], prog: str) -> None:
    """Prints this machine's hardware and software, and the implementation of each op."""
    asked = flags.checked(Doctor, args, prog)
    from typing import get_args

    from engine.config import Precision
    from model.presets import PRESETS

    if asked.preset not in PRESETS:
        raise BadInput(f"doctor: --preset must be a preset, got {asked.preset!r}{nearest(asked.preset, PRESETS)}")
    if asked.precision not in get_args(Precision):
        raise BadInput(f"doctor: --precision must be one of {', '.join(get_args(Precision))}, got {asked.precision!r}")
    head_dim = PRESETS[asked.preset].head_dim if asked.head_dim is None else asked.head_dim
    if head_dim < 1:
        raise BadInput(f"doctor: --head-dim must be at least 1, got {head_dim}")
    import torch

    from engine import config
    from engine.checks import doctor as checks
    from engine.checks import selfcheck
    from engine.tuning import record

    preset = config.PRESETS[asked.preset]
    if head_dim != preset.model.head_dim:  # nothing is remembered of other heads
        print(checks.report(head_dim, asked.precision, lambda *_: None))
        return
    tuning, note = record.find(preset, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if tuning is not None and asked.precision not in ("auto", tuning.setup.precision):
        tuning, note = None, f"ignored, it is for {tuning.setup.precision}"
    tiles, ops = (tuning.setup.tiles, tuning.setup.ops) if tuning is not None else ({}, {})
    recall = functools.partial(selfcheck.recall_for, preset, tuned=tiles)
    print(checks.report(head_dim, asked.precision, recall, ops, note.removeprefix("tuned: ")))
