"""Checkpoints: complete or absent, never in between, and loading one runs no code from it.

    OUT/checkpoints/step_00001200/
        model.safetensors       the raw model's parameters, under the released names
        optimizer.safetensors   per parameter: running mean, running square, number of updates
        state.json              step, tokens, config, data digest, loss scale, world size
        manifest.json           bytes and sha256 of the other three

A checkpoint is written under a temporary name, each file fsynced, the manifest last, then renamed and the parent
fsynced; it exists when its manifest verifies. The digests are our own because PyTorch and safetensors load flipped
bits without a word. Only after a good save are older ones deleted. No random state is needed: the order of the data
and the dropout masks are functions of (seed, step).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from engine.errors import BadInput

MANIFEST = "manifest.json"
VERSION = 1  # of the layout
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum")  # of AdamW the first three, of Muon the last


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digests have been verified."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state["step"]


# ---- Write --------------------------------------------------------------------------------------------------------


def save(
    out: str | Path, state: dict, model: nn.Module, optimizer: torch.optim.Optimizer | None, keep_last: int
) -> Path:
    """Writes the checkpoint of state["step"], then deletes all older ones but keep_last - 1; returns its path.

    model is the raw one. Call it on one rank. Raises OSError if the disk refuses; the older checkpoints stay.
    """
    root = Path(out) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = root / f"step_{state['step']:08d}"
    writing = root / f".writing_{final.name}_{os.getpid()}"
    writing.mkdir()
    try:
        _save_tensors(writing / MODEL, {name: p.detach() for name, p in model.named_parameters()})
        files = [MODEL, STATE]
        if optimizer is not None:
            _save_tensors(writing / OPTIMIZER, _optimizer_tensors(model, optimizer))
            files.append(OPTIMIZER)
        (writing / STATE).write_text(json.dumps(state, indent=1) + "\n")
        manifest = {
            name: {"bytes": (writing / name).stat().st_size, "sha256": _sha256(writing / name)} for name in files
        }
        for name in files:
            _fsync(writing / name)
        (writing / MANIFEST).write_text(json.dumps({"version": VERSION, "files": manifest}, indent=1) + "\n")
        _fsync(writing / MANIFEST)
        _fsync(writing)
        if final.exists():  # of a run that was resumed from before it, or one that no longer verifies
            shutil.rmtree(final)
        writing.rename(final)
        _fsync(root)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    for old in [path for path in _directories(root) if path <= final][:-keep_last]:  # later ones may be damaged
        shutil.rmtree(old, ignore_errors=True)
    return final


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path}: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors leaves 0600, which a colleague cannot read


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[p][moment]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for moment in MOMENTS
        if moment in optimizer.state[p]
    }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _directories(root: Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    return sorted(path for path in root.glob("step_*") if path.is_dir())


# ---- Find ---------------------------------------------------------------------------------------------------------


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None if every digest verifies."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            return f"{MANIFEST} must have version {VERSION}, got {manifest['version']!r}"
        files = manifest["files"]
        for name, expected in files.items():
            found = (path / name).stat().st_size
            if found != expected["bytes"]:
                return f"{name} must have {expected['bytes']} bytes, got {found}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} does not match its sha256"
        if missing := {MODEL, STATE} - set(files):
            return f"{MANIFEST} must list {' and '.join(sorted(missing))}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def read(path: str | Path) -> Checkpoint:
    """The checkpoint at a path. Raises BadInput if it is not whole."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"checkpoint: must be a directory such as OUT/checkpoints/step_00000100, got {path}")
    if (reason := damage(path)) is not None:
        raise BadInput(f"checkpoint: {path} must be whole, but {reason}; use an older one")
    return Checkpoint(path, json.loads((path / STATE).read_text()))


def newest(out: str | Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None if it has none at all; `warn` is told of each that is passed over.

    Raises BadInput, with each one's reason, if there are checkpoints and none is whole.
    """
    found = _directories(Path(out) / "checkpoints")
    reasons = []
    for path in reversed(found):
        if (reason := damage(path)) is None:
            for line in reasons:
                warn(f"passing over {line}")
            return read(path)
        reasons.append(f"{path}: {reason}")
    if reasons:
        raise BadInput(
            "checkpoint: one must be whole to go on, but\n  " + "\n  ".join(reasons) + "\n"
            "  to set this run aside and start afresh, add --resume never"
        )
    return None


# ---- Load ---------------------------------------------------------------------------------------------------------


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copies the checkpoint's parameters into the raw model. Raises BadInput if names or shapes differ."""
    saved = load_file(checkpoint.path / MODEL)
    expected = dict(model.named_parameters())
    wrong = sorted(set(saved) ^ set(expected)) or [n for n in saved if saved[n].shape != expected[n].shape]
    if wrong:
        raise BadInput(f"checkpoint: {checkpoint.path} must hold this model's parameters, but {wrong[0]} differs")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(saved[name])


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer the state it had. Raises BadInput if the checkpoint has none, as imported weights do."""
    path = checkpoint.path / OPTIMIZER
    if not path.exists():
        raise BadInput(
            f"checkpoint: {checkpoint.path} must hold the optimizer's state to go on training, got weights alone; "
            "train from them with --init-from and another --out"
        )
    saved = load_file(path)
    for name, parameter in model.named_parameters():
        moments = {moment: saved[f"{name}.{moment}"] for moment in MOMENTS if f"{name}.{moment}" in saved}
        if moments:
            optimizer.state[parameter] = {m: tensor.to(parameter.device) for m, tensor in moments.items()}
