"""Documents to tokens: the split of each document, its tokens, and counts of what is no text.

Runs in the worker processes of `gpt2 prepare`.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from engine.tokens import fast, tokenizer
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
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


@lru_cache(maxsize=1)
def _encoder(name: str, is_fast: bool) -> fast.BatchEncoder:
    """This worker's encoder, built for its first batch."""
    return fast.batch_encoder(name, is_fast)


def encode_batch(
    batch: list[Part], *, name: str, is_fast: bool, val_fraction: float, options: ReadOptions, by_tail: bool
) -> Encoded:
    """Reads, splits and tokenises the documents of a batch.

    name: the tokenizer's. is_fast: with gigatoken, if it is installed. by_tail: take the last
    val_fraction of every document's tokens for validation, not whole documents.
    Raises fast.Unusable, which names the document, if gigatoken and tiktoken differ.
    """
    texts: list[str] = []
    places: list[str] = []  # of each text, for a message
    result = Encoded({}, Counter(), Counter())
    for kind, raw, file, place, num_bytes, *_ in (raw for part in batch for raw in read(part, options)):
        result.source_bytes += num_bytes
        where = f"{'line' if kind == 'json' else 'row'} {place:,}" if place else ""
        try:
            text, replaced = parse(kind, raw, options.text_field, options.is_replacing)
        except NotText as error:
            result.leave_out(file, f"{where}, " if where else "", num_bytes, error)
            continue
        result.text_bytes += len(raw)
        result.replaced += replaced
        result.markers += text.count(tokenizer.END_OF_TEXT)
        result.with_nul += "\0" in text
        texts.append(text)
        places.append(f"{file}, {where}" if where else file)
    try:
        ids = _encoder(name, is_fast).encode_batch(texts)
    except fast.Unusable as error:
        place = "" if error.document is None else f" in {places[error.document]}"
        raise fast.Unusable(f"{error}{place}") from error
    end_of_text = tokenizer.TOKENIZERS[name].end_of_text
    _split(texts, ids, result, end_of_text=end_of_text, val_fraction=val_fraction, by_tail=by_tail)
    return result


def _split(
    texts: list[str], ids: list[np.ndarray], result: Encoded, *, end_of_text: int, val_fraction: float, by_tail: bool
) -> None:
    """Puts the documents of each split, each after an end-of-text token, into the result."""
    pieces: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    separator = np.array([end_of_text], dtype=np.uint16)
    for text, tokens in zip(texts, ids, strict=True):
        if by_tail:
            cut = len(tokens) - int(len(tokens) * val_fraction)
            parts = {"train": tokens[:cut], "val": tokens[cut:]}
        else:
            parts = {"val" if is_validation(text, val_fraction) else "train": tokens}
        for split, part in parts.items():
            if len(part):
                pieces[split] += [separator, part]
                result.documents[split] += 1
    result.tokens = {split: np.concatenate(parts) for split, parts in pieces.items() if parts}
