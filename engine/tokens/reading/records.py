"""Files of records: each line of a .jsonl file is a document, and each row of a .parquet file."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from engine.errors import BadInput
from engine.tokens import formats
from engine.tokens.reading.parts import Part, Raw, ReadOptions, Span
from model.files import few, open_file

SUFFIXES = (".jsonl", ".parquet")


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields the parts of a file of records from position `start` on, each with the position after it.

    A position is a byte of a .jsonl file, of the text in it if it is packed, and a row otherwise.
    Raises BadInput, BadFile or OSError.
    """
    if path.suffix.lower() == ".parquet":
        for number, raw in enumerate(islice(_rows(path, options.text_field), start, None), start + 1):
            yield raw, number
        return
    with open_file(path) as file:
        head = file.read(formats.HEAD)
        if (found := formats.foreign(head, path, file)) is not None:
            size = os.fstat(file.fileno()).st_size
            yield Raw("foreign", found.encode("utf-8", "replace"), str(path), 0, size), max(size, 1)
            return
        file.seek(0)
        position = 0
        for number, line in enumerate(file, 1):
            position += len(line)
            if line.strip() and position > start:
                yield Raw("json", line, str(path), number, len(line)), position


def read(span: Span, options: ReadOptions) -> Iterator[Raw]:
    """Yields the documents of a span. Raises BadInput, BadFile or OSError."""
    raise NotImplementedError(span.kind)


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
                        yield Raw("null" if value is None else "row", value or b"", str(path), number, share)
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
