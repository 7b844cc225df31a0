"""The shards of a preparation, from files to a directory of .bin files and what the manifest says of them.

Everything comes in the order of the files, whatever the number of workers. The journal is written now
and then, and the same command goes on from there.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np

from engine.errors import BadInput
from engine.tokens import tokenizer
from engine.tokens.preparation import duplicates, fast, journal, tails, workers
from engine.tokens.preparation.account import IS_FIRST, IS_VAL, TEXT_BYTES, TOKENS, Encoded, Totals
from engine.tokens.preparation.encode import encode_batch, encoder
from engine.tokens.preparation.journal import Request
from engine.tokens.preparation.options import PrepareConfig
from engine.tokens.preparation.progress import Progress
from engine.tokens.preparation.writer import Behind, ShardWriter
from engine.tokens.reading.documents import parts
from engine.tokens.reading.hub import DOWNLOADS, Downloads
from engine.tokens.reading.packed import suffixes
from engine.tokens.reading.parts import Part, Raw, ReadOptions
from engine.tokens.reading.sequential import STDIN
from engine.tokens.reading.sources import Selection

BATCH_BYTES = 1 << 20  # bytes of the sources per batch handed to a worker
BATCH_PARTS = 4096  # and at most so many parts, such as small files
LONGEST_STEM = 200  # bytes of --out's name that the names of its shards begin with
SPLITS = ("train", "val")
TAILS = "tails"  # directory in .building of the shards that are cut again
SEEN = "seen"  # file in .building of the digests of all documents, for --dedup
NOT_FAST = "not_fast"  # file in .building that says why gigatoken is not used
TAIL, OWN = "the tail of each document", "sources of its own"  # how a validation set is made, in the manifest


class Build:
    """One preparation: what is written, and how far it has come. Goes on from the journal, as far as it can be used."""

    def __init__(self, found: Selection, request: Request, config: PrepareConfig, directory: Path):
        self.found, self.request, self.config, self.directory = found, request, config, directory
        self.is_repeatable = STDIN not in found.files  # what came from standard input does not come again
        self.options = ReadOptions(
            config.text_field, config.separator, is_replacing=config.on_bad_text == "replace", format=config.format
        )
        self.downloads = Downloads(found.remote, Path(config.out) / DOWNLOADS, config.keep)
        self.num_safe = 0  # files at the begin whose tokens the journal holds
        self.behind = Behind()
        self.ends: deque[tuple[int, int]] = deque()  # where each batch that is under way ends
        state = journal.usable(directory, request)
        try:
            self._open(state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if state is None:
                raise
            print(f"prepare: begins anew, what was left cannot be used: {error}", file=sys.stderr, flush=True)
            clear(directory, NOT_FAST)
            self._open(None)

    def _open(self, state: dict | None) -> None:
        """Opens the files that are written to. state: the journal's."""
        state = state or {"place": [0, 0], "tokens": dict.fromkeys(SPLITS, 0), "shards": [], "seen": [0, True, 0, 0, 0]}
        self.earlier = state.get("earlier")  # state from before the file that is being read
        self.totals = Totals.from_json(state["totals"]) if "totals" in state else Totals()
        self.place = tuple(state["place"])  # the next file, and the position in it
        finished = self._finished(state)
        for record in finished:
            if (path := self.directory / record["file"]).stat().st_size != record["bytes"]:
                raise ValueError(f"{path} must have {record['bytes']} bytes, got {path.stat().st_size}")
        self.writers = {}
        for split in SPLITS:
            records = tuple(record for record in finished if record["split"] == split)
            total = state["tokens"][split]
            self.writers[split] = self._writer(self.directory, split, total, records)
        count, self.was_kept, *self.dropped = state["seen"]  # kept; was the last; duplicates, their bytes, leaks
        self.seen = duplicates.Seen(self.directory / SEEN, count) if self.config.dedup else None

    def _finished(self, state: dict) -> list[dict]:
        """The shards of the journal that are full at this state: another may have been cut short by the last file."""
        left, finished = dict(state["tokens"]), []
        for record in state["shards"]:
            left[record["split"]] -= record["tokens"]
            if record["tokens"] == self.config.shard_tokens and left[record["split"]] >= 0:
                finished.append(record)
        return finished

    def _writer(self, directory: Path, split: str, total: int = 0, records: tuple[dict, ...] = ()) -> ShardWriter:
        stem = directory / f"{self.request.name}_{split}"
        return ShardWriter(stem, self.config.shard_tokens, self.behind, total, records)

    # ---- Files to batches

    def _parts(self) -> Iterator[tuple[Part, tuple[int, int]]]:
        """Yields the parts of all files from `place` on, each with the place after it."""
        (first, start), num_train = self.place, self.request.num_train
        for index in range(first, len(self.found.files)):
            before = None
            for part, position in parts(self._fetch(self.found.files[index]), self.options, start):
                if before is not None:
                    yield before
                if num_train is not None:
                    part = part._replace(split="train" if index < num_train else "val")
                before = part, (index, position)
            if before is not None:
                yield before[0], (index + 1, 0)
            start = 0

    def _fetch(self, path: Path) -> Path:
        """The local path of a file. Says on the way what is waited for."""
        name = "standard input" if str(path) == "-" else path.name
        self.progress.doing(f"downloads {name}")
        local = self.downloads.fetch(path)
        self.progress.doing(f"reads {name}")
        return local

    def _batches(self) -> Iterator[list[Part]]:
        batch, size, end = [], 0, self.place
        for part, end in self._parts():
            batch.append(part)
            size += len(part.content) if isinstance(part, Raw) else part.num_bytes
            if size >= BATCH_BYTES or len(batch) >= BATCH_PARTS:
                self.ends.append(end)
                yield batch
                batch, size = [], 0
        if batch:
            self.ends.append(end)
            yield batch

    # ---- Batches to shards

    def run(self) -> None:
        """Writes all shards."""
        config, done, total = self.config, self.totals.source_bytes, self.found.num_bytes
        if done:
            print(f"prepare: goes on after {done:,} of {total:,} bytes", file=sys.stderr, flush=True)
        encode = partial(
            encode_batch,
            name=config.tokenizer,
            is_fast=config.fast,
            val_fraction=config.val_fraction,
            options=self.options,
            dedup=config.dedup,
        )
        if multiprocessing.get_start_method() == "fork":
            encoder(config.tokenizer, config.fast)  # the workers have it then, and none builds its own
        count, saved, finished = config.workers or os.cpu_count() or 1, time.monotonic(), self._num_finished()
        with ExitStack() as stack:
            progress = stack.enter_context(closing(Progress(total if self.is_repeatable else None, done=done)))
            self.progress = progress
            results = workers.map_in_order(encode, self._batches(), count, workers.max_pending(count))
            for encoded in stack.enter_context(closing(results)):
                end = self.ends.popleft()
                if journal.num_begun(end) > journal.num_begun(self.place):
                    self.earlier = self._state()
                num_tokens = self._take(encoded)
                self.place = end
                progress.advance(encoded.source_bytes, num_tokens)
                now = time.monotonic()
                after_shard = self._num_finished() > finished
                if now - saved >= (min(journal.AFTER_SHARD, journal.EVERY) if after_shard else journal.EVERY):
                    self._save()
                    saved, finished = now, self._num_finished()
        for writer in self.writers.values():
            writer.finish()
        self._save()
        self.behind.wait()

    def _num_finished(self) -> int:
        return sum(writer.num_finished for writer in self.writers.values())

    def _take(self, encoded: Encoded) -> int:
        """Writes a batch. Returns the number of its tokens."""
        if encoded.losses and self.config.on_bad_text == "fail":
            loss = encoded.losses[0].locate()
            raise BadInput(
                f"prepare: every document must be text, got {loss.file}: {loss.first}; mend it, or see --on-bad-text"
            )
        if self.seen is not None:
            self._drop_duplicates(encoded)
        for split, tokens in encoded.tokens.items():
            self.writers[split].add(tokens)
        self.totals.add(encoded)
        return sum(map(len, encoded.tokens.values()))

    def _drop_duplicates(self, encoded: Encoded) -> None:
        """Removes the documents that are equal to one before. Parts of a long one share its fate."""
        rows = encoded.rows
        is_first, is_val = rows[:, IS_FIRST].astype(bool), rows[:, IS_VAL].astype(bool)
        is_new, is_leak = self.seen.add(encoded.digests, is_val[is_first])
        kept = np.concatenate([[self.was_kept], is_new])[np.cumsum(is_first)]
        for split, tokens in encoded.tokens.items():
            of_split = is_val == (split == "val")
            encoded.tokens[split] = tokens[np.repeat(kept[of_split], rows[of_split, TOKENS])]
        encoded.rows = rows[kept]
        self.was_kept = bool(kept[-1]) if len(kept) else self.was_kept
        dropped = int((~is_new).sum()), int(rows[~kept, TEXT_BYTES].sum()), int(is_leak.sum())
        self.dropped = [before + more for before, more in zip(self.dropped, dropped, strict=True)]

    def _save(self) -> None:
        """Has the journal written once all that was added by now is on the disk."""
        open_files = [writer.file for writer in self.writers.values() if writer.file is not None]
        for writer in self.writers.values():
            writer.flush()
        self.behind.do(self._write_journal, open_files, self._state() | {"earlier": self.earlier})

    def _state(self) -> dict:
        """How far it has come."""
        return {
            "place": self.place,
            "files": self.request.digest(self.place),
            "tokens": {split: writer.total for split, writer in self.writers.items()},
            "seen": [self.seen.count if self.seen is not None else 0, self.was_kept, *self.dropped],
            "totals": self.totals.to_json(),
        }

    def _write_journal(self, open_files: list, state: dict) -> None:
        for file in open_files:
            os.fsync(file.fileno())
        if self.seen is not None:
            self.seen.sync()
        records = [record for writer in self.writers.values() for record in writer.records]
        if self.is_repeatable:
            journal.write(self.directory, self.request.key, state | {"shards": records})
        for path in self.found.files[self.num_safe : state["place"][0]]:
            self.downloads.done(path)
        self.num_safe = state["place"][0]

    def cut_tails(self) -> bool:
        """Whether one split has all documents, whose tails then become the other, in a directory of their own."""
        is_split = self.request.num_train is not None or all(writer.total for writer in self.writers.values())
        if is_split or not self._num_finished():
            return False
        shutil.rmtree(self.directory / TAILS, ignore_errors=True)
        (self.directory / TAILS).mkdir()
        paths = [self.directory / record["file"] for writer in self.writers.values() for record in writer.records]
        self.writers = {split: self._writer(self.directory / TAILS, split) for split in SPLITS}
        end_of_text = tokenizer.TOKENIZERS[self.config.tokenizer].end_of_text
        self.totals.documents = tails.cut(paths, self.config.val_fraction, end_of_text, self.writers)
        for writer in self.writers.values():
            writer.finish()
        self.behind.wait()
        return True

    def close(self) -> None:
        """Closes all files, which stay."""
        self.behind.close()
        for file in (*self.writers.values(), self.seen):
            if file is not None:
                file.close()


def build(found: Selection, request: Request, config: PrepareConfig, directory: Path) -> dict:
    """Writes all shards into `directory`, or into its TAILS. Returns the manifest, which it does not write."""
    with closing(Build(found, request, config, directory)) as made:
        made.run()
        split = TAIL if made.cut_tails() else OWN if request.num_train is not None else "hash of the document"
    chosen, totals, losses = tokenizer.TOKENIZERS[config.tokenizer], made.totals, made.totals.losses
    manifest = {
        "version": 1,
        "tokenizer": chosen.name,
        "encoder": fast.version(config.tokenizer, config.fast),
        "vocab_size": chosen.vocab_size,
        "split": split,
        "val_fraction": config.val_fraction,
        "documents": {split: totals.documents[split] for split in SPLITS},
        "tokens": {split: writer.total for split, writer in made.writers.items()},
        "text_bytes": totals.text_bytes,
        "files": dict(Counter("".join(suffixes(path)) or "standard input" for path in found.files)),
        "source_bytes": totals.source_bytes,
        "skipped": dict(totals.skipped),
        "left_out": {"bytes": losses.bytes, "files": losses.largest()},
        "replaced": totals.replaced,
        "markers": totals.markers,
        "with_nul": totals.with_nul,
        "shards": [record for writer in made.writers.values() for record in writer.records],
    }
    if config.dedup:
        manifest["duplicates"] = dict(zip(("documents", "bytes", "leaked"), made.dropped, strict=True))
    return manifest


def clear(directory: Path, but: str = "") -> None:
    """Removes what a preparation has made, except the file `but`."""
    kept = (directory / but).read_text() if but and (directory / but).exists() else None
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if kept is not None:
        (directory / but).write_text(kept)


def stem(out: Path) -> str:
    """What the shards' names begin with: --out's name, or so much of it that they fit into the 255 bytes of a name."""
    name = os.fsencode(out.name)
    return name[:LONGEST_STEM].decode(errors="ignore") if len(name) > LONGEST_STEM else out.name or "data"
