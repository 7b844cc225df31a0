"""A run directory from outside: what is asked of it when training starts, and loading its model afterwards."""

import hashlib
import json
import os
import shlex
import shutil
import sys
import uuid
from pathlib import Path

import torch

from engine import checkpoint, config, data, distributed, hf_tokenizer, metrics, plots, tokenizer
from engine.checkpoint import Checkpoint
from engine.config import CONFIG_FILE, TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.guard import Guard
from engine.optim import allocate_state
from kernels.dispatch import Ops, has_c_compiler
from kernels.launch import HAS_TRITON
from model.generate import generate
from model.gpt2 import GPT2

# What a resumed run must share with its past, since either the weights or the order of the data depends on it.
FIXED = ("model", "sequence_length", "tokens_per_step", "seed", "optimizer", "tokenizer", "data_digest")
SAFE = ("sequence_length", "tokens_per_step", "seed", "data_digest")  # --resume-changed goes on all the same
HOUSES = [Path(__file__).resolve().parent.parent / name for name in ("kernels", "model", "engine")]
SAFE_OF_MODEL = ("dropout", "init")  # and so with these fields of the model


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


def open_out(train: TrainConfig) -> None:
    """Makes the run directory, setting an old run aside for --resume never. Raises BadInput if it cannot be written."""
    out = Path(train.out)
    try:
        if train.resume == "never" and out.is_dir() and any(out.iterdir()):
            number = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}.old{n}").exists())
            out.rename(out.with_name(f"{out.name}.old{number}"))
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(
            f"train: --out must be a directory that can be written, got {out}: {error.strerror}; choose another --out"
        ) from error


def write_config(train: TrainConfig, tokenizer_name: str, resolved: dict) -> None:
    """Writes config.json: the config, the tokenizer, and what was chosen where the config says auto."""
    path = Path(train.out) / CONFIG_FILE
    temporary = path.with_name(f".{CONFIG_FILE}.writing")
    fields = config.to_dict(train) | {"tokenizer": tokenizer_name, "resolved": resolved}
    temporary.write_text(json.dumps(fields, indent=1) + "\n")
    temporary.replace(path)


def find_checkpoint(train: TrainConfig, run_identity: dict, warn) -> Checkpoint | None:
    """Where to go on from, or None to start afresh. Raises BadInput if it belongs to another run than this one."""
    if train.resume == "never":
        return None
    checkpoint.recover(Path(train.out) / "checkpoints")
    found = checkpoint.newest(train.out, warn) if train.resume == "auto" else checkpoint.read(train.resume)
    if found is None:
        return None
    if not found.has_optimizer:
        raise BadInput(
            f"train: {found.path} must hold the optimizer's state to go on training, got weights alone; train from "
            f"them with --init-from {train.out} and another --out"
        )
    past = found.state["identity"]
    changed = {name: _difference(past[name], run_identity[name]) for name in FIXED if past[name] != run_identity[name]}
    listed = "\n  ".join(f"{name}: {difference}" for name, difference in changed.items())
    model_is_same = all(past["model"].get(k) == v for k, v in run_identity["model"].items() if k not in SAFE_OF_MODEL)
    is_safe = model_is_same and set(changed) <= {*SAFE, "model"}
    if changed and train.resume_changed and is_safe:
        warn(f"going on from {found.path} although these changed\n  {listed}")
    elif changed:
        way_out = "choose another --out, or set that run aside with --resume never"
        if is_safe:
            way_out += "; to go on with its weights all the same, add --resume-changed"
        raise BadInput(
            f"train: to go on from {found.path} the run must be the one that made it, but these changed\n  {listed}\n  "
            + way_out
        )
    if found.step > train.num_steps:
        raise BadInput(
            f"train: --num-steps must be at least the {found.step} steps of {found.path}, got {train.num_steps}"
        )
    return found


def restore(found: Checkpoint, raw_model: GPT2, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Fills model and optimizer on every rank. Where they are not sharded only rank 0 reads: the others may have
    no such file. Raises BadInput on every rank if the checkpoint is another model's.
    """
    is_sharded = distributed.is_sharded(raw_model)
    with ranks.together():
        if is_sharded and not found.path.is_dir():
            raise BadInput(
                f"train: --out must be on a file system that all hosts share with --parallel fsdp or hsdp, got "
                f"{found.path}, which is missing on this one; share it, or use --parallel ddp"
            )
    with ranks.together():
        if is_sharded or ranks.is_first:
            checkpoint.load_weights(found, raw_model)
            checkpoint.load_optimizer(found, raw_model, optimizer)
    if not is_sharded:
        allocate_state(optimizer)
        ranks.broadcast(list(checkpoint.tensors(raw_model, optimizer).values()))


def facts(train: TrainConfig, run_identity: dict) -> dict:
    """What must be the same on every rank: flags, code, data and versions."""
    fields = config.to_dict(train)
    nested = {f"{part}.{name}": value for part in ("model", "optim") for name, value in fields.pop(part).items()}
    code = hashlib.sha256()
    for path in sorted(path for house in HOUSES for path in house.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in (fields | nested).items()},
        "data": run_identity["data_digest"],
        "tokenizer": run_identity["tokenizer"],
        "code": code.hexdigest()[:12],
        "torch": torch.__version__,
    }


def check_shared_out(train: TrainConfig, ranks: Ranks) -> None:
    """Raises BadInput on every rank unless all hosts see rank 0's --out, where a sharded run needs that."""
    if train.parallel == "ddp" or ranks.world_size == 1:
        return
    probe = Path(train.out) / ranks.agree(f".probe_{uuid.uuid4().hex}")
    if ranks.is_first:
        probe.touch()
    ranks.agree(None)
    try:
        with ranks.together():
            if not probe.exists():
                raise BadInput(
                    f"train: --out must be on a file system that all hosts share with --parallel {train.parallel}, "
                    f"got {train.out}, where rank 0's files are missing on this host; share it, or use --parallel ddp"
                )
    finally:
        if ranks.is_first:
            probe.unlink(missing_ok=True)


def _difference(old, new) -> str:
    if isinstance(old, dict):
        return ", ".join(f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key])
    return f"{old} -> {new}"


def state(
    step: int,
    tokens: int,
    val_loss: float | None,
    train: TrainConfig,
    run_identity: dict,
    world_size: int,
    scaler: torch.amp.GradScaler,
    guard: Guard,
) -> dict:
    """What a checkpoint says besides weights and optimizer, as JSON types. Waits for the device."""
    return {
        "step": step,
        "tokens": tokens,
        "val_loss": val_loss,
        "identity": run_identity,
        "config": config.to_dict(train),
        "world_size": world_size,
        "scaler": scaler.state_dict(),
        "guard": guard.state_dict(),
    }


def check_vocabulary(train: TrainConfig, words: tokenizer.Tokenizer) -> None:
    """Raises BadInput unless the model has exactly the tokens of the data's tokenizer."""
    if train.model.vocab_size != words.vocab_size:
        raise BadInput(
            f"train: the model must have the {words.vocab_size} tokens of {train.data}'s tokenizer {words.name}, got "
            f"{train.model.vocab_size}; prepare the data with another --tokenizer, or choose a preset that fits"
        )


def configure(model: GPT2, train: TrainConfig, compute_dtype: torch.dtype) -> Ops:
    """Chooses the model's ops. Raises BadInput if --kernels asks for what cannot run here."""
    try:
        return model.configure(train.kernels, compute_dtype, train.recompute)
    except ValueError as error:
        raise BadInput(f"train: {error}") from error


def wants_compile(train: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Whether to compile the training step, and the reason: as asked, else on a GPU; without a C compiler never."""
    wanted = device.type == "cuda" if train.compile is None else train.compile
    if not wanted:
        return False, "off, as asked" if train.compile is False else f"off, the default on a {device.type}"
    obstacle = compile_obstacle(device)
    return obstacle is None, "on" if obstacle is None else f"skipped, {obstacle}: steps run uncompiled"


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot run here, or None: on a GPU it makes Triton kernels, on a CPU C++."""
    if device.type == "cuda":
        if not HAS_TRITON:
            return "Triton is not installed"
        if not has_c_compiler():
            return "there is no C compiler here"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs sm_70"
        return None
    # The one that PyTorch takes: it tries no other where CXX names one that is not there.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else "there is no C compiler here"


def sample(model: GPT2, words: tokenizer.Tokenizer, train: TrainConfig, ranks: Ranks) -> str:
    """The run's prompt continued by the model as it is now, the same draws at every step. Rank 0 has it."""
    if not ranks.is_first and not distributed.is_sharded(model):  # a sharded model runs on all ranks or on none
        return ""
    prompt = torch.tensor([words.encode(train.prompt).tolist()], device=model.wte.weight.device)
    with distributed.outside_training(model):
        ids = generate(model, prompt, train.sample_tokens, temperature=0.8, top_k=50, seed=train.seed)
    return words.decode(ids[0])


def report(train: TrainConfig, unit: str, said: str) -> str:
    """The last words of a run: a sample, the validation loss, and where everything is."""
    out = Path(train.out)
    rows = metrics.read_rows(out / metrics.METRICS_FILE)
    val_loss = next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), float("nan"))
    files = [plots.LOSS_CURVE, plots.LR_SCHEDULE, metrics.SAMPLES_FILE]
    return "\n".join(
        [
            "",
            metrics.last_sample(out / metrics.SAMPLES_FILE),
            "",
            f"{said}: {train.num_steps:,} steps, final validation loss {val_loss:.4f} nats per {unit}",
            *(f"  {out / name}" for name in files),
            f"try: gpt2 sample --run {out} --prompt {shlex.quote(train.prompt)}",
        ]
    )


def load_weights(source: str, model: GPT2) -> None:
    """Fills the model from a run directory, a directory in the Hugging Face layout, or a GPT-2 name."""
    if (Path(source) / "checkpoints").is_dir():
        loaded, _, _ = load_model(source)
    else:
        try:
            loaded = GPT2.from_pretrained(source)
        except ValueError as error:
            raise BadInput(str(error)) from error
    ours, theirs = model.config, loaded.config
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise BadInput(
                f"train: --init-from must have this model's {name} {getattr(ours, name)}, got "
                f"{getattr(theirs, name)} in {source}"
            )
    model.load_state_dict(loaded.state_dict())


def load_model(run: str | Path, warn=print, is_best: bool = False) -> tuple[GPT2, tokenizer.Tokenizer, Checkpoint]:
    """(model, tokenizer, checkpoint) of a run's newest whole checkpoint, or of the one with the lowest validation loss.

    The model is float32 and in eval mode. Raises BadInput if there is no such checkpoint.
    """
    config.load(run)  # a sentence of its own for a directory that is no run
    lowest = checkpoint.best(run) if is_best else None
    found = checkpoint.newest(run, warn) if lowest is None else checkpoint.read(lowest)
    if found is None:
        raise BadInput(f"run: {run} must hold a checkpoint, got none yet; wait for its first save")
    if is_best and lowest is None:
        raise BadInput(
            f"run: {run} must hold a checkpoint with a validation loss to have a best one, got none; leave out --best "
            f"to take the newest, of step {found.step}"
        )
    facts = found.state["identity"]
    model = GPT2(config.GPT2Config(**facts["model"]))
    checkpoint.load_weights(found, model)
    if torch.cuda.is_available():
        model.to("cuda")
        model.configure("auto", torch.float32)
    return model.eval(), tokenizer.load(facts["tokenizer"]), found


def tokenizer_name(run: str | Path) -> str:
    """The tokenizer that a run's config names."""
    return json.loads((Path(run) / CONFIG_FILE).read_text()).get("tokenizer", "gpt2")


def check_tokenizer(data_directory: str, expected: str) -> None:
    """Raises BadInput unless the shards of a directory were made with the tokenizer of the model."""
    if (found := data.tokenizer_name(data_directory)) != expected:
        raise BadInput(
            f"data: the shards must be made with the model's tokenizer {expected}, got {found} in {data_directory}; "
            f"prepare them with --tokenizer {expected}"
        )


def import_weights(source: str, out: str) -> Path:
    """Makes a run directory whose one checkpoint holds weights in the Hugging Face layout. Returns the checkpoint.

    Raises BadInput if the weights cannot be read, no tokenizer has their vocabulary, or `out` is not new or empty.
    """
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise BadInput(f"import: --out must be new or empty, got {out}, which is not; choose another --out")
    try:
        model = GPT2.from_pretrained(source)
    except ValueError as error:
        raise BadInput(f"import: {error}") from error
    sizes = {kind.vocab_size: name for name, kind in tokenizer.TOKENIZERS.items()}
    if model.config.vocab_size not in sizes:
        raise BadInput(
            f"import: the vocabulary must be that of a tokenizer here, {sizes}, got "
            f"{model.config.vocab_size} in {source}"
        )
    train = TrainConfig(out=str(out), model=model.config)
    open_out(train)
    name = sizes[model.config.vocab_size]
    write_config(train, name, {"imported_from": source})
    state = {"step": 0, "tokens": 0, "identity": identity(train, name, "none"), "config": config.to_dict(train)}
    return checkpoint.save(out, state, model, optimizer=None, keep_last=1)


def export(run: str, out: str, is_best: bool = False) -> None:
    """Writes a run's newest checkpoint, or its best, and its tokenizer for transformers.

    Raises BadInput if `out` is taken.
    """
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise BadInput(f"export: --out must be new or empty, got {out}, which is not; choose another --out")
    model, tokens_in, _ = load_model(run, is_best=is_best)
    try:
        model.save_pretrained(out)
        hf_tokenizer.save_pretrained(tokens_in, out, model_max_length=model.config.n_positions)
    except OSError as error:
        raise BadInput(f"export: --out must be a directory that can be written, got {out}: {error.strerror}") from error
