"""Files to documents: the bytes of each document, and the text in them.

The parent process cuts the files into parts; a worker reads a part's documents. See
engine/tokens/reading for what reads which file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.tokens.reading import formats, packed, records, sequential, tables, text
from engine.tokens.reading.parts import NotText, Part, Raw, ReadOptions, Span
from engine.tokens.reading.sources import unreadable
from model.files import BadFile

READERS = {"text": text, "lines": records, "rows": tables, "whole": sequential}  # by kind of span
RECORDS = ("json", "record")  # kinds of documents


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields what a file holds from position `start` on, each part with the position after it.

    A position is what the file's reader makes of it; 0 is the begin. Raises BadInput if the file
    cannot be read.
    """
    try:
        if path == sequential.STDIN:
            yield from sequential.standard_input(options)
            return
        suffix, packing = packed.suffixes(path)
        if suffix in formats.TABLES:
            yield from tables.parts(path, options, start)
        elif packing or (suffix == ".json" and not records.is_cut_between_lines(path)):
            yield from sequential.parts(path, options, start)
        else:
            yield from (records if suffix in formats.JSON else text).parts(path, options, start)
    except (BadFile, OSError) as error:
        raise unreadable(path, error) from error


def read(part: Part, options: ReadOptions) -> Iterator[Raw]:
    """Yields the documents of a part. Raises BadInput if its file cannot be read."""
    try:
        if isinstance(part, Raw):
            yield from records.split(part) if part.kind == "lines" else (part,)
        else:
            yield from READERS[part.kind].read(part, options)
    except (BadFile, OSError) as error:
        raise unreadable(Path(part.file), error) from error


def raw_documents(files: Iterable[Path], options: ReadOptions) -> Iterator[Raw]:
    """Yields every document of the files, for `parse`. Raises BadInput if a file cannot be read."""
    for path in files:
        begin = lines = 0  # lines that end before a span
        for part, _ in parts(path, options):
            if isinstance(part, Span) and part.kind == "lines":
                begin, lines = part.start, lines + records.count_lines(path, begin, part.start)
            for raw in read(part, options):
                yield raw._replace(place=raw.place + lines) if raw.place else raw


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
    if kind == "broken":
        raise NotText("not JSON", raw.decode())
    if kind == "null":
        raise NotText("null")
    text, replaced = _decode(raw, is_replacing), 0
    if kind in RECORDS:
        text = _field(text, text_field)
    try:
        if kind in RECORDS or is_replacing:
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
