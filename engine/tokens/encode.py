"""Documents to tokens: the split of each document, its tokens, and counts of what is no text.

Runs in the worker processes of `gpt2 prepare`.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from engine.tokens import tokenizer
from engine.tokens.documents import Loss, Losses, parse, read
from engine.tokens.reading.parts import NotText, Part, ReadOptions


@dataclass
class Encoded:
    """A tokenised batch: tokens of each split, in the order of the documents, and counts."""

    tokens: dict[str, np.ndarray]  # by split, (n,) uint16
    documents: Counter  # by split
    skipped: Counter  # by reason
    text_bytes: int = 0
    source_bytes: int = 0  # of the files, text or not
    replaced: int = 0  # characters put in place of bad bytes
    markers: int = 0  # literal <|endoftext|> in the text
    with_nul: int = 0  # documents with NUL bytes
    losses: list[Loss] = field(default_factory=list)  # of each file in turn

    def leave_out(self, file: str, place: str, num_bytes: int, error: NotText) -> None:
        """Counts a document that is not text."""
        self.skipped[error.reason] += 1
        if not self.losses or self.losses[-1].file != file:
            self.losses.append(Loss(file, 0, 0, place + str(error)))
        self.losses[-1].bytes += num_bytes
        self.losses[-1].documents += 1

    def add(self, other: "Encoded", losses: Losses) -> None:
        """Adds the counts of another batch, and its losses to the account of them."""
        self.documents += other.documents
        self.skipped += other.skipped
        self.text_bytes += other.text_bytes
        self.source_bytes += other.source_bytes
        self.replaced += other.replaced
        self.markers += other.markers
        self.with_nul += other.with_nul
        for loss in other.losses:
            losses.add(loss)


def is_validation(text: str, val_fraction: float) -> bool:
    """Whether a document is in the validation split: 64-bit hash / 2^64 < val_fraction."""
    return in_validation(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), val_fraction)


def in_validation(digest: bytes, val_fraction: float) -> bool:
    """Whether the document with this hash of 8 bytes is in the validation split."""
    return int.from_bytes(digest, "little") < val_fraction * 2**64


_worker_tokenizer = None  # one per worker process, built for its first batch


def encode_batch(batch: list[Part], *, name: str, val_fraction: float, options: ReadOptions, by_tail: bool) -> Encoded:
    """Reads, splits and tokenises the documents of a batch.

    name: the tokenizer's. by_tail: take the last val_fraction of every document's tokens for
    validation, not whole documents.
    """
    global _worker_tokenizer
    if _worker_tokenizer is None or _worker_tokenizer.name != name:
        _worker_tokenizer = tokenizer.load(name)
    pieces: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    result = Encoded({}, Counter(), Counter())
    end_of_text = np.array([_worker_tokenizer.end_of_text], dtype=np.uint16)
    documents = (raw for part in batch for raw in read(part, options))
    for kind, raw, file, place, num_bytes, split, is_first, digest, has_nul in documents:
        result.source_bytes += num_bytes
        try:
            text, replaced = parse(kind, raw, options.text_field, options.is_replacing)
        except NotText as error:
            name = {"json": "line", "file": "document at byte", "refused": "document at byte"}.get(kind, "row")
            where = f"{name} {place:,}, " if place else ""
            result.leave_out(file, where, num_bytes, error)
            continue
        result.text_bytes += len(raw)
        result.replaced += replaced
        result.markers += text.count(tokenizer.END_OF_TEXT)
        result.with_nul += has_nul if digest else "\0" in text
        if by_tail:
            tokens = _worker_tokenizer.encode(text)
            cut = len(tokens) - int(len(tokens) * val_fraction)
            parts = {"train": tokens[:cut], "val": tokens[cut:]}
        else:
            is_val = in_validation(digest, val_fraction) if digest else is_validation(text, val_fraction)
            parts = {split or ("val" if is_val else "train"): _worker_tokenizer.encode(text)}
        for split, tokens in parts.items():
            if is_first and (len(tokens) or digest):
                pieces[split].append(end_of_text)
                result.documents[split] += 1
            pieces[split].append(tokens)
    result.tokens = {split: np.concatenate(parts) for split, parts in pieces.items() if parts}
    return result
