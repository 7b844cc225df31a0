"""config.json: the config as JSON, and back."""

import dataclasses
import os
from pathlib import Path

from engine import output
from engine.config.fields import TrainConfig
from engine.errors import BadInput
from engine.tokens import foreign
from model.files import check_fields, make, read_json

CONFIG_FILE = "config.json"


def to_dict(config: TrainConfig) -> dict:
    """The config as JSON types."""
    return dataclasses.asdict(config)


def from_dict(fields: dict) -> TrainConfig:
    """Inverse of to_dict. Ignores fields that this version does not know.

    Raises ValueError if a field has another type or value.
    """
    return make(TrainConfig, check_fields(fields, {"model": dict, "optim": dict}))


def load(run: str | Path) -> TrainConfig:
    """The config of a run directory.

    Raises BadInput if it has no config.json, or one that cannot be read.
    """
    path = Path(run) / CONFIG_FILE
    if not os.path.lexists(path) or foreign.what(run).kind == "weights":  # which have one too
        raise BadInput(
            f"run: must be a directory made by gpt2 train, with a {CONFIG_FILE}, got {run}"
            f"{foreign.hint(run, f'make one with {output.program()} train')}"
        )
    try:
        config = from_dict(read_json(path))
        if wrong := config.problems():
            raise ValueError(wrong[0])
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: must be the config of a run, got {error}") from error
    return config
