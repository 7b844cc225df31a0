"""`gpt2 presets` and `gpt2 doctor`."""

import functools
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import flags, output
from engine.errors import DAMAGED, DONE, BadInput, nearest

if TYPE_CHECKING:
    from engine.checks.doctor import Report


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
    """Shows what this machine has, and what each op runs on here and why. Starts and writes nothing.

    With --check it makes the self-check of the ops on a GPU, and remembers it for gpt2 train.
    """

    preset: str = "gpt2"  # model preset, for its head_dim
    head_dim: int | None = None  # elements per attention head; None: the preset's
    precision: str = "auto"  # auto, bf16, fp16, tf32 or fp32, as for gpt2 train
    check: bool = False  # compare the Triton ops with their definitions now; exit code 1 if one is wrong
    out: str | None = None  # run directory, to show the room on its disk
    json: bool = False  # print JSON


def doctor(args: list[str], prog: str) -> int:
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
    if asked.check and head_dim != PRESETS[asked.preset].head_dim:
        raise BadInput(f"doctor: --check is of a preset's heads, got --head-dim {head_dim}; leave one of them out")
    found = _examine(asked, head_dim)
    print(json.dumps(found.as_json(), indent=1) if asked.json else found.text(output.columns(sys.stdout)))
    return DAMAGED if asked.check and found.failed else DONE


def _examine(asked: Doctor, head_dim: int) -> "Report":
    """The report for a preset's heads, or for others."""
    from engine import config, device
    from engine.checks import doctor as checks
    from engine.checks import selfcheck
    from engine.tuning import record

    preset = config.PRESETS[asked.preset]
    if head_dim != preset.model.head_dim:  # nothing is remembered of other heads
        return checks.report(head_dim, asked.precision, lambda *_: None, out=asked.out)
    tuning, note = record.find(preset, device.current())
    if tuning is not None and asked.precision not in ("auto", tuning.setup.precision):
        tuning, note = None, f"ignored, it is for {tuning.setup.precision}"
    tiles, ops = (tuning.setup.tiles, tuning.setup.ops) if tuning is not None else ({}, {})
    recall = functools.partial(selfcheck.renew_for if asked.check else selfcheck.recall_for, preset, tuned=tiles)
    note = note.removeprefix("tuned: ")
    return checks.report(head_dim, asked.precision, recall, ops, note, asked.out, asked.check)
