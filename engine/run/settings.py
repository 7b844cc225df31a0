"""Settings of a run: which may change when it goes on, what changed, and every config it ever had.

Each field of TrainConfig is in one list below, nested ones dotted. Not in FREE is what changes the
numbers by more than rounding, as another number of processes does.
"""

from pathlib import Path
from typing import Any

from engine import config as configs
from engine.config import CONFIG_FILE, TrainConfig, is_read
from engine.errors import BadInput
from engine.run import branch, directory
from engine.run.checkpoint import Checkpoint
from model.files import check_fields, check_present, read_json

# Never change: the weights and the optimizer's state have their shapes and meaning from these.
FIXED = (
    "model.n_layer",
    "model.n_head",
    "model.n_embd",
    "model.n_positions",
    "model.vocab_size",
    "optim.name",
    "optim.muon_rows",
)
# Change what is computed: only with --resume-changed.
COMPUTED = (
    "model.dropout",
    "model.init",
    "optim.lr",
    "optim.muon_lr",
    "optim.muon_momentum",
    "optim.schedule",
    "optim.decay_share",
    "optim.min_lr_ratio",
    "optim.warmup_tokens",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.weight_decay",
    "optim.clip",
    "tokens_per_step",
    "context",
    "document_mask",
    "document_positions",
    "precision",
    "head",
    "seed",
    "init_from",
    "skip_z_score",
    "eval_tokens",  # two validation losses compare only over the same tokens; the best checkpoint is chosen by them
)
# Change the learning rate of the steps to come. Lengthening a run is common: it is said, not refused.
SCHEDULE = ("num_steps",)
# Change nothing that is computed, or its rounding, or only what is printed.
FREE = (
    "data",  # its digest is compared
    "out",
    "micro_batch_size",  # with dropout or a sampled head the resolved one is compared: they draw per micro-batch
    "kernels",
    "compile",
    "cuda_graphs",
    "deterministic",
    "strict",
    "tuned",
    "parallel",
    "shard_size",
    "reshard",
    "recompute",
    "resume",
    "resume_changed",
    "eval_every",
    "hellaswag",
    "hellaswag_every",
    "hellaswag_limit",
    "lambada",
    "save_every",
    "save_every_minutes",
    "keep_last",
    "async_save",
    "max_minutes",
    "grace_seconds",
    "timeout_minutes",
    "max_skipped",
    "check_replicas_every",
    "log_every",
    "tensorboard",
    "wandb",
    "profile",
    "prompt",
    "sample_tokens",
)
# What is resolved from fields: --data to its tokenizer and digest, "auto" or None to a precision and a size.
RESOLVED = ("tokenizer", "data_digest", "precision", "micro_batch_size")
NOTED_FIELDS = {name: str | None for name in RESOLVED} | {"micro_batch_size": int | None}
NEVER = (*FIXED, "tokenizer")  # not with --resume-changed either


def flat(train: TrainConfig) -> dict[str, Any]:
    """Every field by its dotted name."""
    fields = configs.to_dict(train)
    nested = {f"{part}.{name}": value for part in ("model", "optim") for name, value in fields.pop(part).items()}
    return fields | nested


def in_force(train: TrainConfig, resolved: dict) -> dict[str, Any]:
    """What a run computes with, by name. resolved: holds RESOLVED, as a run's identity does."""
    fields = flat(train) | {"context": train.sequence_length}
    names = [name for name in FIXED + COMPUTED if is_read(name, train)]
    known = {name: resolved[name] for name in RESOLVED if resolved.get(name) is not None}
    if not train.model.dropout and train.head == "full":
        known.pop("micro_batch_size", None)
    if train.init_from is not None and Path(train.init_from).exists():
        fields["init_from"] = str(Path(train.init_from).resolve())
    return {name: fields[name] for name in names} | known


def of_checkpoint(checkpoint: Checkpoint) -> tuple[TrainConfig, dict]:
    """(config, resolved) of the run that made a checkpoint.

    A field that the config does not hold yet has its default. Raises BadInput if they are no config
    of a run.
    """
    try:
        check_fields(checkpoint.state, {"config": dict, "identity": dict})
        past, identity = configs.from_dict(checkpoint.state["config"]), checkpoint.state["identity"]
        noted = directory.resolved(branch.run_of(checkpoint.path))  # where older versions noted it
        before = {name: noted.get(name) for name in ("precision", "micro_batch_size")}
        return past, before | {name: identity[name] for name in RESOLVED if name in identity}
    except ValueError as error:
        raise BadInput(
            f"checkpoint: {checkpoint.path} must hold the config of the run that made it, got {error}; use an older "
            "one, or set that run aside with --resume never"
        ) from error


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What differs between two results of in_force, as lines `optim.lr 0.004 -> 0.001` by name.

    What one of them left to be resolved, and did not note, is not compared, nor what only one reads.
    """
    unknown = {name for name in ("precision", "micro_batch_size") if {"auto", None} & {old.get(name), new.get(name)}}
    if old.get("model.dropout") != new["model.dropout"]:
        unknown.add("micro_batch_size")
    names = [name for name in new if name not in unknown and (name in old or not name.startswith("optim."))]
    return {name: f"{name} {old.get(name)} -> {new[name]}" for name in names if old.get(name) != new[name]}


# ---- History ------------------------------------------------------------------------------------------------------


def history(train: TrainConfig, resolved: dict, checkpoint: Checkpoint | None) -> list[dict]:
    """Every config that a run had, with its first step and what it was resolved to; this one last.

    A config is noted again only where settings in force changed, or the run went back. A first step
    is None where the version that began with that config noted none.
    """
    entries, step = [], 0
    if checkpoint is not None:
        step = checkpoint.step
        theirs = [entry for entry in _read(branch.run_of(checkpoint.path)) if (entry["step"] or 0) < step]
        entries = _read(Path(train.out)) or theirs or [_entry(None, *of_checkpoint(checkpoint))]
    if not entries or (entries[-1]["step"] or 0) > step or not _is_of(entries[-1], train, resolved):
        entries.append(_entry(step, train, resolved))
    return entries


def _entry(step: int | None, train: TrainConfig, resolved: dict) -> dict:
    return {"step": step, "config": configs.to_dict(train)} | {name: resolved.get(name) for name in RESOLVED}


def _is_of(entry: dict, train: TrainConfig, resolved: dict) -> bool:
    """Whether an entry has the same settings in force, and the same number of steps."""
    past = configs.from_dict(entry["config"])
    return past.num_steps == train.num_steps and not changes(in_force(past, entry), in_force(train, resolved))


def _read(run: Path) -> list[dict]:
    """The history in a run's config.json, or [] if an older version wrote it or it is damaged."""
    try:
        entries = read_json(run / CONFIG_FILE, {"history": list})["history"]
        for entry in entries:
            check_present(check_fields(entry, {"config": dict, "step": int | None}), NOTED_FIELDS)
            configs.from_dict(entry["config"])
    except (OSError, ValueError):
        return []
    return entries
