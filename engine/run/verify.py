"""Integrity check of data directories (token shards) and run directories (checkpoints).

Data: each shard that manifest.json lists must exist, with a valid header and the listed number of
bytes, number of tokens and sha256. Its tokens must be below the vocabulary size of the manifest's
tokenizer, or of gpt2's where shards came without a manifest.
Run: config.json and metrics.jsonl must be readable, and each checkpoint's manifest must verify.
The check reads every byte and changes none.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine import config, output
from engine.errors import BadInput, nearest
from engine.run import rows
from engine.run.rows import METRICS_FILE
from engine.tokens import shards, tokenizer
from engine.tokens.shards import sha256

SCANNED_TOKENS = 1 << 24  # tokens compared with the vocabulary size at a time
CHECKPOINTS = "checkpoints"
# Files of a checkpoint. Defined here and not in checkpoint.py, which imports PyTorch.
MANIFEST, STATE = "manifest.json", "state.json"
MODEL, OPTIMIZER, SHARDED = "model.safetensors", "optimizer.safetensors", "sharded"
VERSION = 1  # of a checkpoint's layout
LATEST = "latest"  # in the run directory: name of the newest checkpoint that was announced


def verify(paths: Iterable[str | Path], print_line: Callable[[str], None]) -> int:
    """Checks data and run directories. Returns the number of damaged files and checkpoints.

    print_line: called with a line for each file or checkpoint, and with the total at the end.
    Raises BadInput, before anything is read, if a path is neither kind of directory.
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
    if path.is_dir():
        if (path / shards.MANIFEST).exists() or (path / shards.BUILDING).exists() or _shards(path):
            return _check_data
        if any((path / name).exists() for name in (CHECKPOINTS, METRICS_FILE)):
            return _check_run
    raise BadInput(
        f"verify: a path must be a directory of token shards, made by gpt2 prepare, or of a run, made by gpt2 train, "
        f"got {path}"
    )


# ---- Data ---------------------------------------------------------------------------------------------------------


def _shards(directory: Path) -> list[Path]:
    return sorted(
        path
        for split in ("train", "val")
        for suffix in ("bin", "npy")
        for path in directory.glob(f"*_{split}_*.{suffix}")
    )


def _unlisted_shards(directory: Path) -> list[Path]:
    try:
        manifest = shards.read_manifest(directory)
    except BadInput:
        return []
    listed = None if manifest is None else {shard["file"] for shard in manifest["shards"]}
    return [path for path in _shards(directory) if listed is not None and path.name not in listed]


def _check_data(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Yields (file, damage or None) for the manifest and each shard."""
    path, vocab_size = directory / shards.MANIFEST, tokenizer.GPT2Tokenizer.vocab_size
    listed: list[dict] = [{"file": shard.name} for shard in _shards(directory)]
    try:
        manifest = shards.read_manifest(directory)
    except BadInput as error:
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
        tokens = shards.open_shard(path)
        for field, count in (("bytes", path.stat().st_size), ("tokens", len(tokens))):
            if listed.get(field, count) != count:
                wrong.append(f"must have {listed[field]} {field}, got {count}")
        # Read the file before its memory map is used: an unreadable page of a map kills the
        # process.
        digest = sha256(path)
        for start in range(0, len(tokens), SCANNED_TOKENS):
            piece = tokens[start : start + SCANNED_TOKENS]
            if int(piece.max()) >= vocab_size:
                at = int((piece >= vocab_size).argmax())
                wrong.append(f"token {start + at} must be below the vocabulary size {vocab_size}, got {piece[at]}")
                break
        if listed.get("sha256", digest) != digest:
            wrong.append(f"must have sha256 {listed['sha256'][:12]}..., got {digest[:12]}...")
    except BadInput as error:
        wrong.append(_without_path(path, error))
    except OSError as error:
        wrong.append(f"cannot be read: {error.strerror or error}")
    return "; ".join(wrong) or None


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
        yield path, _without_path(path, error) if path.exists() else "is missing"
    if (path := directory / METRICS_FILE).exists():
        yield path, _metrics_damage(path)
    saved = [path for depth in ("step_*", "aside_*/step_*") for path in sorted((directory / CHECKPOINTS).glob(depth))]
    for path in saved:
        yield path, checkpoint_damage(path)
    if (directory / LATEST).exists() and not any(path.parent.name == CHECKPOINTS for path in saved):
        yield directory / CHECKPOINTS, "must hold the checkpoints that this run saved, got none"


def checkpoint_damage(path: Path) -> str | None:
    """Describes the damage to a checkpoint directory, or returns None if every digest verifies."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            return f"{MANIFEST} must have version {VERSION}, got {manifest['version']!r}"
        files = manifest["files"]
        for name, expected in files.items():
            num_bytes = (path / name).stat().st_size
            if num_bytes != expected["bytes"]:
                return f"{name} must have {expected['bytes']} bytes, got {num_bytes}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} does not match its sha256"
        weights = SHARDED if (path / SHARDED).is_dir() else MODEL
        listed = {name.partition("/")[0] for name in files}
        if missing := {weights, STATE} - listed:
            return f"{MANIFEST} must list {' and '.join(sorted(missing))}"
        if unlisted := {f"{SHARDED}/{file.name}" for file in (path / SHARDED).glob("*")} - set(files):
            return f"{MANIFEST} must list {' and '.join(sorted(unlisted))}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


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
        return f"cannot be read: {error.strerror or error}"
    return None
