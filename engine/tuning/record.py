"""What `gpt2 tune` found, as one JSON file per GPU and model shape, and how `gpt2 train` reads it.

The file is replaced atomically. It is ignored, with a sentence, if it is damaged or was made with
another GPU, driver, PyTorch, Triton or version of this code: then nothing in it need hold.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from engine import output, system
from engine.checks import facts
from engine.config import TrainConfig
from engine.errors import BadInput
from model.files import BadFile, make, read_json
from model.presets import GPT2Config

LARGEST = 2**14  # bytes of a tuning's file, a few times those of one in use
CODE = ("kernels/*.py", "model/gpt2.py", "engine/step.py", "engine/tuning/*.py")  # what a tuning's figures depend on


@dataclass(frozen=True)
class Setup:
    """How a training step runs: all that is tuned."""

    precision: Literal["bf16", "fp16", "tf32", "fp32"]
    micro_batch_size: int
    recompute: Literal["none", "attention", "block"] = "none"  # activations recomputed in the backward
    compile: bool = False
    ops: dict[str, str] = field(default_factory=dict)  # op -> implementation; an op that is missing: the shipped one
    tiles: dict[str, dict[str, int]] = field(default_factory=dict)  # "kernel/kind size" -> launch keywords
    threads: int | None = None  # of a CPU; None: PyTorch's choice
    malloc_tuned: bool = True  # on a CPU: see engine.device.tune_malloc

    def words(self) -> list[str]:
        """Each part of the setup as a word or two; not what is as PyTorch has it."""
        words = [f"B = {self.micro_batch_size}", self.precision, "compiled" if self.compile else "eager"]
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        words += [f"{self.threads} thread{'s' * (self.threads != 1)}"] if self.threads else []
        words += ["malloc untuned"] * (not self.malloc_tuned)
        words += [f"{op} {name}" for op, name in self.ops.items()]
        return words + [f"{len(self.tiles)} tile{'s' * (len(self.tiles) != 1)}"] * bool(self.tiles)

    def __str__(self) -> str:
        return ", ".join(self.words())


@dataclass(frozen=True)
class Tuning:
    """The fastest right setup of a model on a machine, and what it was measured against."""

    preset: str
    shape: dict  # of the model, and its context: see `shape_of`
    machine: dict  # device, versions and code: see `machine_of`
    date: str
    shipped: Setup
    setup: Setup
    shipped_tokens_per_s: float
    tokens_per_s: float

    @property
    def key(self) -> str:
        """Digest of the setup."""
        return facts.key(dataclasses.asdict(self.setup))

    def __str__(self) -> str:
        ratio = self.tokens_per_s / self.shipped_tokens_per_s
        return f"{self.preset} on {self.machine['device']}, {self.date}, {ratio:.2f}x: {self.setup}"


def shape_of(model: GPT2Config, context: int) -> dict:
    """What a tuning is for: sizes of the model, its dropout, and its context."""
    fields = dataclasses.asdict(model) | {"context": context}
    del fields["init"], fields["n_positions"]
    return fields


def machine_of(device: torch.device) -> dict[str, str]:
    """What a tuning holds on: the device, its driver, PyTorch, Triton and this code."""
    return facts.machine(device) | {"code": facts.code(*CODE)[:12]}


# ---- File ---------------------------------------------------------------------------------------------------------


def path_of(shape: dict, device: torch.device) -> Path:
    """Where the tuning of this shape on this device is kept, if no file is named."""
    name = re.sub(r"[^a-z0-9]+", "-", facts.device_name(device).lower()).strip("-")
    file = f"{name}_{shape['n_layer']}x{shape['n_embd']}_{facts.key(shape)[:8]}.json"
    return facts.cache_directory() / "tune" / file


def save(tuning: Tuning, path: Path) -> None:
    """Writes the file, replacing an old one at once. Raises BadInput if it cannot."""
    fields = dataclasses.asdict(tuning)
    with _written(path) as temporary:
        temporary.write_text(json.dumps(fields | {"digest": facts.key(fields)}, indent=1) + "\n")
        temporary.replace(path)


def check_writable(path: Path) -> None:
    """Raises BadInput, before minutes are spent, if `save` could not write there."""
    with _written(path) as temporary:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.write_bytes(bytes(LARGEST))


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which is gone afterwards. Raises BadInput in place of OSError."""
    temporary = path.with_name(f".tune.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise BadInput(
            f"tune: --out must be a file that can be written, got {path}: {system.reason(error)}; "
            f"{system.advice(error, 'another --out')}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load(path: Path) -> Tuning:
    """The tuning of a file. Raises ValueError if it is damaged."""
    try:
        fields = read_json(path, {"digest": str})
        digest = fields.pop("digest")
        if digest != facts.key(fields):
            raise BadFile("another digest than its content has")
        tuning = make(Tuning, fields)
        if min(tuning.setup.micro_batch_size, tuning.setup.threads or 1, tuning.shipped_tokens_per_s) <= 0:
            raise BadFile("a number that must be above 0")
    except OSError as error:
        raise BadFile(error.strerror or str(error)) from error
    return tuning


# ---- In a run -----------------------------------------------------------------------------------------------------


def find(config: TrainConfig, device: torch.device) -> tuple[Tuning | None, str]:
    """The tuning that a run heeds, or None, and a sentence about it that may be empty.

    Raises BadInput if --tuned names a file that is not there.
    """
    if config.tuned == "never":
        return None, ""
    shape = shape_of(config.model, config.sequence_length)
    path = path_of(shape, device) if config.tuned == "auto" else Path(config.tuned)
    is_there = os.path.isfile if config.tuned == "auto" else os.path.lexists  # not where this user may not look
    if not is_there(path):
        if config.tuned == "auto":
            return None, ""
        raise BadInput(
            f"train: --tuned must be auto, never or a file made by gpt2 tune, got {path}, which is not there"
        )
    try:
        tuning = load(path)
    except ValueError as error:
        return None, f"tuned: ignored, {path} is damaged ({error}); make it again with {output.program()} tune"
    here = machine_of(device) | shape
    there = tuning.machine | tuning.shape
    changed = [f"{name} {there.get(name)} -> {value}" for name, value in here.items() if there.get(name) != value]
    if changed:
        return (
            None,
            f"tuned: ignored, {path} is of another machine or model ({', '.join(changed)}); run "
            f"{output.program()} tune again",
        )
    return tuning, f"tuned: {tuning}"


def applied(tuning: Tuning, config: TrainConfig, world_size: int) -> TrainConfig:
    """The config with the tuning's micro-batch, recompute and compile where its own are the defaults.

    Recomputing belongs to a micro-batch: it is taken together with it or not at all.
    """
    setup, changes = tuning.setup, {}
    can_compile = config.compile is None and config.head == "full"
    if can_compile and setup.compile != tuning.shipped.compile:
        changes["compile"] = setup.compile
    divides = config.tokens_per_step % (config.sequence_length * setup.micro_batch_size * world_size) == 0
    if config.micro_batch_size is None and divides:
        changes["micro_batch_size"] = setup.micro_batch_size
        if config.recompute == "none":
            changes["recompute"] = setup.recompute
    return dataclasses.replace(config, **changes)
