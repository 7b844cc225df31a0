"""Files to documents: the bytes of each document, the text in them, and an account of what is no text.

A .txt, .md or .py file is one document. Each line of a .jsonl file is one, and so is each row of a
.parquet file.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadInput
from engine.tokens import formats
from engine.tokens.sources import unreadable
from model.files import BadFile, few, open_file

MOST_FILES = 3  # files that are named of those that lose most

# Kind ("file", "json", "row", "null", "foreign"), bytes, file, line or row from 1 (0: the whole file),
# and the bytes of the file that it stands for.
Raw = tuple[str, bytes, str, int, int]


class NotText(Exception):
    """Why a document is left out: a reason to count, such as "not UTF-8", and where or what."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} {detail}".rstrip())
        self.reason = reason


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


def raw_documents(files: Iterable[Path], text_field: str) -> Iterator[Raw]:
    """Yields every document, for `parse`. Raises BadInput if a file cannot be read."""
    for path in files:
        try:
            if path.suffix.lower() == ".parquet":
                yield from _rows(path, text_field)
                continue
            with open_file(path) as file:
                head = file.read(formats.HEAD)
                if (found := formats.foreign(head, path, file)) is not None:
                    yield "foreign", found.encode("utf-8", "replace"), str(path), 0, os.fstat(file.fileno()).st_size
                elif path.suffix.lower() == ".jsonl":
                    file.seek(0)
                    yield from (
                        ("json", line, str(path), number, len(line))
                        for number, line in enumerate(file, 1)
                        if line.strip()
                    )
                else:
                    file.seek(0)
                    content = file.read()  # in one piece: two would be held twice
                    yield "file", content, str(path), 0, len(content)
        except (BadFile, OSError) as error:
            raise unreadable(path, error) from error


def _rows(path: Path, column: str) -> Iterator[Raw]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(f"prepare: {path} needs pyarrow; install it with: pip install pyarrow") from error
    with open_file(path) as file:
        try:
            size, number = os.fstat(file.fileno()).st_size, 0
            with pyarrow.parquet.ParquetFile(file) as parquet:
                _check_column(path, parquet.schema_arrow, column)
                rows = max(parquet.metadata.num_rows, 1)
                for batch in parquet.iter_batches(batch_size=1024, columns=[column]):
                    for value in _as_bytes(batch.column(0)).to_pylist():
                        share = size * (number + 1) // rows - size * number // rows
                        number += 1
                        yield "null" if value is None else "row", value or b"", str(path), number, share
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BadInput(f"{path}: must be a parquet file, got {why}; copy it again") from error


def _check_column(path: Path, schema: Any, column: str) -> None:
    """Raises BadInput if the column is missing or holds no text."""
    texts = [f"{one.name} ({one.type})" for one in schema if _is_text(one.type)]
    if column in schema.names:
        kind = schema.types[schema.names.index(column)]
        if _is_text(kind) or str(kind) == "null":
            return
        problem = f"column {column} must hold text, got {_short(kind)}"
    else:
        columns = [f"{one.name} ({_short(one.type)})" for one in schema]
        problem = f"must have a column {column}, got {few(columns, formats.MOST_NAMED)}"
    way = "name one with --text-field" if texts else "write the text into a column of strings"
    raise BadInput(f"{path}: {problem}; columns with text: {few(texts, formats.MOST_NAMED) or 'none'}; {way}")


def _short(kind: Any) -> str:
    return text if len(text := str(kind)) <= 80 else f"{text[:77]}..."


def _is_text(kind: Any) -> bool:
    import pyarrow

    return str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) in (
        *("string", "large_string", "string_view"),
        *("binary", "large_binary", "binary_view"),
    )


def _as_bytes(values: Any) -> Any:
    """An arrow array of text as one of bytes, which need not be UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kinds = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}  # the last from 16 on
    name = kinds.get(str(values.type))
    return values if name is None else values.cast(getattr(pyarrow, name)())


def parse(kind: str, raw: bytes, text_field: str, is_replacing: bool = False) -> tuple[str, int]:
    """(text, characters put in place of bad bytes) of a document. Raises NotText.

    kind, raw: as from raw_documents. is_replacing: U+FFFD for each byte that is not UTF-8, unless
    those are more than a quarter of the text.
    """
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
