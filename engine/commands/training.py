"""`gpt2 train` and `gpt2 tune`."""

import sys
from dataclasses import dataclass

from engine import flags
from engine.errors import BadInput, nearest


def train(args: list[str], prog: str) -> None:
    """Trains in this process; torchrun engine/train.py trains in several."""
    from engine import config

    config.parse(args, prog)  # answers --help and bad flags before PyTorch is imported
    import runpy

    sys.argv = [prog, *args]
    runpy.run_module("engine.train", run_name="__main__")


def tune(args: list[str], prog: str) -> None:
    """Finds the fastest right way to train a preset on this machine, and writes it to a file."""
    import tyro

    @dataclass(frozen=True)
    class Tune:
        """Checks and times what a training step can run on here: implementations, tiles, micro-batch.

        gpt2 train reads what it writes. It needs no data.
        """

        preset: tyro.conf.Positional[str]  # whose model, context and step are tuned
        micro_batch_size: int | None = None  # sequences per forward pass; None: tuned too
        precision: str = "auto"  # auto, bf16, fp16, tf32 or fp32, as for gpt2 train
        max_minutes: float = 3.0  # minutes after which nothing more is tried
        out: str | None = None  # file to write; None: one per machine and model, in the cache directory

    asked = flags.checked(Tune, args, prog)
    from typing import get_args

    from engine.config import PRESETS, Precision

    if asked.preset not in PRESETS:
        raise BadInput(
            f"tune: the preset must be one that exists, got {asked.preset!r}{nearest(asked.preset, PRESETS)}"
        )
    if asked.precision not in get_args(Precision):
        raise BadInput(f"tune: --precision must be one of {', '.join(get_args(Precision))}, got {asked.precision!r}")
    from engine.tuning import tune as tuning

    config = tuning.check(asked.preset, asked.micro_batch_size, asked.precision, asked.max_minutes)
    tuning.tune(asked.preset, config, asked.max_minutes, asked.out)
