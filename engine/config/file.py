"""config.json of a run: the config as JSON, and back. And the file of --config, which may be one, or a TOML."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from engine import output
from engine.config import toml
from engine.config.fields import TrainConfig
from engine.errors import BadInput
from engine.tokens import foreign
from model.files import BadFile, check_fields, make, parse_json, read, read_json

CONFIG_FILE = "config.json"
THIS_RUN_ONLY = ("resume", "resume_changed")  # of how a run went on, which is nothing for the next run


class Given(NamedTuple):
    """What the file of --config holds."""

    is_run: bool  # whether it is the config.json of a run, which holds every setting
    preset: str | None
    values: dict[str, Any]  # by dotted names


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


def given(file: str, prog: str) -> Given:
    """What a file of settings holds: a TOML, a run's config.json, or a directory with one.

    Raises BadInput if it is none of them, or a name or type in it is wrong.
    """
    path = Path(file) / CONFIG_FILE if os.path.isdir(file) else Path(file)
    must = f"{prog}: --config must be a TOML file, or a run's {CONFIG_FILE}, got {path}"
    try:
        content = read(path)
        if path.suffix == ".json" or content.lstrip()[:1] == b"{":
            return Given(True, None, _of_run(content))
        return Given(False, *toml.parse(content))
    except FileNotFoundError as error:
        raise BadInput(f"{must}, which does not exist") from error
    except BadFile as error:
        raise BadInput(f"{must}: {error}") from error
    except ValueError as error:
        raise BadInput(f"{prog}: {path}: {error}") from error


def _of_run(content: bytes) -> dict[str, Any]:
    """Every setting of a run that the next one takes over. Raises ValueError if it is no run's config."""
    found = parse_json(content)
    if isinstance(found, dict) and "model_type" in found:
        raise BadFile("the config of weights, which --init-from takes")
    config = from_dict(found)
    return {name: toml.value_of(config, name) for name in toml.FIELDS if name not in THIS_RUN_ONLY}
