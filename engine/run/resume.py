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
from engine.run import branch, directory, settings
from engine.run import checkpoint as checkpoints
from engine.run.checkpoint import Checkpoint
from engine.step import Guard
from model.files import BadFile, check_fields
from model.gpt2 import GPT2

PACKAGES = [Path(__file__).resolve().parents[2] / name for name in ("kernels", "model", "engine")]


def identity(
    train: TrainConfig,
    tokenizer_name: str,
    data_digest: str,
    precision: str | None = None,
    micro_batch_size: int | None = None,
) -> dict:
    """What a checkpoint notes of the run that made it, besides its config, as JSON types.

    precision: "auto" resolved, and micro_batch_size too; None if the run does not train.
    """
    fields = config.to_dict(train)
    return {
        "model": fields["model"],
        "sequence_length": train.sequence_length,
        "tokens_per_step": train.tokens_per_step,
        "seed": train.seed,
        "optimizer": train.optim.name,
        "tokenizer": tokenizer_name,
        "data_digest": data_digest,
        "precision": precision,
        "micro_batch_size": micro_batch_size,
    }


def facts(train: TrainConfig, run_identity: dict) -> dict:
    """Facts that must be the same on every rank: flags, code, data and versions."""
    fields = config.to_dict(train)
    nested = {f"{part}.{name}": value for part in ("model", "optim") for name, value in fields.pop(part).items()}
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in (fields | nested).items()},
        "data": run_identity["data_digest"],
        "tokenizer": run_identity["tokenizer"],
    } | versions()


def versions() -> dict[str, str]:
    """Facts of code and PyTorch."""
    code = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in package.rglob("*.py")):
        code.update(path.read_bytes())
    return {"code": code.hexdigest()[:12], "torch": torch.__version__}


def resolved_before(train: TrainConfig) -> dict | None:
    """What the run to go on from resolved "auto" to, {} if that is not known; None if the run is new.

    Such a run keeps it, although a tuning or a choice by timing or memory may be another by now.
    """
    if is_new(train):
        return None
    run = branch.source(train.out, train.resume)
    try:
        return directory.resolved(run)
    except OSError:  # find_checkpoint refuses them
        return None


def is_new(train: TrainConfig) -> bool:
    """Whether there is no checkpoint to go on from."""
    if train.resume == "never":
        return True
    try:
        folder = branch.source(train.out, train.resume) / "checkpoints"
        return not any(any(folder.glob(name)) for name in ("**/step_*", ".replaced_*"))
    except OSError:  # find_checkpoint refuses them
        return False


def find_checkpoint(train: TrainConfig, run_identity: dict, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start at step 0.

    If --resume names one, what --out saved after it is set aside. Raises BadInput, and has moved
    nothing, if the checkpoint belongs to another run.
    """
    if train.resume == "never":
        return None
    checkpoint, goes_back = branch.find(train.out, train.resume, warn)
    if checkpoint is None:
        return None
    checkpoint.require("tokens")
    if not checkpoint.has_optimizer:
        raise BadInput(
            f"train: {checkpoint.path} must hold the optimizer's state to go on training, got weights alone; train "
            f"from them with --init-from {train.out} and another --out"
        )
    if checkpoint.step > train.num_steps:
        raise BadInput(
            f"train: --num-steps must be at least the {checkpoint.step} steps of {checkpoint.path}, got "
            f"{train.num_steps}"
        )
    _check_unchanged(checkpoint, train, run_identity, warn)
    if goes_back:
        branch.go_back(train.out, checkpoint, warn)
    return checkpoint


def _check_unchanged(
    checkpoint: Checkpoint, train: TrainConfig, run_identity: dict, warn: Callable[[str], None]
) -> None:
    """Raises BadInput listing the settings that are not those of the run that made the checkpoint.

    Warns instead if --resume-changed is set and all of them may change.
    """
    past, resolved = settings.of_checkpoint(checkpoint)
    is_finished = checkpoint.step == train.num_steps and checkpoint.state.get("val_loss") is not None
    changed = settings.changes(settings.in_force(past, resolved), settings.in_force(train, run_identity))
    may_change = not changed.keys() & set(settings.NEVER)
    listed = "\n  ".join(changed.values())
    if changed and not (train.resume_changed and may_change):
        way_out = "choose another --out, or set that run aside with --resume never"
        if may_change:
            aim = "see its report" if is_finished else "go on with its weights"
            way_out += f"; to {aim} all the same, add --resume-changed"
        who = f"to go on from {checkpoint.path} the run must be the one that made it"
        if is_finished:
            who = f"the run of {checkpoint.path} is finished, and its numbers belong to its old settings"
        raise BadInput(f"train: {who}, but these changed\n  {listed}\n  {way_out}")
    if changed and is_finished:
        warn(f"the numbers of this finished run belong to its old settings, of which these changed\n  {listed}")
    elif changed:
        warn(f"going on from {checkpoint.path} although these changed\n  {listed}")
    if past.num_steps != train.num_steps:
        whose = past.num_steps if is_finished else train.num_steps
        warn(f"num_steps {past.num_steps} -> {train.num_steps}: the learning rate's schedule is that of {whose} steps")


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


def restore_counts(checkpoint: Checkpoint, scaler: torch.amp.GradScaler, guard: Guard) -> None:
    """Fills the loss scale and the guard. Raises BadInput if the checkpoint's are not such states."""
    scaled, guarded = checkpoint.state.get("scaler"), checkpoint.state.get("guard", guard.state_dict())
    try:
        if scaler.is_enabled() and scaled:  # the checkpoint may be of a run in another precision
            check_fields(scaled, dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float))
            scaler.load_state_dict(check_fields(scaled, dict.fromkeys(("growth_interval", "_growth_tracker"), int)))
        if len(guarded) != len(guard.state_dict()):
            raise BadFile(f"{len(guarded)} numbers of the guard")
        guard.load_state_dict([float(number) for number in guarded])
    except (ValueError, TypeError, OverflowError) as error:
        raise BadInput(
            f"checkpoint: {checkpoint.path} must hold the loss scale and the guard of a run, got {error}; use an "
            "older one"
        ) from error


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
