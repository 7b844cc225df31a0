"""A run as a record to compare: its config, and what its rows measured, over steps, tokens and time.

Time is training time: step_ms of the rows times their updates. It leaves out evaluations,
checkpoints and the time between launches. Where a mean is more than STALL times the median, the
step compiled or the process stood still: it counts as the median.
"""

import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine import config as configs
from engine.config import CONFIG_FILE, TrainConfig
from engine.errors import BadInput
from engine.run import curves, directory, rows, settings
from engine.run.plots import LARGEST
from engine.tokens import tokenizer
from model.files import read_json

STALL = 5.0
AXES = ("tokens", "steps", "hours")
TIMES = ("data_ms", "compute_ms", "communication_ms")  # parts of step_ms
PAUSES = ("eval_ms", "checkpoint_ms")  # totals beside the steps
PARTS = dict(zip((*TIMES, *PAUSES), ("data", "compute", "communication", "evaluation", "checkpoint"), strict=True))
SCORES = (*curves.SCORES, "lambada_acc")  # fractions, where a run was scored
NAMES = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "peak_gib", *SCORES, "step_ms", *TIMES, *PAUSES)
# Of config.json, what is the run's own or of one launch, and no choice that could explain a difference.
OWN = ("out", "resume", "resume_changed", "wandb", "tensorboard", "profile", "max_minutes", "grace_seconds")


class Points(NamedTuple):
    """Finite values and where they were measured."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Record:
    """One run. columns: a value per row and name, NaN where a row has none."""

    run: str  # the directory, as given
    label: str  # tells it from the others beside it
    config: TrainConfig
    tokenizer: str
    digest: str | None  # of its data, where it is noted
    resolved: dict[str, Any]
    changed_at: list[int]  # steps at which its settings in force changed
    columns: dict[str, np.ndarray]
    damaged: int  # lines that are no row

    @property
    def unit(self) -> str:
        """Token or byte."""
        return tokenizer.TOKENIZERS[self.tokenizer].unit

    @property
    def has_time(self) -> bool:
        """Whether its rows say how long a step took."""
        return bool(np.isfinite(self.columns["hours"]).any())

    def points(self, name: str, x: str = "tokens") -> Points:
        """The values of a column over an axis of AXES, without rows that lack either."""
        at, values = self.columns[x], self.columns[name]
        kept = (np.abs(at) < LARGEST) & (np.abs(values) < LARGEST)  # False for NaN
        return Points(at[kept], values[kept])

    def at(self, name: str, where: float, x: str = "tokens") -> float | None:
        """A value between two rows, on the straight line; None outside of them."""
        points = self.points(name, x)
        if not len(points.x) or not points.x[0] <= where <= points.x[-1]:
            return None
        return float(np.interp(where, *points))

    def last(self, name: str) -> float | None:
        """The newest value of a column."""
        values = self.points(name).y
        return float(values[-1]) if len(values) else None

    def median(self, name: str) -> float | None:
        """The median of a column."""
        values = self.points(name).y
        return float(np.median(values)) if len(values) else None

    def steps(self) -> int:
        """Steps made, as its rows tell."""
        return int(self.columns["steps"][-1]) if len(self.columns["steps"]) else 0

    def seconds(self) -> dict[str, float]:
        """Where its time went: seconds of each part that its rows hold; {} without times."""
        updates, found = _updates(self.columns), {}
        for name in (*TIMES, *PAUSES):
            spent = self.columns[name] * (updates if name in TIMES else 1)
            if (total := float(np.nansum(spent)) / 1e3) > 0:
                found[PARTS[name]] = total
        return found

    def settings(self) -> dict[str, Any]:
        """Every field of its config that could explain a difference, and what was resolved."""
        found = {name: value for name, value in settings.flat(self.config).items() if name not in OWN}
        found["context"] = self.config.sequence_length  # None is the model's n_positions
        known = {"tokenizer": self.tokenizer, "data_digest": self.digest}
        known |= {name: self.resolved.get(name) for name in ("precision", "micro_batch_size", "device")}
        return found | {name: value for name, value in known.items() if value is not None}

    def computed(self) -> dict[str, Any]:
        """What it computed with, but for the seed: equal in runs that differ in the seed alone."""
        noted = {**self.resolved, "tokenizer": self.tokenizer, "data_digest": self.digest}
        found = settings.in_force(self.config, noted) | {"num_steps": self.config.num_steps}
        return {name: value for name, value in found.items() if name != "seed"}


def read_all(runs: tuple[str, ...], command: str) -> list[Record]:
    """The records of run directories, each with a label of its own.

    Raises BadInput if one is no run or cannot be read, or if two are the same.
    """
    if not runs:
        raise BadInput(f"{command}: a run must be given, got none; name directories made by gpt2 train")
    paths = [Path(run).resolve() for run in runs]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise BadInput(f"{command}: runs must differ, got {runs[number]} twice; name each once")
    names = [path.name for path in paths]
    labels = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    return [read(run, label, command) for run, label in zip(runs, labels, strict=True)]


def check_tokenizers(records: list[Record], command: str) -> None:
    """Raises BadInput unless the runs have one tokenizer, and with it one unit."""
    for record in records:
        if record.tokenizer != records[0].tokenizer:
            raise BadInput(
                f"{command}: runs must have one tokenizer, got {records[0].tokenizer} in {records[0].run} and "
                f"{record.tokenizer} in {record.run}; nats per {records[0].unit} and per {record.unit} do not compare"
            )


def read(run: str, label: str, command: str) -> Record:
    """The record of one run directory. Raises BadInput if that is no run, or cannot be read."""
    train, name = configs.load(run), directory.tokenizer_name(run)
    tokenizer.load(name)
    path, damaged = Path(run) / rows.METRICS_FILE, 0
    columns = {name: array("d") for name in ("steps", "tokens", *NAMES)}
    try:
        for _, row in rows.read(path) if os.path.lexists(path) else ():
            damaged += row is None
            for name_, column in columns.items() if row is not None else ():
                value = rows.number(row.get("step" if name_ == "steps" else name_))
                column.append(np.nan if value is None else value)
    except OSError as error:
        raise BadInput(f"{command}: {path} must be a file of rows that can be read, got: {error.strerror}") from error
    found = {name: np.asarray(column) for name, column in columns.items()}
    found["hours"] = _hours(found)
    noted = _history(run)
    resolved = {**(noted[-1] if noted else {}), **directory.resolved(run)}
    changed = [entry["step"] for entry in noted[1:] if isinstance(entry.get("step"), int)]
    return Record(run, label, train, name, resolved.get("data_digest"), resolved, changed, found, damaged)


def _history(run: str) -> list[dict]:
    """What config.json notes of each config that the run had, the last one in force; [] if nothing."""
    try:
        found = read_json(Path(run) / CONFIG_FILE).get("history")
    except (OSError, ValueError):
        return []
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    kinds = {"step": int, **settings.NOTED_FIELDS}
    return [{name: entry[name] for name in kinds if isinstance(entry.get(name), str | int)} for entry in entries]


def _updates(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Updates that each row's mean times are of: those since the row before that has any, its own with them."""
    counts, is_timed = np.zeros(len(columns["steps"])), columns["step_ms"] > 0
    counts[is_timed] = np.diff(columns["steps"][is_timed], prepend=-1)
    return counts


def _hours(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Training time of the updates before each row; NaN where no row has a time."""
    is_timed = columns["step_ms"] > 0
    if not is_timed.any():
        return np.full(len(columns["steps"]), np.nan)
    step_ms, done = columns["step_ms"][is_timed], columns["steps"][is_timed] + 1
    usual = float(np.median(step_ms))
    spent = np.cumsum(np.where(step_ms > STALL * usual, usual, step_ms) * _updates(columns)[is_timed])
    beyond = np.maximum(columns["steps"] - done[-1], 0) * usual
    return (np.interp(columns["steps"], np.append(0, done), np.append(0, spent)) + beyond) / 3.6e6
