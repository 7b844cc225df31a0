"""Tables: row groups and record batches are read by workers, and each row is a document."""

from pathlib import Path

import pytest
from corpora import files, run, texts
from test_record_files import OPTIONS, after_each_part, read

from engine.errors import BadInput
from engine.tokens.reading import documents, tables
from engine.tokens.reading.parts import ReadOptions, Span

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

ROWS = [None if i % 10 == 7 else "" if i % 10 == 3 else f"row {i} é" for i in range(57)]
EXPECTED = [("null" if row is None else row or "empty", number) for number, row in enumerate(ROWS, 1)]


def write(path: Path, column, rows: int = 10, stream: bool = False) -> Path:
    """Writes a table in pieces of `rows` rows, with another column before the text."""
    table = pyarrow.table({"id": list(range(len(column))), "text": column})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows)
        return path
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


KINDS = [("x.parquet", False), ("x.arrow", False), ("x.ARROW", True)]


@pytest.mark.parametrize(("span", "large"), [(1 << 20, 1 << 20), (1, 1 << 20), (250, 1 << 20), (1, 1)])
@pytest.mark.parametrize(("name", "stream"), KINDS, ids=["parquet", "arrow file", "arrow stream"])
def test_rows_are_the_same_documents_with_the_same_numbers_wherever_a_table_is_cut(
    tmp_path, monkeypatch, name, stream, span, large
):
    monkeypatch.setattr(tables, "SPAN", span)
    monkeypatch.setattr(tables, "LARGE", large)
    monkeypatch.setattr(tables, "ROWS", 4)
    path = write(tmp_path / name, pyarrow.array(ROWS), stream=stream)
    assert read(path) == EXPECTED
    found = [part for part, _ in documents.parts(path, OPTIONS)]
    assert len(found) == (len(ROWS) if large == 1 else {1 << 20: 1, 1: 6}.get(span, len(found)))
    assert {isinstance(part, Span) for part in found} == {large > 1}
    assert sum(part.num_bytes for part in found) == path.stat().st_size
    assert all(left == right for left, right in after_each_part(path))
    for start in (3, 25, 57):  # also within a row group or record batch
        rows = [raw.place for part, _ in documents.parts(path, OPTIONS, start) for raw in documents.read(part, OPTIONS)]
        assert rows == list(range(start + 1, 58))


TEXTS = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary"]


@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_of_text_is_read_from_arrow(tmp_path, kind):
    column = pyarrow.array(ROWS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    for name, stream in KINDS[1:]:
        assert read(write(tmp_path / name, column, stream=stream)) == EXPECTED


def test_a_column_of_arrow_that_is_no_text_is_refused_with_its_type(tmp_path):
    for values, kind in (([["a"], ["b"]], "list<item: string>"), ([{"a": "b"}] * 2, "struct<a: string>")):
        with pytest.raises(BadInput, match=f"column text must hold text, got {kind}; columns with text: none"):
            read(write(tmp_path / "x.arrow", values))
    with pytest.raises(
        BadInput, match=r"must have a column body, got id \(int64\), text \(string\); columns with text:"
    ):
        read(write(tmp_path / "x.arrow", ROWS), ReadOptions("body"))


@pytest.mark.parametrize(("name", "stream"), KINDS, ids=["parquet", "arrow file", "arrow stream"])
def test_a_table_that_is_damaged_is_a_sentence(tmp_path, name, stream):
    content = write(tmp_path / name, pyarrow.array(ROWS), stream=stream).read_bytes()
    for cut in (0, 3, 50, len(content) // 2):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(BadInput, match=rf"{name}: must be (a parquet|an Arrow) file, got .*; copy it again"):
            read(tmp_path / name)


def test_workers_read_tables_and_make_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SPAN", 100)
    (tmp_path / "in").mkdir()
    for name, stream in KINDS:
        write(tmp_path / "in" / name, ROWS, 10, stream)
    for workers in (1, 2):
        run(tmp_path / "in", tmp_path / str(workers) / "out", workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    written = [text for split in ("train", "val") for text in texts(tmp_path / "1" / "out", split)]
    assert sorted(written) == sorted([row for row in ROWS if row] * 3)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_an_arrow_stream_that_is_cut_between_batches_is_refused(tmp_path, is_legacy):
    table = pyarrow.table({"text": ["no zeros"] * 30})
    options = pyarrow.ipc.IpcWriteOptions(use_legacy_format=is_legacy)
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=10)
    assert len(read(tmp_path / "x.arrow")) == 30
    content = (tmp_path / "x.arrow").read_bytes()
    with pyarrow.memory_map(str(tmp_path / "x.arrow")) as source:
        stream, begins = pyarrow.ipc.open_stream(source), []
        for _ in stream:
            begins.append(source.tell())
    for begin, rows in zip(begins, (10, 20, 30), strict=True):
        (tmp_path / "x.arrow").write_bytes(content[:begin])
        with pytest.raises(BadInput, match=f"mark of an Arrow stream's end, got none after {rows} rows.*copy it again"):
            read(tmp_path / "x.arrow")


@pytest.mark.parametrize(("name", "stream"), KINDS, ids=["parquet", "arrow file", "arrow stream"])
def test_each_span_reads_its_own_batches_and_no_footer_again(tmp_path, monkeypatch, name, stream):
    monkeypatch.setattr(tables, "SPAN", 1)
    path = write(tmp_path / name, pyarrow.array(ROWS), stream=stream)
    layouts, batches = [], []
    for function, calls in ((tables._layout, layouts), (tables._metadata, layouts)):
        original = function.__wrapped__
        counted = tables.lru_cache(maxsize=1)(lambda *key, to=original, calls=calls: calls.append(key) or to(*key))
        monkeypatch.setattr(tables, function.__name__, counted)
    reader = tables._reader
    monkeypatch.setattr(tables, "_reader", lambda *rest: batches.append(rest) or reader(*rest))
    assert read(path) == EXPECTED
    assert len(layouts) == 1
    assert len(batches) == {"x.parquet": 0, "x.arrow": 1 + 7, "x.ARROW": 1}[name]  # a stream is read from its spans
    path.unlink()
    write(path, pyarrow.array(["another"]), stream=stream)
    assert read(path) == [("another", 1)]
