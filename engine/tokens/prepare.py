"""Text to token shards: `gpt2 prepare SOURCE... --out DIR`.

Sources are files and directories of .txt, .md, .py, .jsonl and .parquet, and the word `stdlib`.
See engine/tokens/sources.py for the files of a source, and documents.py for what lies in them.
Each document is written as the end-of-text token, then its text's tokens. A hash of the text
decides whether a document is for validation, so documents stay in their split when the corpus
grows. If that leaves a split empty, as with a single book, the tail of every document is for
validation instead.
The same sources make the same bytes with any number of workers.

Everything is written to a hidden directory inside DIR and moved into place at the end, the manifest
last. An interrupted preparation leaves nothing that could be mistaken for data.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from engine import lock, system
from engine.errors import BadInput
from engine.lock import Lock
from engine.tokens import tokenizer, workers
from engine.tokens.documents import Losses, Raw, raw_documents
from engine.tokens.encode import Encoded, encode_batch
from engine.tokens.names import NUMBERED
from engine.tokens.progress import Progress
from engine.tokens.shards import BUILDING, MANIFEST, read_manifest, sha256, write_shard
from engine.tokens.sources import Selection, find, find_by_rule_1, require_text, unreadable
from engine.tokens.summary import describe as describe
from engine.tokens.summary import left_out

BATCH_BYTES = 1 << 20  # bytes of text per batch handed to a worker
LONGEST_STEM = 200  # bytes of --out's name that the names of its shards begin with
MOST_TOKENS = 2**31 - 1  # of a shard: its header counts them in an int32
MOST_WORKERS = 1024
LEAST_VAL_FRACTION = 1e-9
SPARE = 4
MOST_KINDS = 50  # of files that are not read, in the manifest
RULES = 2  # which files of a directory are read; manifests without it are of rule 1, see sources.find_by_rule_1


@dataclass(frozen=True)
class PrepareConfig:
    """Options of `gpt2 prepare`."""

    out: str  # directory for the shards and manifest.json
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # gpt2: 50,257 tokens; bytes: 257 tokens, for small models on a CPU
    workers: int | None = None  # worker processes; None: one per CPU core
    val_fraction: float = 0.01  # fraction of the documents used for validation
    shard_tokens: int = 100_000_000  # tokens per shard
    text_field: str = "text"  # name of the text field in .jsonl lines, or of the text column in .parquet files
    on_bad_text: Literal["skip", "fail", "replace"] = "skip"  # bad documents: leave out, stop, or U+FFFD for bad bytes
    overwrite: bool = False  # replace other data in the same directory

    def __post_init__(self) -> None:
        wrong = []
        if not LEAST_VAL_FRACTION <= self.val_fraction < 1.0:
            wrong.append(f"--val-fraction must be from {LEAST_VAL_FRACTION} to below 1, got {self.val_fraction}")
        if not 1 <= self.shard_tokens <= MOST_TOKENS:
            wrong.append(
                f"--shard-tokens must be from 1 to {MOST_TOKENS:,}, the int32 of a shard's header, "
                f"got {self.shard_tokens}"
            )
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            wrong.append(f"--workers must be from 1 to {MOST_WORKERS:,}, got {self.workers}")
        if wrong:
            raise BadInput("prepare: " + "; ".join(wrong))


# ---- Documents to tokens ------------------------------------------------------------------------------------------


def _batches(documents: Iterable[Raw]) -> Iterator[list[Raw]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- Tokens to shards ---------------------------------------------------------------------------------------------


class ShardWriter:
    """Writer of one split's shards.

    Each has shard_tokens tokens, except the last, which may have fewer.
    """

    def __init__(self, directory: Path, name: str, split: str, shard_tokens: int):
        self.directory, self.name, self.split, self.shard_tokens = directory, name, split, shard_tokens
        self.pieces: list[np.ndarray] = []  # of the next shard
        self.buffered = 0  # tokens in pieces
        self.records: list[dict] = []  # manifest entries

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens (n,) uint16 and writes each shard that becomes full."""
        while len(tokens):
            piece, tokens = np.split(tokens, [self.shard_tokens - self.buffered])
            self.pieces.append(piece)
            self.buffered += len(piece)
            if self.buffered == self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Writes the buffered tokens, if any, as a shard."""
        if not self.buffered:
            return
        path = self.directory / f"{self.name}_{self.split}_{len(self.records):06d}.bin"
        with system.naming(path):
            write_shard(path, np.concatenate(self.pieces))
        self.records.append(
            {
                "file": path.name,
                "split": self.split,
                "tokens": self.buffered,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
        )
        self.pieces, self.buffered = [], 0


def prepare(sources: list[str], config: PrepareConfig) -> dict:
    """Tokenises the sources into config.out and returns the manifest.

    Data already made by the same request is left as it is. Raises BadInput if a source cannot be
    read, the directory cannot be used, or a split would be empty.
    """
    found, out = find(sources), Path(config.out)
    request = _request(sources, found, config)
    if (existing := _existing(out, request, config)) is not None:
        return existing  # before the lock: such data may be read-only
    _refuse_older(out, sources, found, config)
    if warning := require_text(found, config.text_field):
        print(f"prepare: {warning}", file=sys.stderr, flush=True)
    with lock.acquire(out, "prepare") as held:
        _remove_orphans(out, out / BUILDING)
        if (existing := _existing(out, request, config)) is not None:
            return existing  # another process made it meanwhile
        return _replace(sources, found, request, config, held)


def _existing(out: Path, request: str, config: PrepareConfig) -> dict | None:
    """The manifest of complete data that the same request made, or None.

    Raises BadInput if the manifest cannot be read, unless the data is to be overwritten, and if the
    data lacks documents without which --on-bad-text fail must not make it.
    """
    try:
        manifest = read_manifest(out)
        if manifest is None or manifest.get("request") != request or not _is_complete(out, manifest):
            return None
        describe(manifest, "")  # shows that all counts are there
    except BadInput:
        if not config.overwrite:
            raise
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a manifest that was edited
        if not config.overwrite:
            raise BadInput(
                f"{out / MANIFEST}: must be as prepare wrote it, got {error!r}; add --overwrite to make the data again"
            ) from error
        return None
    if config.on_bad_text == "fail" and manifest["skipped"]:
        raise BadInput(
            f"prepare: every document must be text, got {out} made without some: {_left_out_note(manifest)}; "
            "mend them, or see --on-bad-text"
        )
    return manifest


def _refuse_older(out: Path, sources: list[str], found: Selection, config: PrepareConfig) -> None:
    """Raises BadInput if the same sources and options made the data when other files of them were read."""
    try:
        manifest = read_manifest(out)
        if manifest is None or "rules" in manifest or config.overwrite:
            return
        older = Selection(find_by_rule_1(sources))
        if manifest.get("request") != _request(sources, older, config):
            return
    except BadInput:  # what is wrong is said where it matters
        return
    now, then = set(found.files), set(older.files)
    which = next((f" ({path} ...)" for path in [*older.files, *found.files] if (path in now) != (path in then)), "")
    raise BadInput(
        f"prepare: {out} must be new or empty, got data of the same sources, made by a version that read other files "
        f"of them{which}; train on it as it is, or add --overwrite to make it again"
    )


def _replace(sources: list[str], found: Selection, request: str, config: PrepareConfig, held: Lock) -> dict:
    """Makes the data and moves it into place. Returns the manifest."""
    out = Path(config.out)
    building = out / BUILDING
    others = [path for path in out.iterdir() if not path.name.startswith(".")]
    if others and not config.overwrite:
        raise BadInput(
            f"prepare: {out} must be new or empty, got {len(others)} files, such as {others[0].name}; "
            "choose another --out, or add --overwrite to replace them"
        )
    spare: list[int] = []  # file descriptors to clean up with, should the process have no more
    try:
        spare += (os.open(out, os.O_RDONLY) for _ in range(SPARE))
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        manifest = _build(found, config, building, by_tail=False)
        if not all(manifest["tokens"].values()):
            manifest = _build(found, config, building, by_tail=True)
        if not all(manifest["tokens"].values()):
            raise BadInput(
                f"prepare: the text must fill both splits, got {manifest['tokens']['train']} training and "
                f"{manifest['tokens']['val']} validation tokens from {len(found.files)} "
                f"files{_left_out_note(manifest, ', ')}; give more text or a larger --val-fraction"
            )
        manifest |= {"request": request, "rules": RULES, "sources": sources, **_account(found)}
        with system.naming(building / MANIFEST):
            (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        held.check()
        if config.overwrite:
            (out / MANIFEST).unlink(missing_ok=True)
            for stale in out.iterdir():
                if stale.suffix == ".bin" and NUMBERED.fullmatch(stale.name):
                    stale.unlink()
        for name in [*(shard["file"] for shard in manifest["shards"]), MANIFEST]:
            os.replace(building / name, out / name)
    except OSError as error:  # of a source it is BadInput already
        raise BadInput(
            f"prepare: --out must be a directory that can be written, got {error.filename or out}: "
            f"{system.reason(error)}; {system.advice(error, 'another --out')}"
        ) from error
    finally:
        for descriptor in spare:
            os.close(descriptor)
        with suppress(OSError):  # what cannot be removed now, the same command removes when it begins
            _remove_orphans(out, building)
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _account(found: Selection) -> dict:
    """What of the sources is read and what is not, for the manifest."""
    account = {"not_read": dict(found.not_read.most_common(MOST_KINDS)), "linked": found.linked}
    if found.held_out:
        first = found.held_out[0]
        account["held_out"] = {"count": len(found.held_out), "first": f"{first}/" if first.is_dir() else str(first)}
    return account


def _remove_orphans(out: Path, building: Path) -> None:
    """Removes shards that an interrupted preparation moved into place without the manifest."""
    if (out / MANIFEST).exists() or not (building / MANIFEST).exists():
        return  # it completed, or moved nothing
    try:
        shards = read_manifest(building)["shards"]
    except BadInput:  # interrupted while it wrote the manifest: it moved nothing
        return
    for shard in shards:
        if not (building / shard["file"]).exists():
            (out / shard["file"]).unlink(missing_ok=True)


def _is_complete(out: Path, manifest: dict) -> bool:
    """Whether every shard of the manifest exists with the listed number of bytes."""
    shards = [(out / shard["file"], shard.get("bytes")) for shard in manifest["shards"]]
    return all(path.is_file() and path.stat().st_size == size for path, size in shards)


def _request(sources: list[str], found: Selection, config: PrepareConfig) -> str:
    """Digest of the options, and of each file's path, size and time. Sets found.num_bytes.

    Equal requests make the same bytes.
    """
    options = [config.tokenizer, config.val_fraction, config.shard_tokens, config.text_field, sources]
    if config.on_bad_text == "replace":  # skip and fail make the same bytes, or fail makes none
        options.append(config.on_bad_text)
    stats = [(str(path), (one := _stat(path)).st_size, one.st_mtime_ns) for path in found.files]
    found.num_bytes = sum(size for _, size, _ in stats)
    return hashlib.sha256(json.dumps([options, stats]).encode()).hexdigest()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def _build(found: Selection, config: PrepareConfig, building: Path, by_tail: bool) -> dict:
    """Writes all shards into `building`. Returns the manifest, which it does not write."""
    count = config.workers or os.cpu_count() or 1
    name = _stem(Path(config.out).name) or "data"
    writers = {split: ShardWriter(building, name, split, config.shard_tokens) for split in ("train", "val")}
    totals, losses = Encoded({}, Counter(), Counter()), Losses()
    encode = partial(
        encode_batch,
        name=config.tokenizer,
        val_fraction=config.val_fraction,
        text_field=config.text_field,
        by_tail=by_tail,
        is_replacing=config.on_bad_text == "replace",
    )
    progress = Progress(found.num_bytes, " of the second pass" if by_tail else "")
    batches = _batches(raw_documents(found.files, config.text_field))
    with closing(progress), closing(workers.map_in_order(encode, batches, count, max_pending=2 * count)) as results:
        for encoded in results:
            for split, tokens in encoded.tokens.items():
                writers[split].add(tokens)
            totals.add(encoded, losses)
            progress.advance(encoded.source_bytes, sum(map(len, encoded.tokens.values())))
            if encoded.losses and config.on_bad_text == "fail":
                raise BadInput(
                    f"prepare: every document must be text, got {encoded.losses[0].file}: {encoded.losses[0].first}; "
                    "mend it, or see --on-bad-text"
                )
    for writer in writers.values():
        writer.flush()
    chosen = tokenizer.load(config.tokenizer)
    return {
        "version": 1,
        "tokenizer": chosen.name,
        "vocab_size": chosen.vocab_size,
        "split": "the tail of each document" if by_tail else "hash of the document",
        "val_fraction": config.val_fraction,
        "documents": {split: totals.documents[split] for split in writers},
        "tokens": {split: sum(shard["tokens"] for shard in w.records) for split, w in writers.items()},
        "text_bytes": totals.text_bytes,
        "files": dict(Counter(path.suffix.lower() for path in found.files)),
        "source_bytes": totals.source_bytes,
        "skipped": dict(totals.skipped),
        "left_out": {"bytes": losses.bytes, "files": losses.largest()},
        "replaced": totals.replaced,
        "markers": totals.markers,
        "with_nul": totals.with_nul,
        "shards": [record for writer in writers.values() for record in writer.records],
    }


def _stem(name: str) -> str:
    """The name, or so much of it that a shard's name fits into the 255 bytes that a name may have."""
    return os.fsencode(name)[:LONGEST_STEM].decode(errors="ignore") if len(os.fsencode(name)) > LONGEST_STEM else name


def _left_out_note(manifest: dict, before: str = "") -> str:
    """Text such as "left out: 3 not UTF-8, 1 empty", or "" if nothing was."""
    lines = [line.strip() for line in left_out(manifest)]
    return before + "; ".join(lines) if lines else ""
