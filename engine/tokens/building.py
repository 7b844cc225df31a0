"""The shards of a preparation, from files to a directory of .bin files and what the manifest says of them."""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from engine import system
from engine.errors import BadInput
from engine.tokens import fast, tokenizer, workers
from engine.tokens.documents import Losses, parts
from engine.tokens.encode import Encoded, encode_batch
from engine.tokens.options import PrepareConfig
from engine.tokens.progress import Progress
from engine.tokens.reading.hub import DOWNLOADS, Downloads
from engine.tokens.reading.parts import Part, Raw, ReadOptions
from engine.tokens.shards import sha256, write_shard
from engine.tokens.sources import Selection

BATCH_BYTES = 1 << 20  # bytes of the sources per batch handed to a worker
LONGEST_STEM = 200  # bytes of --out's name that the names of its shards begin with


class Files:
    """Batches of the sources' parts. Remembers with which batch each file ends."""

    def __init__(self, found: Selection, options: ReadOptions, downloads: Downloads):
        self._found, self._options, self._downloads = found, options, downloads
        self._num_batches = 0
        self._ends: deque[tuple[int, Path]] = deque()  # number of the file's last batch, from 1

    def batches(self) -> Iterator[list[Part]]:
        """Yields the batches, in order."""
        for batch in _batches(self._parts()):
            self._num_batches += 1
            yield batch

    def release(self, number: int) -> None:
        """Removes downloaded files that no batch after this one needs."""
        while self._ends and self._ends[0][0] <= number:
            self._downloads.done(self._ends.popleft()[1])

    def _parts(self) -> Iterator[Part]:
        for path in self._found.files:
            for part, _ in parts(self._downloads.fetch(path), self._options):
                yield part
            self._ends.append((self._num_batches + 1, path))


def _batches(found: Iterable[Part]) -> Iterator[list[Part]]:
    batch, size = [], 0
    for part in found:
        batch.append(part)
        size += len(part.content) if isinstance(part, Raw) else part.num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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


def build(found: Selection, config: PrepareConfig, building: Path, by_tail: bool) -> dict:
    """Writes all shards into `building`. Returns the manifest, which it does not write."""
    count = config.workers or os.cpu_count() or 1
    name = _stem(Path(config.out).name) or "data"
    writers = {split: ShardWriter(building, name, split, config.shard_tokens) for split in ("train", "val")}
    totals, losses = Encoded({}, Counter(), Counter()), Losses()
    options = ReadOptions(config.text_field, is_replacing=config.on_bad_text == "replace")
    encode = partial(
        encode_batch,
        name=config.tokenizer,
        is_fast=config.fast,
        val_fraction=config.val_fraction,
        options=options,
        by_tail=by_tail,
    )
    progress = Progress(found.num_bytes, " of the second pass" if by_tail else "")
    files = Files(found, options, Downloads(found.remote, Path(config.out) / DOWNLOADS, config.keep))
    batches = files.batches()
    with closing(progress), closing(workers.map_in_order(encode, batches, count, max_pending=2 * count)) as results:
        for number, encoded in enumerate(results, 1):
            for split, tokens in encoded.tokens.items():
                writers[split].add(tokens)
            totals.add(encoded, losses)
            files.release(number)
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
        "encoder": fast.version(config.tokenizer, config.fast),
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
