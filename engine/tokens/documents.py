"""Files to documents: the bytes of each document, the text in them, and an account of what is no text.

The parent process cuts the files into parts; a worker reads a part's documents. See
engine/tokens/reading for what reads which file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.tokens import formats
from engine.tokens.reading import records, text
from engine.tokens.reading.parts import NotText, Part, Raw, ReadOptions
from engine.tokens.sources import unreadable
from model.files import BadFile

MOST_FILES = 3  # files that are named of those that lose most


@dataclass
class Loss:
    """Documents of one file that are left out."""

    file: str
    bytes: int
    documents: int
    first: str  # where the first of them is, and why


@dataclass
class Losses:
    """Account of all documents that are left out: their bytes, and the files that lose most."""

    bytes: int = 0
    files: list[Loss] = field(default_factory=list)  # those that lose most, without the last
    last: Loss | None = None

    def add(self, loss: Loss) -> None:
        """Adds a loss. Those of one file must follow each other. One of no bytes is none."""
        if not loss.bytes:
            return
        self.bytes += loss.bytes
        if self.last is None or self.last.file != loss.file:
            self._keep_largest()
            self.last = loss
        else:
            self.last.bytes += loss.bytes
            self.last.documents += loss.documents

    def _keep_largest(self) -> None:
        files = [*self.files, self.last] if self.last is not None else self.files
        self.files = sorted(files, key=lambda one: -one.bytes)[:MOST_FILES]  # stable: the first of equals stays
        self.last = None

    def largest(self) -> list[dict[str, Any]]:
        """The files that lose most, for the manifest."""
        self._keep_largest()
        return [{"file": one.file, "bytes": one.bytes, "first": one.first} for one in self.files]


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields what a file holds from position `start` on, each part with the position after it.

    A position is what the file's reader makes of it; 0 is the begin. Raises BadInput if the file
    cannot be read.
    """
    reader = records if path.suffix.lower() in records.SUFFIXES else text
    try:
        yield from reader.parts(path, options, start)
    except (BadFile, OSError) as error:
        raise unreadable(path, error) from error


def read(part: Part, options: ReadOptions) -> Iterator[Raw]:
    """Yields the documents of a part. Raises BadInput if its file cannot be read."""
    if isinstance(part, Raw):
        yield part
        return
    try:
        yield from (text if part.kind == "text" else records).read(part, options)
    except (BadFile, OSError) as error:
        raise unreadable(Path(part.file), error) from error


def raw_documents(files: Iterable[Path], options: ReadOptions) -> Iterator[Raw]:
    """Yields every document of the files, for `parse`. Raises BadInput if a file cannot be read."""
    for path in files:
        for part, _ in parts(path, options):
            yield from read(part, options)


def parse(kind: str, raw: bytes, text_field: str, is_replacing: bool = False) -> tuple[str, int]:
    """(text, characters put in place of bad bytes) of a document. Raises NotText.

    kind, raw: as from raw_documents. is_replacing: U+FFFD for each byte that is not UTF-8, unless
    those are more than a quarter of the text. A part of a long text may be white space alone, or bad
    bytes: the whole text has been checked.
    """
    if kind == "refused":
        raise NotText(*raw.decode().split("\n", 1))
    if kind == "foreign":
        raise NotText("of another format", f"({raw.decode()})")
    if kind == "null":
        raise NotText("null")
    text, replaced = _decode(raw, is_replacing), 0
    if kind == "json":
        text = _field(text, text_field)
    try:
        if kind == "json" or is_replacing:
            text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON escapes a lone surrogate, and _decode makes one of a bad byte
        if not is_replacing:
            raise NotText("not UTF-8", f"at character {error.start:,} of the field, a lone surrogate") from error
        text, replaced = re.subn("[\ud800-\udfff]", "\ufffd", text)
    if kind == "part":
        return text, replaced
    if 4 * replaced > len(text):
        raise NotText("mostly not UTF-8", f"in {replaced:,} of {len(text):,} characters")
    if not text.strip():
        raise NotText("empty")
    return text, replaced


def _decode(raw: bytes, is_replacing: bool) -> str:
    try:
        return raw.decode("utf-8", "surrogateescape" if is_replacing else "strict").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at = f"at byte {error.start:,} of {len(raw):,} (0x{raw[error.start]:02x})"
        raise NotText("not UTF-8", at) from error


def _field(line: str, name: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise NotText("not JSON", f"at character {error.pos:,} ({error.msg.removesuffix(' at')})") from error
    except (ValueError, RecursionError) as error:
        raise NotText("not JSON", "(too many digits or brackets)") from error
    if isinstance(record, dict) and name in record and record[name] is None:
        raise NotText("null")
    if not isinstance(record, dict) or not isinstance(record.get(name), str):
        raise NotText(f'no text field "{name}"', f"(fields with text: {formats.text_fields(record)})")
    return record[name]
