"""Checkpoints on the disk. Each is complete or absent, and loading one runs no code from it.

    OUT/checkpoints/step_00001200/
        model.safetensors       the raw model's parameters, under the released names
        optimizer.safetensors   per parameter: running mean, running square, number of updates
        sharded/                in place of those two where the model is sharded: each process's part of both
        state.json              step, tokens, config, data digest, validation loss, loss scale, world size
        manifest.json           bytes and sha256 of all others

A checkpoint is written under a temporary name. Each file is fsynced, the manifest last. Then the
directory is renamed and its parent fsynced. A checkpoint counts as complete if its manifest
verifies. The digests are our own because PyTorch and safetensors load flipped bits without an
error. Older checkpoints are deleted only after a successful save, and the one with the lowest
validation loss is always kept. No random state is saved: the order of the data is a function of
(seed, step), and dropout masks and samples of the head of (seed, step, place in the global batch).
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from engine import durable
from engine.distributed import local
from engine.errors import BadInput, Diverged
from engine.optim import allocate_state
from engine.run.tensors import check_sizes, fill
from engine.run.verify import (
    LATEST,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    SHARDED,
    STATE,
    VERSION,
    checkpoint_damage,
    raise_limit,
    read_state,
)
from engine.tokens.shards import sha256
from model.files import make, read_json
from model.presets import GPT2Config
from model.pretrained import not_finite

MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum", "row_square")  # of AdamW the first three, of Muon the others


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digests have been verified."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state["step"]

    @property
    def has_optimizer(self) -> bool:
        """Whether it holds the optimizer's state, without which training cannot resume.

        Imported weights have none.
        """
        return (self.path / SHARDED).is_dir() or (self.path / OPTIMIZER).exists()

    def require(self, *fields: str) -> None:
        """Raises BadInput unless the state has these fields, whose types are known."""
        if missing := [field for field in fields if self.state.get(field) is None]:
            raise BadInput(
                f"checkpoint: {self.path} must hold the state of a run, got none with {', '.join(missing)}; use an "
                "older one"
            )

    def model_config(self) -> GPT2Config:
        """Sizes of the model that it holds. Raises BadInput if they are not those of its tensors."""
        self.require("identity")
        config = make(GPT2Config, self.state["identity"]["model"])
        check_sizes(self.path, config)
        return config


# ---- Write --------------------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Tensors to save, by name: `model.<name>` and `optimizer.<name>.<moment>`.

    model: the raw one. Returns the live tensors, not copies; they are sharded if the model is.
    """
    named = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if optimizer is not None and optimizer.state:
        for name, p in model.named_parameters():
            if p not in optimizer.state:  # a sharded model with gathered weights lists the gathered ones
                raise RuntimeError(f"checkpoint: every parameter must be the optimizer's, got another {name}")
            state = optimizer.state[p]
            named |= {f"optimizer.{name}.{moment}": state[moment] for moment in MOMENTS if moment in state}
    return named


def save(
    out: str | Path, state: dict, model: nn.Module, optimizer: torch.optim.Optimizer | None, keep_last: int
) -> Path:
    """Writes a checkpoint of a model that is not sharded, in this thread. See `write`."""
    return write(out, state, named_tensors(model, optimizer), keep_last, print)


def write(
    out: str | Path,
    state: dict,
    tensors: dict[str, Tensor],
    keep_last: int,
    warn: Callable[[str], None],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes the checkpoint of state["step"], then deletes older ones; returns its path.

    tensors: as returned by `named_tensors`; they must not change during the call. keep_last: the
    number of newest checkpoints to keep; the one with the lowest state["val_loss"] is kept too.
    group: if given, all its processes call this, each with its own shards, and all must see `out`.
    If None, one process calls it. Raises OSError if the disk refuses, and Diverged if a weight is
    not finite. In both cases the older checkpoints stay.
    """
    root = Path(out) / "checkpoints"
    final = root / f"step_{state['step']:08d}"
    writing = root / f".writing_{final.name}"
    is_first = group is None or dist.get_rank(group) == 0
    try:
        with _fail_together(group):
            _check_finite(tensors)
            if is_first:
                _start_writing(root, writing)
        with _fail_together(group):
            files = _write_sharded(writing, tensors, group) if group is not None else _write_whole(writing, tensors)
        with _fail_together(group):
            if is_first:
                _commit(writing, final, files, state)
    finally:
        if is_first:
            shutil.rmtree(writing, ignore_errors=True)
            recover(root)
    if is_first:
        _rotate(root, final, keep_last, warn)
    return final


@contextlib.contextmanager
def _fail_together(group: dist.ProcessGroup | None):
    """If any process of the group raises OSError or Diverged inside, all processes raise it.

    If several raise, the error of the lowest rank is taken. Without this the others would wait for
    a file that is never written.
    """
    error = None
    try:
        yield
    except (OSError, Diverged) as raised:
        error = raised
    errors = [error]
    if group is not None:
        errors *= dist.get_world_size(group)
        dist.all_gather_object(errors, error, group)
    if (first := next((e for e in errors if e is not None), None)) is not None:
        raise first


def _check_finite(tensors: dict[str, Tensor]) -> None:
    if odd := not_finite({name: local(tensor) for name, tensor in tensors.items()}):
        raise Diverged(f"checkpoint: every number must be finite, got others: {odd}; nothing was saved")


def _start_writing(root: Path, writing: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    recover(root)
    for leftover in root.glob(".writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    writing.mkdir()


def _write_whole(writing: Path, tensors: dict[str, Tensor]) -> dict[str, dict]:
    """Writes weights and optimizer as one file each.

    Returns their manifest entries by file name.
    """
    files = {}
    for name in (MODEL, OPTIMIZER):
        prefix = name.removesuffix("safetensors")  # "model." or "optimizer.", as in the names of `tensors`
        chosen = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if chosen:
            _save_tensors(writing / name, chosen)
            files[name] = _flushed(writing / name)
    return files


def _write_sharded(writing: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, dict]:
    """Writes, fsyncs and digests this process's shards.

    Returns the manifest entries of all processes.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # safetensors: no pickle in it

    directory = writing / SHARDED
    try:
        storage = HuggingFaceStorageWriter(path=str(directory), save_distributed=True)
        dcp.save(tensors, storage_writer=storage, process_group=group)
    except dcp.api.CheckpointException as error:  # raised on every process, with the error of the one that failed
        raise OSError(str(next(iter(error.failures.values()))[0])) from error
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = {f"{SHARDED}/{path.name}": _flushed(path) for path in sorted(directory.iterdir())[rank::world_size]}
    entries: list[dict] = [{}] * world_size
    dist.all_gather_object(entries, mine, group)
    if rank == 0:
        durable.fsync(directory)
    return {name: entry for theirs in entries for name, entry in theirs.items()}


def _commit(writing: Path, final: Path, files: dict[str, dict], state: dict) -> None:
    """Writes state and manifest, then renames the directory: from then on the checkpoint exists.

    Then OUT/latest names it, so that a run whose checkpoints vanish is not taken for a new one.
    """
    (writing / STATE).write_text(json.dumps(state, indent=1) + "\n")
    files = files | {STATE: _flushed(writing / STATE)}
    (writing / MANIFEST).write_text(json.dumps({"version": VERSION, "files": files}, indent=1) + "\n")
    durable.fsync(writing / MANIFEST)
    durable.fsync(writing)
    replaced = final.with_name(f".replaced_{final.name}")
    if final.exists():  # the run was resumed from an earlier step, or this one no longer verifies
        final.rename(replaced)
    writing.rename(final)
    durable.fsync(final.parent)
    durable.write(final.parent.parent / LATEST, final.name + "\n")


def recover(root: Path) -> None:
    """Finishes an interrupted replacement of a checkpoint.

    If the new checkpoint is in place, the old one is deleted; otherwise the old one gets its name
    back.
    """
    for replaced in root.glob(".replaced_*"):
        final = root / replaced.name.removeprefix(".replaced_")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)


def _rotate(root: Path, final: Path, keep_last: int, warn: Callable[[str], None]) -> None:
    """Deletes checkpoints up to `final`, except the newest keep_last and the best.

    Checkpoints of later steps stay: the run may have been resumed from an earlier step.
    """
    try:
        spared = best(root.parent)
    except OSError as error:
        warn(f"checkpoint: the best one must be known before others are deleted, got {error}; none is this time")
        return
    for old in [path for path in step_directories(root) if path <= final][:-keep_last]:
        if old != spared:
            try:
                shutil.rmtree(old)
            except OSError as error:
                warn(f"checkpoint: {old} is no longer needed but could not be deleted: {error}")


def best(out: str | Path) -> Path | None:
    """Path of the checkpoint with the lowest validation loss, or None if no checkpoint has one.

    Raises OSError if a limit of this process keeps one from being read.
    """
    losses = []
    for path in step_directories(Path(out) / "checkpoints"):
        try:
            loss = read_json(path / STATE).get("val_loss")
        except (OSError, ValueError) as error:  # a damaged state.json may hold anything
            raise_limit(error)
            continue
        if isinstance(loss, float) and math.isfinite(loss):  # min() may return NaN: comparisons with it are false
            losses.append((loss, path))
    return min(losses)[1] if losses else None


def _save_tensors(path: Path, chosen: dict[str, Tensor]) -> None:
    try:
        save_file({name: local(tensor).contiguous().cpu() for name, tensor in chosen.items()}, path)
    except SafetensorError as error:  # safetensors raises this for a full disk
        raise OSError(f"{path}: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors sets 0600, which other users cannot read


def _flushed(path: Path) -> dict:
    """Fsyncs a file and returns its manifest entry."""
    durable.fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def step_directories(root: Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    return sorted(path for path in root.glob("step_*") if path.is_dir())


# ---- Find ---------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Checkpoint:
    """The checkpoint at a path. Raises BadInput if it is not whole."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"checkpoint: must be a directory such as OUT/checkpoints/step_00000100, got {path}")
    if (reason := checkpoint_damage(path)) is not None:
        raise BadInput(f"checkpoint: {path} must be whole, but {reason}; use an older one")
    try:
        return Checkpoint(path, read_state(path))
    except (OSError, ValueError) as error:  # it has changed since
        raise BadInput(f"checkpoint: {path} must be whole, but {STATE}: {error}; use an older one") from error


def newest(out: str | Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None if it has no checkpoints.

    Calls `warn` with a line for each newer one that is damaged. Raises BadInput, with the reason
    for each, if there are checkpoints and none is whole.
    """
    reasons = []
    for path in reversed(step_directories(Path(out) / "checkpoints")):
        if (reason := checkpoint_damage(path)) is None:
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
    """Copies the checkpoint's parameters into the raw model.

    Raises BadInput if names or shapes differ.
    Checkpoint and model may each be sharded or not. If the model is sharded, all its processes call
    this.
    """
    _fill(checkpoint, {f"model.{name}": p.detach() for name, p in model.named_parameters()}, "model.", "parameters")


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fills the optimizer's state.

    Raises BadInput if the checkpoint has none, as with imported weights.
    """
    if not checkpoint.has_optimizer:
        raise BadInput(
            f"checkpoint: {checkpoint.path} must hold the optimizer's state to go on training, got weights alone; "
            "train from them with --init-from and another --out"
        )
    allocate_state(optimizer)
    targets = {name: t for name, t in named_tensors(model, optimizer).items() if name.startswith("optimizer.")}
    _fill(checkpoint, targets, "optimizer.", "optimizer's state")


def _fill(checkpoint: Checkpoint, targets: dict[str, Tensor], prefix: str, what: str) -> None:
    """Copies the saved tensors whose names begin with prefix into targets, by name.

    Raises BadInput if names, shapes or dtypes differ, or if a number is not finite.
    """
    fill(checkpoint.path, targets, prefix, what)
    if odd := not_finite({name.removeprefix(prefix): local(target) for name, target in targets.items()}):
        raise BadInput(
            f"checkpoint: {checkpoint.path} must hold finite {what}, got NaN or infinity: {odd}; use an older one"
        )
