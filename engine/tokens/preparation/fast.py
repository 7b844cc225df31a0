"""Batches of texts to token ids: GPT-2's with gigatoken where it is installed, else one by one.

tiktoken is the definition. The ids that gigatoken gives must be those of text, and have as many
bytes as the text: every document is checked. Of every batch, at least SAMPLE bytes are encoded with
tiktoken too, at a place that a hash of the batch chooses; the ids that gigatoken gave there must be
the same. A batch with other ids raises Unusable, and `prepare` then begins again without gigatoken.
So data with a known difference is never kept; a difference outside the samples that keeps the
number of bytes is not seen.
gigatoken remembers the ids of every word, without a bound. It is built again when this process has
grown by MOST_GROWTH. It encodes on the calling thread and starts none.
"""

import importlib.metadata
import importlib.util
import mmap
import re
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.tokens import tokenizer
from engine.tokens.tokenizer import Tokenizer

SAMPLE = 4096  # bytes of a batch that are compared, or all of a smaller one: about 0.5 ms of tiktoken's time, in 1 MB
MOST_GROWTH = 128 << 20  # bytes that the process may grow until the encoder is built again
MOST_BYTES = 64 << 20  # bytes of text until then where the system does not tell the size of a process
STATM = Path("/proc/self/statm")

# A single space or line end between printable ASCII characters: GPT-2's pattern always begins a word here.
BOUNDARY = re.compile(rb"(?<=[!-~])[ \n](?=[!-~])")


class Unusable(Exception):
    """Why gigatoken must not be used, and the number of the document in its batch, if it is one's fault."""

    def __init__(self, reason: str, document: int | None = None):
        super().__init__(reason, document)
        self.reason, self.document = reason, document

    def __str__(self) -> str:
        return self.reason


class BatchEncoder(Protocol):
    """Encoder of one worker process."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, (n,) uint16. A lone surrogate becomes U+FFFD."""


def batch_encoder(name: str, is_fast: bool) -> BatchEncoder:
    """The encoder of a tokenizer's name. Raises Unusable if gigatoken is installed and cannot be loaded."""
    plain = tokenizer.load(name)
    return Fast(plain) if _has_fast(name, is_fast) else Plain(plain)


def version(name: str, is_fast: bool) -> str:
    """What batch_encoder encodes with, such as "gigatoken 0.10.0", "tiktoken 0.14.0" or "bytes"."""
    if name != tokenizer.GPT2Tokenizer.name:
        return name
    package = "gigatoken" if _has_fast(name, is_fast) else "tiktoken"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # importable, but not installed
        return package


def _has_fast(name: str, is_fast: bool) -> bool:
    return is_fast and name == tokenizer.GPT2Tokenizer.name and importlib.util.find_spec("gigatoken") is not None


class Plain:
    """A tokenizer, text by text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self._tokenizer.encode(text) for text in texts]


class Fast:
    """gigatoken, compared with tiktoken on a sample of every batch. Raises Unusable where they differ."""

    def __init__(self, plain: Tokenizer):
        self._plain = plain
        self._lengths = plain.byte_lengths()
        self._build()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        contents = [_utf8(text) for text in texts]
        ids = []
        for number, content in enumerate(contents):
            try:
                ids.append(self._encoder.encode(content))
            except BaseException as error:  # a panic of its own is no Exception
                if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                    raise
                raise Unusable(f"gigatoken failed ({error!r})", number) from error
        ids = self._checked(contents, ids)
        self._compare(contents, ids)
        self._bound_memory(sum(map(len, contents)))
        return ids

    def _build(self) -> None:
        self._encoder: Any = None  # the old one's memory is free before the new one is built
        try:
            self._encoder = _load()
        except Exception as error:
            raise Unusable(f"gigatoken cannot be loaded ({error!r})") from error
        self._size, self._bytes = _process_bytes(), 0

    def _bound_memory(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        now = _process_bytes()
        if self._bytes > MOST_BYTES if now is None else now - self._size > MOST_GROWTH:
            self._build()

    def _checked(self, contents: list[bytes], ids: list[np.ndarray]) -> list[np.ndarray]:
        """The ids as uint16, if each is a token of text and those of a document have its number of bytes."""
        if not ids:
            return []
        sizes, joined = np.array([len(one) for one in ids]), np.concatenate(ids)
        ends, num_bytes, has_ids = np.cumsum(sizes), np.zeros(len(ids), np.int64), sizes > 0
        if joined.max(initial=0) >= self._plain.end_of_text:
            number = int(np.searchsorted(ends, (joined >= self._plain.end_of_text).argmax(), side="right"))
            raise Unusable("gigatoken gave a token that no text has", number)
        joined = joined.astype(np.uint16)
        if len(joined):
            num_bytes[has_ids] = np.add.reduceat(self._lengths.take(joined), (ends - sizes)[has_ids], dtype=np.int64)
        is_other = num_bytes != [len(content) for content in contents]
        if is_other.any():
            raise Unusable("gigatoken gave tokens of more or fewer bytes than the text", int(is_other.argmax()))
        return [joined[begin:end] for begin, end in pairwise([0, *ends.tolist()])]

    def _compare(self, contents: list[bytes], ids: list[np.ndarray]) -> None:
        """Compares SAMPLE bytes from one place on, each byte of the batch being as likely as any other."""
        ends = np.cumsum([len(content) for content in contents])
        if not len(ends) or not ends[-1]:
            return
        place = zlib.crc32(repr([len(one) for one in ids]).encode()) % int(ends[-1])
        first = int(np.searchsorted(ends, place, side="right"))
        place, compared = place - int(ends[first]) + len(contents[first]), 0
        for number in (*range(first, len(ids)), *range(first)):
            if contents[number] and not self._agrees(contents[number], ids[number], place):
                raise Unusable("gigatoken gave other tokens than tiktoken", number)
            place, compared = 0, compared + len(contents[number])
            if compared >= SAMPLE:
                break

    def _agrees(self, content: bytes, ids: np.ndarray, place: int) -> bool:
        """Whether the ids near a byte of the text are tiktoken's."""
        begin, end = 0, len(content)
        if len(content) > 2 * SAMPLE:
            if cut := BOUNDARY.search(content, place, place + SAMPLE):
                begin = cut.start()
            if cut := BOUNDARY.search(content, begin + SAMPLE, begin + 2 * SAMPLE):
                end = cut.start()
        if end - begin > 2 * SAMPLE:  # no place to cut at: a piece is encoded for itself
            piece = content[begin : begin + SAMPLE].decode(errors="ignore")
            return np.array_equal(self._encoder.encode(piece.encode()), self._plain.encode(piece))
        ends = np.cumsum(self._lengths.take(ids), dtype=np.int64)
        if not len(ends) or ends[-1] != len(content):
            return False
        first, last = np.searchsorted(ends, [begin, end], side="right")
        return np.array_equal(ids[first:last], self._plain.encode(content[begin:end].decode()))


def _load() -> Any:
    """gigatoken's encoder of the packaged vocabulary. It knows no special token, so all is text."""
    from gigatoken import Tokenizer as Gigatoken

    return Gigatoken.from_tiktoken(tokenizer.VOCABULARY, "gpt2")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _process_bytes() -> int | None:
    """Resident memory of this process, or None where the system does not tell."""
    try:
        return int(STATM.read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None
