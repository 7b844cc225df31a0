"""The run directory: its creation, disk space, config.json, and the final report of a run."""

import json
import math
import os
import shlex
import shutil
from pathlib import Path

from engine import config, durable, lock, output
from engine.config import CONFIG_FILE, TrainConfig
from engine.device import format_bytes
from engine.errors import BadInput
from engine.lock import Lock
from engine.run import checkpoint as checkpoints
from engine.run import metrics, plots
from engine.run.verify import CHECKPOINTS
from model.files import check_present, read_json
from model.presets import GPT2Config, parameter_shapes

_REST_OF_A_RUN = 2**20  # bytes reserved for metrics, samples and plots
_HEADER = 128  # most bytes per tensor in the header of a safetensors file
_JSON = 8192  # bytes of state.json and manifest.json


def open_out(out: str | Path, resume: str, command: str = "train") -> Lock:
    """Makes the run directory and locks it. With resume "never", moves an existing one aside.

    Raises BadInput if the directory cannot be written, or another process writes there.
    """
    out = Path(out)
    held = lock.acquire(out, command)
    try:
        if resume == "never" and lock.others(out):
            number = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}.old{n}").exists())
            _rename(held, out, out.with_name(f"{out.name}.old{number}"))
            held.release()
            held = lock.acquire(out, command)
        probe = out / f".probe_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except BaseException as error:
        held.release()
        if isinstance(error, OSError):
            raise BadInput(
                f"{command}: --out must be a directory that can be written, got {out}: {error.strerror}; choose "
                "another --out"
            ) from error
        raise
    return held


def _rename(held: Lock, out: Path, aside: Path) -> None:
    try:
        held.rename(aside)
    except OSError as error:  # a mount point, or a parent that cannot be written
        raise BadInput(
            f"train: --resume never must rename --out to {aside}, got {error.strerror} for {out}; choose another --out "
            f"such as {out / 'run2'}"
        ) from error


def write_config(train: TrainConfig, tokenizer_name: str, resolved: dict, history: list[dict] | None = None) -> None:
    """Writes config.json: the config, the tokenizer, what `auto` was resolved to, and the history.

    history: every config that the run had, as `settings.history` makes it.
    """
    fields = config.to_dict(train) | {"tokenizer": tokenizer_name, "resolved": resolved, "history": history or []}
    durable.write(Path(train.out) / CONFIG_FILE, json.dumps(fields, indent=1) + "\n")


def tokenizer_name(run: str | Path) -> str:
    """Name of a run's tokenizer, from its config.json. Raises BadInput if that cannot be read."""
    path = Path(run) / CONFIG_FILE
    try:
        return check_present(read_json(path), {"tokenizer": str}).get("tokenizer", "gpt2")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: must be the config of a run, got {error}") from error


def resolved(run: str | Path) -> dict:
    """What `auto` was resolved to in a run; {} if that is not known."""
    try:
        found = check_present(read_json(Path(run) / CONFIG_FILE), {"resolved": dict}).get("resolved", {})
        kinds = {"precision": str, "micro_batch_size": int, "device": str, "tuned": str | None}
        return check_present(found, kinds)
    except (OSError, ValueError):
        return {}


def report(
    train: TrainConfig, unit: str, outcome: str, step: int, val_loss: float | None, duration: str | None = None
) -> str:
    """Final report of a run: the sample and validation loss of `step`, and the paths of its files.

    val_loss: of the weights after `step` updates; None if they were not evaluated. duration: how long the run
    took, in words; None if it has not run now.
    """
    out = Path(train.out)
    if val_loss is not None and math.isfinite(val_loss):
        loss = f"final validation loss {val_loss:.4f} nats per {unit}"
    else:
        see = f"{output.program()} eval --run {shlex.quote(str(out))}"
        loss = f"validation loss not known, step {step:,} was saved without one; see it with {see}"
    files = [plots.LOSS_CURVE, plots.LR_SCHEDULE, metrics.SAMPLES_FILE]
    return "\n".join(
        [
            "",
            metrics.last_sample(out / metrics.SAMPLES_FILE, step) or f"(no sample of step {step:,})",
            "",
            f"{outcome}: {step:,} steps, {loss}",
            *([f"  {duration}"] if duration is not None else []),
            *(f"  {out / name}" for name in files),
            f"try: {output.program()} sample --run {shlex.quote(str(out))} --prompt {shlex.quote(train.prompt)}",
        ]
    )


# ---- Disk space ---------------------------------------------------------------------------------------------------


def checkpoint_bytes(model: GPT2Config, optimizer: str | None, has_rows: bool = False) -> int:
    """Size of a checkpoint on the disk, to a fraction of a percent: float32 weights and the
    optimizer's state.

    AdamW keeps two moments and a step count per parameter. Muon keeps one moment per matrix of a
    block, and AdamW's state for the rest. has_rows: --optim.muon-rows, one more number per row.
    optimizer None: no state, as for imported weights.
    """
    elements = tensors = 0
    for name, shape in parameter_shapes(model).items():
        is_muon = optimizer == "muon" and len(shape) == 2 and name.startswith("h.")
        moments, counts = (1, 0) if is_muon else (2, 1) if optimizer is not None else (0, 0)
        rows = shape[0] if is_muon and has_rows else 0
        elements += (1 + moments) * math.prod(shape) + counts + rows
        tensors += 1 + moments + counts + bool(rows)
    return 4 * elements + _HEADER * tensors + _JSON


def check_disk(train: TrainConfig) -> None:
    """Raises BadInput unless --out's disk has room for all checkpoints that will exist at one time.

    These are the keep_last newest, the one with the lowest validation loss and the one being
    written, but at most as many as the run saves. Space used by existing checkpoints counts as
    free. Call it on one rank, if steps are left to train, after open_out.
    """
    each = checkpoint_bytes(train.model, train.optim.name, train.optim.muon_rows)
    saves = 1 if train.save_every is None else math.ceil(train.num_steps / train.save_every)
    count = min(train.keep_last + 2, saves)
    existing_bytes = sum(map(_bytes_under, checkpoints.step_directories(Path(train.out) / CHECKPOINTS)))
    needed = max(each * count - existing_bytes, each) + _REST_OF_A_RUN  # one is written before any is deleted
    free = shutil.disk_usage(_nearest_existing(Path(train.out))).free
    if free < needed:
        most = (free - _REST_OF_A_RUN + existing_bytes) // each - 2
        lower = f"lower --keep-last to {most}, " if 1 <= most < train.keep_last else ""
        raise BadInput(
            f"train: the disk of --out {train.out} must have {format_bytes(needed)} free, for {count} checkpoint"
            f"{'s' if count > 1 else ''} of {format_bytes(each)}"
            f"{f' less the {format_bytes(existing_bytes)} there' if existing_bytes else ''}, got "
            f"{format_bytes(free)}; {lower}make room there or choose another --out"
        )


def _nearest_existing(path: Path) -> Path:
    """The nearest of path and its parents that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _bytes_under(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
