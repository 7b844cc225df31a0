"""Whether what is on the disk is whole: every token shard of a data directory, every checkpoint of a run.

Data: each shard that manifest.json lists is there and has its header, its size, its tokens, all below the vocabulary
of the manifest's tokenizer, and its sha256; shards that came without a manifest are held against gpt2's vocabulary.
A run: config.json and metrics.jsonl can be read, and each checkpoint's manifest verifies.
Reads every byte, changes none.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine import config
from engine.errors import BadInput, nearest
from engine.tokens import shards, tokenizer

SCANNED_TOKENS = 1 << 24  # at a time
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"  # engine.run.metrics imports PyTorch, which checking shards can do without


def verify(paths: Iterable[str | Path], print_line: Callable[[str], None]) -> int:
    """Checks each path, a data directory or a run directory, and returns how many files or checkpoints are damaged.

    `print_line` gets one line for each, and the count at the end. Raises BadInput, before any is read, if a path is
    neither.
    """
    checks = [(Path(path), _kind(Path(path))) for path in paths]
    checked = damaged = 0
    for directory, check in checks:
        for path, reason in check(directory):
            print_line(f"{path}: {reason or 'ok'}")
            checked += 1
            damaged += reason is not None
        for path in _unlisted(directory):
            print_line(f"{path}: not in {shards.MANIFEST}, so nothing reads it")
    print_line(f"{damaged} of {checked} damaged" if damaged else f"all {checked} whole")
    return damaged


def _kind(path: Path) -> Callable[[Path], Iterator[tuple[Path, str | None]]]:
    if path.is_dir():
        if (path / shards.MANIFEST).exists() or (path / shards.BUILDING).exists() or _shards(path):
            return _data
        if any((path / name).exists() for name in (CHECKPOINTS, METRICS_FILE)):
            return _run
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


def _unlisted(directory: Path) -> list[Path]:
    try:
        manifest = shards.read_manifest(directory)
    except BadInput:
        return []
    listed = None if manifest is None else {shard["file"] for shard in manifest["shards"]}
    return [path for path in _shards(directory) if listed is not None and path.name not in listed]


def _data(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """(file, what is wrong with it or None) for the manifest and each shard."""
    path, vocab_size = directory / shards.MANIFEST, tokenizer.GPT2Tokenizer.vocab_size
    listed: list[dict] = [{"file": shard.name} for shard in _shards(directory)]
    try:
        manifest = shards.read_manifest(directory)
    except BadInput as error:
        yield path, _without(path, error)
    else:
        if manifest is not None:
            listed, name = manifest["shards"], manifest["tokenizer"]
            known = tokenizer.TOKENIZERS.get(name)
            vocab_size = vocab_size if known is None else known.vocab_size
            unknown = f"the tokenizer must be one that exists, got {name!r}{nearest(name, tokenizer.TOKENIZERS)}"
            yield path, None if known is not None else unknown
        elif (directory / shards.BUILDING).exists():
            yield directory / shards.BUILDING, "a preparation that was stopped; run gpt2 prepare again"
    for shard in listed:
        yield directory / shard["file"], _shard_damage(directory / shard["file"], shard, vocab_size)


def _shard_damage(path: Path, listed: dict, vocab_size: int) -> str | None:
    """All that is wrong with a shard, given what the manifest says of it."""
    if not path.exists():
        return "is missing"
    wrong = []
    try:
        tokens = shards.open_shard(path)
        for field, found in (("bytes", path.stat().st_size), ("tokens", len(tokens))):
            if listed.get(field, found) != found:
                wrong.append(f"must have {listed[field]} {field}, got {found}")
        with path.open("rb") as file:  # all of it, before it is mapped: a page that cannot be read ends the process
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for start in range(0, len(tokens), SCANNED_TOKENS):
            piece = tokens[start : start + SCANNED_TOKENS]
            if int(piece.max()) >= vocab_size:
                at = int((piece >= vocab_size).argmax())
                wrong.append(f"token {start + at} must be below the vocabulary size {vocab_size}, got {piece[at]}")
                break
        if listed.get("sha256", sha256) != sha256:
            wrong.append(f"must have sha256 {listed['sha256'][:12]}..., got {sha256[:12]}...")
    except BadInput as error:
        wrong.append(_without(path, error))
    except OSError as error:
        wrong.append(f"cannot be read: {error.strerror or error}")
    return "; ".join(wrong) or None


def _without(path: Path, error: BadInput) -> str:
    return str(error).removeprefix(f"{path}: ")


# ---- Runs ---------------------------------------------------------------------------------------------------------


def _run(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """(file or checkpoint, what is wrong with it or None)."""
    path = directory / config.CONFIG_FILE
    try:
        config.load(directory)
        yield path, None
    except BadInput as error:
        yield path, _without(path, error) if path.exists() else "is missing"
    if (path := directory / METRICS_FILE).exists():
        yield path, _metrics_damage(path)
    if found := sorted((directory / CHECKPOINTS).glob("step_*")):
        from engine.run import checkpoint

        yield from ((path, checkpoint.damage(path)) for path in found)


def _metrics_damage(path: Path) -> str | None:
    """What is wrong with the rows. A last line without its end is as it should be: the run was killed."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    before = -1
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            return f"line {number} must be a row with a step, got {line[:40]!r}"
        if not isinstance(step, int) or step <= before:
            return f"line {number} must have a step above {before}, got {step!r}"
        before = step
    return None
