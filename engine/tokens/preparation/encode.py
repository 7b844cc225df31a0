"""Documents to tokens: the split of each document, its tokens, and counts of what is no text.

Runs in the worker processes of `gpt2 prepare`.
"""

import hashlib
from functools import lru_cache

import numpy as np

from engine.tokens import tokenizer
from engine.tokens.preparation import fast
from engine.tokens.preparation.account import DIGEST, IS_FIRST, IS_VAL, TOKENS, WITH_NUL, Encoded, Loss, lines_before
from engine.tokens.reading.cuts import LONG, SPLIT_HASH
from engine.tokens.reading.documents import parse, read
from engine.tokens.reading.parts import UNITS, NotText, Part, ReadOptions


class Difference(fast.Unusable):
    """fast.Unusable of a document, whose line is counted from the begin of its span until it is located."""

    def __init__(self, reason: str, document: Loss):
        super().__init__(reason)
        self.args = reason, document  # of which a copy is made in the parent process
        self.document = document

    def locate(self) -> str:
        """The reason and the document. Raises BadInput if its file cannot be read."""
        found = self.document.locate()
        return f"{self.reason} in {found.file}" + (f", {found.unit} {found.place:,}" if found.place else "")


def split_digest(content: bytes) -> bytes:
    """Digest of a document's text that decides its split, 8 bytes. A text of over LONG bytes has no other."""
    return hashlib.blake2b(content, digest_size=SPLIT_HASH).digest()


def in_validation(digest: bytes, val_fraction: float) -> bool:
    """Whether the document of this split_digest is in the validation split: 64-bit hash / 2^64 < val_fraction."""
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def full_digest(content: bytes) -> bytes:
    """Digest of a document's text, 16 bytes: documents of equal digests are duplicates."""
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


@lru_cache(maxsize=1)
def encoder(name: str, is_fast: bool) -> fast.BatchEncoder:
    """The encoder of this process, built once."""
    return fast.batch_encoder(name, is_fast)


def encode_batch(
    batch: list[Part], *, name: str, is_fast: bool, val_fraction: float, options: ReadOptions, dedup: bool
) -> Encoded:
    """Reads and tokenises the documents of a batch, and decides the split of those that have none.

    name: the tokenizer's. is_fast: with gigatoken, if it is installed. dedup: digests too. Raises
    Difference if gigatoken and tiktoken differ.
    """
    texts, rows, digests, places, result = [], [], [], [], Encoded({}, _table([]))
    for part, raw in ((one, raw) for one in batch for raw in read(one, options)):
        result.source_bytes += raw.num_bytes
        try:
            text, replaced = parse(raw.kind, raw.content, options.text_field, options.is_replacing)
        except NotText as error:
            result.leave_out(part, raw, error)
            continue
        content = text.encode("utf-8")
        digest = raw.digest or split_digest(content)
        split = raw.split or part.split or ("val" if in_validation(digest, val_fraction) else "train")
        markers, with_nul = text.count(tokenizer.END_OF_TEXT), raw.has_nul if raw.digest else "\0" in text
        rows.append((split == "val", raw.is_first, 0, len(content), replaced, markers, with_nul))
        texts.append(text)
        places.append((raw.file, UNITS.get(raw.kind, "row"), raw.place, lines_before(part)))
        if dedup and raw.is_first:
            digests.append(full_digest(content) if len(content) <= LONG and not raw.digest else digest.ljust(DIGEST))
    try:
        ids = encoder(name, is_fast).encode_batch(texts)
    except fast.Unusable as error:
        if error.document is None:
            raise
        file, unit, place, before = places[error.document]
        raise Difference(error.reason, Loss(file, 0, 1, "", unit, place, before)) from error
    result.rows = _table(rows)
    result.rows[:, TOKENS] = [len(one) for one in ids]
    result.rows[:, TOKENS] += result.rows[:, IS_FIRST]
    result.tokens = _by_split(ids, result.rows, tokenizer.TOKENIZERS[name].end_of_text)
    result.digests = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2) if dedup else None
    return result


def _table(rows: list[tuple]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, WITH_NUL + 1)


def _by_split(ids: list[np.ndarray], rows: np.ndarray, end_of_text: int) -> dict[str, np.ndarray]:
    """The tokens of each split that has some, with an end-of-text token before each document."""
    pieces: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    separator = np.array([end_of_text], dtype=np.uint16)
    for one, is_val, is_first in zip(ids, rows[:, IS_VAL].tolist(), rows[:, IS_FIRST].tolist(), strict=True):
        pieces["val" if is_val else "train"] += [separator, one] if is_first else [one]
    return {split: np.concatenate(parts) for split, parts in pieces.items() if parts}
