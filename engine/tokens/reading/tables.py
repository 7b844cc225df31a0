"""Tables, .parquet and .arrow: each row of the text's column is a document.

An .arrow file may have the file format or the stream format, as the datasets library writes it.
A worker reads row groups or record batches of moderate size; the parent process streams larger ones.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import BadInput
from engine.tokens.reading import formats
from engine.tokens.reading.parts import Part, Raw, ReadOptions, Span
from model.files import few, open_file

SPAN = 1 << 20  # bytes of text from which a span is long enough
LARGE = 16 << 20  # bytes of text of a row group or record batch that the parent process streams
ROWS = 128  # that are made Python objects at once
MAGIC = b"ARROW1"  # of the file format
MARK, END = b"\xff" * 4, bytes(4)  # before each message of a stream since Arrow 0.15; in place of one at its end


class Table(NamedTuple):
    """The column of text of a table."""

    pieces: list[tuple[int, int]]  # rows, and bytes of text, of each row group or record batch
    column: Any  # number of a piece -> arrow arrays, its rows; called with numbers that rise


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields the parts of a table from row `start` on, each with the row after it.

    Raises BadInput, BadFile or OSError.
    """
    size = os.stat(path).st_size
    with _open(path, options.text_field) as table:
        total = max(sum(rows for rows, _ in table.pieces), 1)
        begin, end, held = start, 0, 0
        for number, (rows, num_bytes) in enumerate(table.pieces):
            first, end = end, end + rows
            if end <= start:
                continue
            is_large = num_bytes > LARGE
            if held and (is_large or held >= SPAN):
                yield _span(path, begin, first, size, total), first
                begin, held = first, 0
            if is_large:
                for raw in _rows(table.column(number), path, first, size, total):
                    if raw.place > start:
                        yield raw, raw.place
                begin = end
            else:
                held += max(num_bytes, 1)
        if held:
            yield _span(path, begin, end, size, total), end


def _span(path: Path, begin: int, end: int, size: int, total: int) -> Span:
    return Span("rows", str(path), begin, end, size * end // total - size * begin // total)


def read(span: Span, options: ReadOptions) -> Iterator[Raw]:
    """Yields the rows of a span. Raises BadInput, BadFile or OSError."""
    path, end = Path(span.file), 0
    size = os.stat(path).st_size
    with _open(path, options.text_field) as table:
        total = max(sum(rows for rows, _ in table.pieces), 1)
        for number, (rows, _) in enumerate(table.pieces):
            first, end = end, end + rows
            if first < span.end and end > span.start:
                skipped = max(span.start - first, 0)
                yield from islice(_rows(table.column(number), path, first, size, total), skipped, span.end - first)


def _rows(column: Any, path: Path, first: int, size: int, total: int) -> Iterator[Raw]:
    """The rows of arrow arrays, of which the first has the number `first`, from 0.

    size, total: bytes and rows of the file.
    """
    number = first
    for array in column:
        for begin in range(0, len(array), ROWS):
            for value in _as_bytes(array.slice(begin, ROWS)).to_pylist():
                share = size * (number + 1) // total - size * number // total
                number += 1
                yield Raw("null" if value is None else "row", value or b"", str(path), number, share)


@contextmanager
def _open(path: Path, column: str) -> Iterator[Table]:
    """Opens a table. What is wrong with it, there or later, is BadInput."""
    try:
        import pyarrow
    except ImportError as error:
        raise BadInput(f"prepare: {path} needs pyarrow; install it with: pip install pyarrow") from error
    kind = "a parquet file" if path.suffix.lower() == ".parquet" else "an Arrow file"
    with open_file(path) as file:
        try:
            with (_parquet if kind == "a parquet file" else _arrow)(file, path, column) as table:
                yield table
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BadInput(f"{path}: must be {kind}, got {why}; copy it again") from error


@contextmanager
def _parquet(file: Any, path: Path, name: str) -> Iterator[Table]:
    import pyarrow.parquet

    known = _metadata(path, *_version(file))
    # without a buffer a whole row group is held packed
    with pyarrow.parquet.ParquetFile(file, metadata=known, buffer_size=SPAN) as parquet:
        _check_column(path, parquet.schema_arrow, name)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        leaves = [groups[0].column(number).path_in_schema for number in range(groups[0].num_columns)] if groups else []
        leaf = leaves.index(name) if groups else 0
        pieces = [(group.num_rows, group.column(leaf).total_uncompressed_size) for group in groups]

        def column(number: int) -> Iterator[Any]:
            batches = parquet.iter_batches(ROWS, row_groups=[number], columns=[name], use_threads=False)
            return (batch.column(0) for batch in batches)

        yield Table(pieces, column)


def _version(file: Any) -> tuple[int, int]:
    """Size and time of the last change. The layout of a file is kept for its next span by these."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _metadata(path: Path, size: int, changed: int) -> Any:
    """Footer of a parquet file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path)


@contextmanager
def _arrow(file: Any, path: Path, name: str) -> Iterator[Table]:
    import pyarrow

    is_file = file.read(len(MAGIC)) == MAGIC
    schema, pieces, begins = _layout(path, name, is_file, *_version(file))
    with pyarrow.memory_map(str(path)) as source:
        if is_file or "dictionary<" in str(schema):
            reader = _reader(source, is_file, schema.names.index(name))
            numbered = () if is_file else enumerate(reader)

            def column(number: int) -> list[Any]:
                if is_file:
                    return [reader.get_batch(number).column(0)]
                return [next(batch.column(0) for at, batch in numbered if at == number)]
        else:

            def column(number: int) -> list[Any]:
                source.seek(begins[number])
                batch = pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(source), schema)
                return [batch.column(schema.names.index(name))]

        yield Table(pieces, column)


def _reader(source: Any, is_file: bool, column: int) -> Any:
    """Reader of one column of an Arrow file or stream."""
    import pyarrow

    only = pyarrow.ipc.IpcReadOptions(included_fields=[column], use_threads=False)
    return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source, options=only)


@lru_cache(maxsize=1)
def _layout(path: Path, name: str, is_file: bool, size: int, changed: int) -> tuple[Any, list[tuple[int, int]], list]:
    """Schema, pieces, and the bytes of a stream at which they begin. Compressed batches are unpacked for this."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        schema = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).schema
    _check_column(path, schema, name)
    pieces, begins = [], []
    with pyarrow.memory_map(str(path)) as source:
        reader = _reader(source, is_file, schema.names.index(name))
        if is_file:
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            begins.append(source.tell())
            batches = reader
        for batch in batches:
            pieces.append((batch.num_rows, batch.column(0).nbytes))
            begins.append(source.tell())
        if not is_file:
            _check_end(path, source, begins[-1], sum(rows for rows, _ in pieces))
    return schema, pieces, begins


def _check_end(path: Path, source: Any, place: int, rows: int) -> None:
    """Raises BadInput if a stream has no mark of its end: pyarrow takes one that is cut there for a shorter one."""
    source.seek(0)
    mark = MARK + END if source.read(len(MARK)) == MARK else END
    source.seek(place)
    if source.read(len(mark)) != mark:
        raise BadInput(
            f"{path}: must end with the mark of an Arrow stream's end, got none after {rows:,} rows, as if it were cut "
            "off; copy it again, or if these are all rows, write them anew and close the writer"
        )


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
