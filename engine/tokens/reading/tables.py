"""Tables, .parquet and .arrow: each row of the text's column is a document.

An .arrow file may have the file format or the stream format, as the datasets library writes it.
A worker reads row groups or record batches of moderate size; the parent process streams larger ones.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import BadInput
from engine.tokens.reading import formats
from engine.tokens.reading.parts import Part, Raw, ReadOptions, Span
from model.files import few, open_file

SPAN = 1 << 20  # bytes of text from which a span is long enough
LARGE = 16 << 20  # bytes of text of a row group or record batch that the parent process streams
ROWS = 1024  # that are made Python objects at once
MAGIC = b"ARROW1"  # of the file format


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

    with pyarrow.parquet.ParquetFile(file, buffer_size=SPAN) as parquet:  # else a whole row group is held packed
        _check_column(path, parquet.schema_arrow, name)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        leaves = [groups[0].column(number).path_in_schema for number in range(groups[0].num_columns)] if groups else []
        leaf = leaves.index(name) if groups else 0
        pieces = [(group.num_rows, group.column(leaf).total_uncompressed_size) for group in groups]

        def column(number: int) -> Iterator[Any]:
            batches = parquet.iter_batches(ROWS, row_groups=[number], columns=[name], use_threads=False)
            return (batch.column(0) for batch in batches)

        yield Table(pieces, column)


@contextmanager
def _arrow(file: Any, path: Path, name: str) -> Iterator[Table]:
    import pyarrow

    is_file = file.read(len(MAGIC)) == MAGIC
    open_it = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
    with pyarrow.memory_map(str(path)) as source, open_it(source) as reader:
        schema = reader.schema
    _check_column(path, schema, name)
    only = pyarrow.ipc.IpcReadOptions(included_fields=[schema.names.index(name)], use_threads=False)

    def batches(source: Any) -> Iterator[Any]:
        reader = open_it(source, options=only)
        return map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader

    with pyarrow.memory_map(str(path)) as source:
        pieces = [(batch.num_rows, batch.column(0).nbytes) for batch in batches(source)]
    with pyarrow.memory_map(str(path)) as source:
        numbered = enumerate(batches(source))
        yield Table(pieces, lambda number: [next(batch.column(0) for at, batch in numbered if at == number)])


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
