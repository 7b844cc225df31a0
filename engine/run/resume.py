"""Resuming: finds a checkpoint, refuses one of another run, fills model and optimizer from it."""

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from engine import config, distributed
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.optim import allocate_state
from engine.run import checkpoint as checkpoints
from engine.run import directory
from engine.run.checkpoint import Checkpoint
from model.gpt2 import GPT2

# These must be the same before and after resuming: the weights or the data order depend on each.
FIXED = ("model", "sequence_length", "tokens_per_step", "seed", "optimizer", "tokenizer", "data_digest")
SAFE = ("sequence_length", "tokens_per_step", "seed", "data_digest")  # may change with --resume-changed
SAFE_OF_MODEL = ("dropout", "init")  # fields of the model that may change with it too
PACKAGES = [Path(__file__).resolve().parents[2] / name for name in ("kernels", "model", "engine")]


def identity(train: TrainConfig, tokenizer_name: str, data_digest: str) -> dict:
    """The facts in FIXED, as JSON types."""
    fields = config.to_dict(train)
    return {
        "model": fields["model"],
        "sequence_length": train.sequence_length,
        "tokens_per_step": train.tokens_per_step,
        "seed": train.seed,
        "optimizer": train.optim.name,
        "tokenizer": tokenizer_name,
        "data_digest": data_digest,
    }


def facts(train: TrainConfig, run_identity: dict) -> dict:
    """Facts that must be the same on every rank: flags, code, data and versions."""
    fields = config.to_dict(train)
    nested = {f"{part}.{name}": value for part in ("model", "optim") for name, value in fields.pop(part).items()}
    code = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in package.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in (fields | nested).items()},
        "data": run_identity["data_digest"],
        "tokenizer": run_identity["tokenizer"],
        "code": code.hexdigest()[:12],
        "torch": torch.__version__,
    }


def resolved_before(train: TrainConfig) -> dict | None:
    """What the run to go on from resolved "auto" to, {} if that is not known; None if the run is new.

    Such a run keeps it, although a tuning or a choice by timing or memory may be another by now.
    """
    run = Path(train.out) if train.resume == "auto" else Path(train.resume).parent.parent
    return None if is_new(train) else directory.resolved(run)


def is_new(train: TrainConfig) -> bool:
    """Whether there is no checkpoint to go on from."""
    run = Path(train.out) if train.resume == "auto" else Path(train.resume).parent.parent
    return train.resume == "never" or not any(run.glob("checkpoints/step_*"))


def find_checkpoint(train: TrainConfig, run_identity: dict, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start at step 0.

    Raises BadInput if it belongs to another run.
    """
    if train.resume == "never":
        return None
    checkpoints.recover(Path(train.out) / "checkpoints")
    checkpoint = checkpoints.newest(train.out, warn) if train.resume == "auto" else checkpoints.read(train.resume)
    if checkpoint is None:
        return None
    if not checkpoint.has_optimizer:
        raise BadInput(
            f"train: {checkpoint.path} must hold the optimizer's state to go on training, got weights alone; train "
            f"from them with --init-from {train.out} and another --out"
        )
    _check_identity(checkpoint, run_identity, train.resume_changed, warn)
    if checkpoint.step > train.num_steps:
        raise BadInput(
            f"train: --num-steps must be at least the {checkpoint.step} steps of {checkpoint.path}, got "
            f"{train.num_steps}"
        )
    return checkpoint


def _check_identity(checkpoint: Checkpoint, run_identity: dict, may_change: bool, warn: Callable[[str], None]) -> None:
    """Raises BadInput listing what differs from the run that made the checkpoint.

    Warns instead if may_change is set and all differences are safe.
    """
    past = checkpoint.state["identity"]
    changed = {name: _difference(past[name], run_identity[name]) for name in FIXED if past[name] != run_identity[name]}
    if not changed:
        return
    listed = "\n  ".join(f"{name}: {difference}" for name, difference in changed.items())
    model_is_same = all(past["model"].get(k) == v for k, v in run_identity["model"].items() if k not in SAFE_OF_MODEL)
    is_safe = model_is_same and set(changed) <= {*SAFE, "model"}
    if may_change and is_safe:
        warn(f"going on from {checkpoint.path} although these changed\n  {listed}")
        return
    way_out = "choose another --out, or set that run aside with --resume never"
    if is_safe:
        way_out += "; to go on with its weights all the same, add --resume-changed"
    raise BadInput(
        f"train: to go on from {checkpoint.path} the run must be the one that made it, but these changed\n  {listed}\n"
        f"  {way_out}"
    )


def _difference(old, new) -> str:
    if isinstance(old, dict):
        return ", ".join(f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key])
    return f"{old} -> {new}"


def restore(checkpoint: Checkpoint, raw_model: GPT2, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Fills model and optimizer on every rank.

    If they are not sharded, only rank 0 reads the files, which other hosts may not have. Raises
    BadInput on every rank if the checkpoint is another model's.
    """
    is_sharded = distributed.is_sharded(raw_model)
    with ranks.fail_together():
        if is_sharded and not checkpoint.path.is_dir():
            raise BadInput(
                f"train: --out must be on a file system that all hosts share with --parallel fsdp or hsdp, got "
                f"{checkpoint.path}, which is missing on this one; share it, or use --parallel ddp"
            )
    with ranks.fail_together():
        if is_sharded or ranks.is_first:
            checkpoints.load_weights(checkpoint, raw_model)
            checkpoints.load_optimizer(checkpoint, raw_model, optimizer)
    if not is_sharded:
        allocate_state(optimizer)
        ranks.broadcast(list(checkpoints.named_tensors(raw_model, optimizer).values()))


def check_shared_out(out: str | Path, parallel: str, ranks: Ranks) -> None:
    """Raises BadInput on every rank unless all hosts see rank 0's --out.

    No-op for ddp, which needs no shared directory.
    """
    if parallel == "ddp" or ranks.world_size == 1:
        return
    probe = Path(out) / ranks.broadcast_object(f".probe_{uuid.uuid4().hex}")
    if ranks.is_first:
        probe.touch()
    ranks.barrier()
    try:
        with ranks.fail_together():
            if not probe.exists():
                raise BadInput(
                    f"train: --out must be on a file system that all hosts share with --parallel {parallel}, "
                    f"got {out}, where rank 0's files are missing on this host; share it, or use --parallel ddp"
                )
    finally:
        if ranks.is_first:
            probe.unlink(missing_ok=True)
