"""Text to token shards: `gpt2 prepare SOURCE... --out DIR`.

Sources are files and directories of .txt, .md, .py, .jsonl and .parquet, and the word `stdlib`.
See engine/tokens/sources.py.
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
from engine.tokens.names import NUMBERED
from engine.tokens.shards import BUILDING, MANIFEST, read_manifest, sha256, write_shard
from engine.tokens.sources import find_files, parse, raw_documents

BATCH_BYTES = 1 << 20  # bytes of text per batch handed to a worker
LONGEST_STEM = 200  # bytes of --out's name that the names of its shards begin with


@dataclass(frozen=True)
class PrepareConfig:
    """Options of `gpt2 prepare`."""

    out: str  # directory for the shards and manifest.json
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # gpt2: 50,257 tokens; bytes: 257 tokens, for small models on a CPU
    workers: int | None = None  # worker processes; None: one per CPU core
    val_fraction: float = 0.01  # fraction of the documents used for validation
    shard_tokens: int = 100_000_000  # tokens per shard
    text_field: str = "text"  # name of the text field in .jsonl lines, or of the text column in .parquet files
    on_bad_text: Literal["skip", "fail"] = "skip"  # documents that are not text: leave out and count, or stop
    overwrite: bool = False  # replace other data in the same directory

    def __post_init__(self) -> None:
        wrong = []
        if not 0.0 < self.val_fraction < 1.0:
            wrong.append(f"--val-fraction must be between 0 and 1, got {self.val_fraction}")
        if self.shard_tokens < 1:
            wrong.append(f"--shard-tokens must be at least 1, got {self.shard_tokens}")
        if self.workers is not None and self.workers < 1:
            wrong.append(f"--workers must be at least 1, got {self.workers}")
        if wrong:
            raise BadInput("prepare: " + "; ".join(wrong))


# ---- Documents to tokens ------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """A tokenised batch: tokens of each split, in the order of the documents, and counts."""

    tokens: dict[str, np.ndarray]  # by split, (n,) uint16
    documents: Counter  # by split
    skipped: Counter  # by reason
    text_bytes: int


def is_validation(text: str, val_fraction: float) -> bool:
    """Whether a document is in the validation split: 64-bit hash / 2^64 < val_fraction."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


_worker_tokenizer = None  # one per worker process, built for its first batch


def encode_batch(
    batch: list[tuple[str, bytes]], *, name: str, val_fraction: float, text_field: str, by_tail: bool
) -> Encoded:
    """Parses, splits and tokenises a batch of documents.

    batch: (kind, bytes) of each document, as from raw_documents. name: the tokenizer's. by_tail:
    take the last val_fraction of every document's tokens for validation, not whole documents.
    """
    global _worker_tokenizer
    if _worker_tokenizer is None or _worker_tokenizer.name != name:
        _worker_tokenizer = tokenizer.load(name)
    pieces: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    result = Encoded({}, Counter(), Counter(), 0)
    end_of_text = np.array([_worker_tokenizer.end_of_text], dtype=np.uint16)
    for kind, raw in batch:
        text, reason = parse(kind, raw, text_field)
        if reason is not None:
            result.skipped[reason] += 1
            continue
        result.text_bytes += len(raw)
        if by_tail:
            tokens = _worker_tokenizer.encode(text)
            cut = len(tokens) - int(len(tokens) * val_fraction)
            parts = {"train": tokens[:cut], "val": tokens[cut:]}
        else:
            split = "val" if is_validation(text, val_fraction) else "train"
            parts = {split: _worker_tokenizer.encode(text)}
        for split, tokens in parts.items():
            if len(tokens):
                pieces[split] += [end_of_text, tokens]
                result.documents[split] += 1
    result.tokens = {split: np.concatenate(parts) for split, parts in pieces.items() if parts}
    return result


def _batches(documents: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
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
    files, out = find_files(sources), Path(config.out)
    request = _request(sources, files, config)
    if (existing := _existing(out, request, config.overwrite)) is not None:
        return existing  # before the lock: such data may be read-only
    with lock.acquire(out, "prepare") as held:
        _remove_orphans(out, out / BUILDING)
        if (existing := _existing(out, request, config.overwrite)) is not None:
            return existing  # another process made it meanwhile
        return _replace(sources, files, request, config, held)


def _existing(out: Path, request: str, is_overwritten: bool) -> dict | None:
    """The manifest of complete data that the same request made, or None.

    Raises BadInput if the manifest cannot be read, unless the data is to be overwritten.
    """
    try:
        manifest = read_manifest(out)
    except BadInput:
        if not is_overwritten:
            raise
        return None
    is_same = manifest is not None and manifest.get("request") == request and _is_complete(out, manifest)
    return manifest if is_same else None


def _replace(sources: list[str], files: list[Path], request: str, config: PrepareConfig, held: Lock) -> dict:
    """Makes the data and moves it into place. Returns the manifest."""
    out = Path(config.out)
    building = out / BUILDING
    others = [path for path in out.iterdir() if not path.name.startswith(".")]
    if others and not config.overwrite:
        raise BadInput(
            f"prepare: {out} must be new or empty, got {len(others)} files, such as {others[0].name}; "
            "choose another --out, or add --overwrite to replace them"
        )
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        manifest = _build(files, config, building, by_tail=False)
        if not all(manifest["tokens"].values()):
            manifest = _build(files, config, building, by_tail=True)
        if not all(manifest["tokens"].values()):
            raise BadInput(
                f"prepare: the text must fill both splits, got {manifest['tokens']['train']} training and "
                f"{manifest['tokens']['val']} validation tokens from {len(files)} files"
                f"{_skipped_note(manifest['skipped'])}; give more text or a larger --val-fraction"
            )
        manifest |= {"request": request, "sources": sources}
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
        with suppress(OSError):  # what cannot be removed now, the same command removes when it begins
            _remove_orphans(out, building)
        shutil.rmtree(building, ignore_errors=True)
    return manifest


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


def _request(sources: list[str], files: list[Path], config: PrepareConfig) -> str:
    """Digest of the options, and of each file's path, size and time.

    Equal requests make the same bytes.
    """
    options = [config.tokenizer, config.val_fraction, config.shard_tokens, config.text_field, sources]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([options, stats]).encode()).hexdigest()


def _build(files: list[Path], config: PrepareConfig, building: Path, by_tail: bool) -> dict:
    """Writes all shards into `building`. Returns the manifest, which it does not write."""
    count = config.workers or os.cpu_count() or 1
    name = _stem(Path(config.out).name) or "data"
    writers = {split: ShardWriter(building, name, split, config.shard_tokens) for split in ("train", "val")}
    documents, skipped, text_bytes = Counter(), Counter(), 0
    encode = partial(
        encode_batch,
        name=config.tokenizer,
        val_fraction=config.val_fraction,
        text_field=config.text_field,
        by_tail=by_tail,
    )
    batches = _batches(raw_documents(files, config.text_field))
    with closing(workers.map_in_order(encode, batches, count, max_pending=2 * count)) as results:
        for encoded in results:
            for split, tokens in encoded.tokens.items():
                writers[split].add(tokens)
            documents += encoded.documents
            skipped += encoded.skipped
            text_bytes += encoded.text_bytes
            if skipped and config.on_bad_text == "fail":
                raise BadInput(f"prepare: every document must be text{_skipped_note(skipped)}; see --on-bad-text")
    for writer in writers.values():
        writer.flush()
    chosen = tokenizer.load(config.tokenizer)
    return {
        "version": 1,
        "tokenizer": chosen.name,
        "vocab_size": chosen.vocab_size,
        "split": "the tail of each document" if by_tail else "hash of the document",
        "val_fraction": config.val_fraction,
        "documents": {split: documents[split] for split in writers},
        "tokens": {split: sum(shard["tokens"] for shard in w.records) for split, w in writers.items()},
        "text_bytes": text_bytes,
        "skipped": dict(skipped),
        "shards": [record for writer in writers.values() for record in writer.records],
    }


def _stem(name: str) -> str:
    """The name, or so much of it that a shard's name fits into the 255 bytes that a name may have."""
    return os.fsencode(name)[:LONGEST_STEM].decode(errors="ignore") if len(os.fsencode(name)) > LONGEST_STEM else name


def _skipped_note(skipped: dict[str, int]) -> str:
    """Text such as ", left out: 3 not UTF-8, 1 empty", or "" if nothing was skipped."""
    return "" if not skipped else ", left out: " + ", ".join(f"{count} {why}" for why, count in sorted(skipped.items()))


def describe(manifest: dict, out: str) -> str:
    """Summary of a manifest for the terminal: three lines, or four if documents were skipped."""
    lines = [
        f"{out}: {manifest['text_bytes'] / 1e6:,.1f} MB of text, tokenizer {manifest['tokenizer']}, "
        f"validation by {manifest['split']}"
    ]
    for split in ("train", "val"):
        lines.append(
            f"  {split:<5} {manifest['tokens'][split]:>14,} tokens  {manifest['documents'][split]:>9,} documents  "
            f"{sum(shard['split'] == split for shard in manifest['shards']):>4} shards"
        )
    if manifest["skipped"]:
        lines.append(f"  {_skipped_note(manifest['skipped']).removeprefix(', ')}")
    return "\n".join(lines)
