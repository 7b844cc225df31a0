"""Integrity check of data directories (token shards) and run directories (checkpoints).

Data: each shard that manifest.json lists must exist, with a valid header and the listed number of
bytes, number of tokens and sha256. Its tokens must be below the vocabulary size of the manifest's
tokenizer, or of gpt2's where shards came without a manifest.
Run: config.json and metrics.jsonl must be readable, and each checkpoint's manifest must verify.
The check reads every byte and changes none.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine import config, output
from engine.errors import BadInput, nearest
from engine.run import rows
from engine.run.rows import METRICS_FILE
from engine.tokens import foreign, names, shards, tokenizer
from engine.tokens.inspection import integrity
from engine.tokens.shards import sha256
from model.files import BadFile, check_fields, check_present, make, open_file, read_json
from model.presets import GPT2Config

SCANNED_TOKENS = 1 << 24  # tokens compared with the vocabulary size at a time
CHECKPOINTS = "checkpoints"
# Files of a checkpoint. Defined here and not in checkpoint.py, which imports PyTorch.
MANIFEST, STATE = "manifest.json", "state.json"
MODEL, OPTIMIZER, SHARDED = "model.safetensors", "optimizer.safetensors", "sharded"
VERSION = 1  # of a checkpoint's layout
# Types of a checkpoint's state, and of its identity: see engine.run.resume. Older versions wrote fewer fields.
STATE_FIELDS = {"step": int, "tokens": int, "trained_positions": int, "world_size": int, "config": dict}
STATE_FIELDS |= {"identity": dict, "scaler": dict, "guard": list}
IDENTITY_FIELDS = {"sequence_length": int, "tokenizer": str, "data_digest": str}
IDENTITY_FIELDS |= {"precision": str | None, "micro_batch_size": int | None}
LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this process or machine: no damage to a file
LATEST = "latest"  # in the run directory: name of the newest checkpoint that was announced


def verify(paths: Iterable[str | Path], print_line: Callable[[str], None]) -> int:
    """Checks data and run directories. Returns the number of damaged files and checkpoints.

    print_line: called with a line for each file or checkpoint, and with the total at the end.
    Raises BadInput, before anything is read, if a path is neither kind of directory, and OSError if a
    limit of this process keeps a file from being read.
    """
    checks = [(Path(path), _check_for(Path(path))) for path in paths]
    checked = damaged = 0
    for directory, check in checks:
        for path, reason in check(directory):
            print_line(f"{path}: {reason or 'ok'}")
            checked += 1
            damaged += reason is not None
        for path in _unlisted_shards(directory):
            print_line(f"{path}: not in {shards.MANIFEST}, so nothing reads it")
    print_line(f"{damaged} of {checked} damaged" if damaged else f"all {checked} whole")
    return damaged


def _check_for(path: Path) -> Callable[[Path], Iterator[tuple[Path, str | None]]]:
    if os.path.isdir(path) and foreign.what(path).kind not in ("checkpoint", "weights"):
        if (path / shards.MANIFEST).exists() or (path / shards.BUILDING).exists() or names.find(path):
            return _check_data
        if any((path / name).exists() for name in (CHECKPOINTS, METRICS_FILE)):
            return _check_run
    raise BadInput(
        f"verify: a path must be a directory of token shards, made by gpt2 prepare, or of a run, made by gpt2 train, "
        f"got {path}{foreign.hint(path)}"
    )


# ---- Data ---------------------------------------------------------------------------------------------------------


def _unlisted_shards(directory: Path) -> list[Path]:
    try:
        manifest = shards.read_manifest(directory)
    except BadInput:
        return []
    return integrity.unlisted(manifest, names.find(directory))


def _check_data(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Yields (file, damage or None) for the manifest and each shard."""
    path, vocab_size = directory / shards.MANIFEST, tokenizer.GPT2Tokenizer.vocab_size
    listed: list[dict] = [{"file": shard.name} for shard in names.find(directory)]
    try:
        manifest = shards.read_manifest(directory)
    except BadInput as error:
        raise_limit(error)
        yield path, _without_path(path, error)
    else:
        if manifest is not None:
            listed, name = manifest["shards"], manifest["tokenizer"]
            known = tokenizer.TOKENIZERS.get(name)
            vocab_size = vocab_size if known is None else known.vocab_size
            unknown = f"the tokenizer must be one that exists, got {name!r}{nearest(name, tokenizer.TOKENIZERS)}"
            yield path, None if known is not None else unknown
        elif (directory / shards.BUILDING).exists():
            yield directory / shards.BUILDING, f"a preparation that was stopped; run {output.program()} prepare again"
    for shard in listed:
        yield directory / shard["file"], _shard_damage(directory / shard["file"], shard, vocab_size)


def _shard_damage(path: Path, listed: dict, vocab_size: int) -> str | None:
    """Describes all damage to a shard, or returns None. listed: its manifest entry."""
    if not path.exists():
        return "is missing"
    wrong = []
    try:
        tokens = shards.open_tokens(path)
        wrong += integrity.sizes(path, tokens, listed)
        # Read the file before its memory map is used: an unreadable page of a map kills the
        # process.
        digest = sha256(path)
        for start in range(0, len(tokens), SCANNED_TOKENS):
            piece = tokens[start : start + SCANNED_TOKENS]
            if (reason := integrity.beyond(piece, start, vocab_size)) is not None:
                wrong.append(reason)
                break
        if (reason := integrity.digest(digest, listed)) is not None:
            wrong.append(reason)
    except (BadInput, OSError, BadFile) as error:
        raise_limit(error)
        wrong.append(integrity.unreadable(path, error))
    return "; ".join(wrong) or None


def raise_limit(error: BaseException | None) -> None:
    """Raises the OSError behind an error if it is one of LIMITS."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in LIMITS:
            raise error
        error = error.__cause__


def _without_path(path: Path, error: BadInput) -> str:
    return str(error).removeprefix(f"{path}: ")


# ---- Runs ---------------------------------------------------------------------------------------------------------


def _check_run(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Yields (file or checkpoint, damage or None)."""
    path = directory / config.CONFIG_FILE
    try:
        config.load(directory)
        yield path, None
    except BadInput as error:
        raise_limit(error)
        yield path, _without_path(path, error) if os.path.lexists(path) else "is missing"
    if os.path.lexists(path := directory / METRICS_FILE):
        yield path, _metrics_damage(path)
    saved = [path for depth in ("step_*", "aside_*/step_*") for path in sorted((directory / CHECKPOINTS).glob(depth))]
    for path in saved:
        yield path, checkpoint_damage(path)
    if (directory / LATEST).exists() and not any(path.parent.name == CHECKPOINTS for path in saved):
        yield directory / CHECKPOINTS, "must hold the checkpoints that this run saved, got none"


def checkpoint_damage(path: Path) -> str | None:
    """Describes the damage to a checkpoint directory, or returns None if every digest verifies.

    Then all that is loaded of it has a digest, and its state has the types of STATE_FIELDS. Raises
    OSError if a limit of this process keeps a file from being read.
    """
    try:
        manifest = read_json(path / MANIFEST, {"version": int, "files": dict})
        if manifest["version"] != VERSION:
            return f"{MANIFEST} must have version {VERSION}, got {manifest['version']!r}"
        files = manifest["files"]
        for name, expected in files.items():
            if (reason := _file_damage(path, name, check_fields(expected, {"bytes": int, "sha256": str}))) is not None:
                return reason
        weights = SHARDED if (path / SHARDED).is_dir() else MODEL
        listed = {name.partition("/")[0] for name in files}
        if missing := {weights, STATE} - listed:
            return f"{MANIFEST} must list {' and '.join(sorted(missing))}"
        found = {f"{SHARDED}/{file.name}" for file in (path / SHARDED).glob("*")}
        found |= {name for name in (MODEL, OPTIMIZER) if os.path.lexists(path / name)}
        if unlisted := found - set(files):
            return f"{MANIFEST} must list {' and '.join(sorted(unlisted))}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        raise_limit(error)
        return f"{MANIFEST} cannot be read: {error}"
    try:
        read_state(path)
    except (OSError, ValueError) as error:  # its digest verifies, but no run wrote it
        raise_limit(error)
        return f"{STATE} must be the state of a run, got {error}"
    return None


def _file_damage(path: Path, name: str, expected: dict) -> str | None:
    """Damage to one file of a checkpoint. Raises OSError if it is missing or cannot be read."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"{MANIFEST} must list files of its directory, got {name[:80]}"
    try:
        with open_file(path / name) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != expected["bytes"]:
                return f"{name} must have {expected['bytes']} bytes, got {num_bytes}"
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} does not match its sha256"
    except BadFile as error:
        raise_limit(error)
        return f"{name} must be a file that can be read, got {error}"
    return None


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint. Raises FileNotFoundError, or BadFile if a field has another type or value."""
    state = check_present(read_json(path / STATE, {"step": int}), STATE_FIELDS)
    if type(state.get("val_loss")) not in (float, int, type(None)):  # NaN is one that older versions wrote
        raise BadFile("no number in field val_loss")
    counts = {name: state.get(name, 1) for name in ("step", "tokens", "trained_positions")}
    if (identity := state.get("identity")) is not None:
        check_present(identity, IDENTITY_FIELDS)
        make(GPT2Config, check_fields(identity, {"model": dict, "sequence_length": int, "tokenizer": str})["model"])
        counts["sequence_length"] = identity["sequence_length"]
    for name, count in counts.items():
        if count < (0 if name in ("step", "tokens") else 1):
            raise BadFile(f"{count} in field {name}")
    return state


def _metrics_damage(path: Path) -> str | None:
    """Describes the first damaged row, or returns None.

    A last line that is cut short is not damage: the run was killed.
    """
    before = -1
    try:
        for number, line in enumerate(rows.lines(path), start=1):
            row = rows.parse(line.text)
            if row is None and not line.is_cut:
                return f"line {number} must be a row with a step, got {line.text[:40].rstrip()!r}"
            if row is not None and row["step"] <= before:
                return f"line {number} must have a step above {before}, got {row['step']}"
            before = before if row is None else row["step"]
    except OSError as error:
        raise_limit(error)
        return f"cannot be read: {error.strerror or error}"
    return None
