"""Sources: text is kept as it is; anything else is left out and counted."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from corpora import documents, run, texts, write_library

from engine.errors import BadInput
from engine.tokens import prepare, tokenizer
from engine.tokens.reading import sources
from engine.tokens.reading.documents import raw_documents
from engine.tokens.reading.parts import ReadOptions


@pytest.fixture
def source(tmp_path) -> Path:
    return write_library(tmp_path / "library")


def test_parquet_rows_are_documents(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.delattr(pyarrow, "binary_view", raising=False)  # as before version 16
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i}" for i in range(30)] + [None, ""]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": rows, "id": list(range(32))}), path)
    manifest = run(path, tmp_path / "out")
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(rows[:30])
    assert manifest["skipped"] == {"empty": 1, "null": 1}


def test_bad_sources_are_sentences(tmp_path):
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    (tmp_path / "empty").mkdir()
    for name, sentence in (
        ("nowhere", "must be a file, a directory, stdlib, - or hf:OWNER/NAME, got .*nowhere"),
        (
            "x.pdf",
            "a source must end in .txt, .*, .arrow, .* with .gz, .*, got .*x.pdf, which holds a PDF document",
        ),
        ("empty", "the sources must hold files in .txt, .*, got none"),
    ):
        with pytest.raises(BadInput, match=sentence):
            run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_standard_library_is_a_source_without_its_tests():
    paths = sources.find(["stdlib"]).files
    parts = {part for path in paths for part in path.relative_to(Path(os.__file__).parent).parts[:-1]}
    assert len(paths) > 300
    assert "json" in parts
    assert not parts & {"test", "tests", "site-packages", "__pycache__", "idle_test"}
    assert paths == sources.find(["stdlib"]).files


# ---- Parquet -------------------------------------------------------------------------------------------------------

COLUMNS = [
    ("string", ["words", "more words", None], None),
    ("large_string", ["words", "more words", None], None),
    ("string_view", ["words", "more words", None], None),
    ("binary", [b"words", b"\xff", None], {"not UTF-8": 1}),
    ("dictionary", ["words", "more words", None], None),
    ("int64", [1, 2, 3], "int64"),
    ("list", [["a"], ["b"], []], r"list<element: string>"),
    ("struct", [{"text": "a"}] * 3, r"struct<text: string>"),
]


@pytest.mark.parametrize(("kind", "values", "outcome"), COLUMNS, ids=[one[0] for one in COLUMNS])
def test_a_column_is_text_or_a_sentence_with_its_type(tmp_path, kind, values, outcome):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    column = pyarrow.array(values)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind not in ("list", "struct"):
        column = column.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"body": column, "id": [1, 2, 3]}), path)
    if isinstance(outcome, str):
        with pytest.raises(BadInput, match=f"x.parquet: column body must hold text, got {outcome}; columns with text"):
            run(path, tmp_path / "out", text_field="body")
        return
    manifest = run(path, tmp_path / "out", text_field="body", val_fraction=0.6)
    assert manifest["skipped"] == {"null": 1} | (outcome or {})
    assert manifest["source_bytes"] == path.stat().st_size
    with pytest.raises(BadInput, match=r"a column text, got body \(.*\), id \(int64\); columns with text: body \("):
        run(path, tmp_path / "other")


def test_a_column_that_is_not_utf_8_is_left_out_by_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.array([f"row {i}".encode() for i in range(20)] + [b"caf\xe9", b"more"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), rows.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "x.parquet")
    manifest = run(tmp_path / "x.parquet", tmp_path / "out")
    assert manifest["left_out"]["files"][0]["first"] == "row 21, not UTF-8 at byte 3 of 4 (0xe9)"
    run(tmp_path / "x.parquet", tmp_path / "two", on_bad_text="replace")
    assert "caf\ufffd" in texts(tmp_path / "two", "train") + texts(tmp_path / "two", "val")
    content = (tmp_path / "x.parquet").read_bytes()
    for cut in (0, 3, 100, len(content) - 20):
        (tmp_path / "x.parquet").write_bytes(content[:cut])
        with pytest.raises(BadInput, match="must be a parquet file"):
            run(tmp_path / "x.parquet", tmp_path / "cut")


def test_a_file_is_held_in_memory_once(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"x" * 4_000_000)
    tracemalloc.start()
    (document,) = raw_documents([tmp_path / "x.txt"], ReadOptions())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(document[1]) == 4_000_000
    assert peak < 5_000_000


# ---- Bad text -----------------------------------------------------------------------------------------------------

BAD_FILES = [
    pytest.param("bad.txt", b"caf\xe9", "not UTF-8", id="latin-1"),
    pytest.param("bad.txt", b"ab\xed\xa0\x80", "not UTF-8", id="a surrogate as UTF-8"),
    pytest.param("bad.py", "é".encode("utf-16"), "of another format", id="UTF-16"),
    pytest.param("bad.jsonl", b"\x1f\x8b\x08\n{}\n{}", "of another format", id="gzip data"),
    pytest.param("bad.txt", b"", "empty", id="an empty file"),
    pytest.param("bad.md", b" \n\t\r\n", "empty", id="white space only"),
    pytest.param("bad.txt", b"\xef\xbb\xbf", "empty", id="a byte-order mark only"),
    pytest.param("bad.jsonl", b'{"text": "half', "not JSON", id="malformed JSON"),
    pytest.param("bad.jsonl", b'{"a": ' + b"[" * 100_000, "not JSON", id="JSON nested too deep"),
    pytest.param("bad.jsonl", b'{"text": "caf\xe9"}', "not UTF-8", id="JSON in latin-1"),
    pytest.param("bad.jsonl", b'{"body": "words"}', 'no text field "text"', id="a missing field"),
    pytest.param("bad.jsonl", b'{"text": 7}', 'no text field "text"', id="a number for text"),
    pytest.param("bad.jsonl", b'["text"]', "of another format", id="a JSON array"),
    pytest.param("bad.jsonl", b'7\n["text"]', 'no text field "text"', id="a list for a record"),
    pytest.param("bad.jsonl", b'{"text": null}', "null", id="null for text"),
    pytest.param("bad.jsonl", rb'{"text": "a\ud800b"}', "not UTF-8", id="a lone surrogate in JSON"),
    pytest.param("bad.jsonl", b'{"text": ""}', "empty", id="an empty text"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES)
def test_bad_text_is_left_out_and_counted(source, tmp_path, name, content, reason):
    clean = run(source, tmp_path / "clean")
    (source / name).write_bytes(content)
    manifest = run(source, tmp_path / "out")
    assert manifest["skipped"] == {reason: 1 + content.startswith(b"7")}
    assert {key: manifest[key] for key in ("documents", "tokens", "text_bytes")} == {
        key: clean[key] for key in ("documents", "tokens", "text_bytes")
    }
    assert f"left out: {manifest['skipped'][reason]} {reason}" in prepare.describe(manifest, "out")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("name", "content", "reason"), [BAD_FILES[0], BAD_FILES[8]])
def test_bad_text_fails_when_asked_to_and_leaves_nothing(source, tmp_path, name, content, reason, workers):
    (source / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"every document must be text, got .*{name}: (line 1, )?{reason}"):
        run(source, tmp_path / "out", on_bad_text="fail", workers=workers)
    assert not (tmp_path / "out").exists()


KEPT = [
    pytest.param(b"\xef\xbb\xbfwith a mark", "with a mark", id="a byte-order mark is stripped"),
    pytest.param(b"in the \xef\xbb\xbfmiddle", "in the \ufeffmiddle", id="but not inside"),
    pytest.param(b"a\r\nb\rc\n", "a\r\nb\rc\n", id="line ends stay"),
    pytest.param(b"x" * 10_000_000, "x" * 10_000_000, id="a line of 10 MB"),
    pytest.param(b"a\x00b", "a\x00b", id="NUL"),
    pytest.param(b"a<|endoftext|>b", "a<|endoftext|>b", id="a literal end of text is text"),
]


@pytest.mark.parametrize(("content", "text"), KEPT)
def test_odd_but_valid_text_is_kept_as_it_is(source, tmp_path, content, text):
    (source / "odd.txt").write_bytes(content)
    manifest = run(source, tmp_path / "out")
    assert text in texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert manifest["skipped"] == {}
    assert ("\n  1 with NUL bytes" in prepare.describe(manifest, "out")) == ("\0" in text)


KEPT_RECORDS = [
    pytest.param(b'\xef\xbb\xbf{"text": "a first line"}', "a first line", id="a byte-order mark before the line"),
    pytest.param(b'{"text": "a\xef\xbb\xbfb"}', "a\ufeffb", id="a byte-order mark inside"),
    pytest.param(b'{"text": "a\\r\\nb"}\r', "a\r\nb", id="line ends of Windows"),
    pytest.param(rb'{"text": "a\u0000b"}', "a\x00b", id="NUL"),
    pytest.param(rb'{"text": "\ud83d\ude42"}', "\U0001f642", id="a surrogate pair"),
    pytest.param(b'{"text": "' + b"y" * 10_000_000 + b'"}', "y" * 10_000_000, id="a line of 10 MB"),
    pytest.param(b'{"text": "a<|endoftext|>b"}', "a<|endoftext|>b", id="a literal end of text"),
]


@pytest.mark.parametrize(("line", "text"), KEPT_RECORDS)
def test_odd_but_valid_records_are_kept_as_they_are(source, tmp_path, line, text):
    (source / "odd.jsonl").write_bytes(line + b"\n\n \n" + b'{"text": "the next line"}')
    manifest = run(source, tmp_path / "out")
    kept = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert text in kept
    assert "the next line" in kept
    assert manifest["skipped"] == {}


def test_a_line_of_10_mb_comes_back_whole_from_gpt2_s_tokens(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("One line, of many words. " * 400_000)
    run(path, tmp_path / "out", tokenizer="gpt2")
    tokens = [t for split in ("train", "val") for d in documents(tmp_path / "out", split, 50256) for t in d[1:]]
    assert tokenizer.load("gpt2").decode(tokens) == path.read_text()


def test_all_that_is_left_out_is_counted_by_its_reason(source, tmp_path):
    lines = [b'{"text": "half', rb'{"text": "\ud800"}', b'{"body": "x"}', b'{"text": ""}', b'{"text": "good"}', b"\x00"]
    (source / "mixed.jsonl").write_bytes(b"\n".join(lines))
    manifest = run(source, tmp_path / "out", workers=2)
    assert manifest["skipped"] == {"not JSON": 2, "not UTF-8": 1, 'no text field "text"': 1, "empty": 1}
    assert sum(manifest["documents"].values()) == 30


def test_a_literal_end_of_text_starts_no_document(source, tmp_path):
    (source / "odd.txt").write_text("a<|endoftext|>b")
    manifest = run(source, tmp_path / "out", tokenizer="gpt2")
    starts = sum(len(documents(tmp_path / "out", split, 50256)) for split in ("train", "val"))
    assert starts == sum(manifest["documents"].values()) == 30


def test_another_field_is_read_when_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"body": f"words {i}", "text": "no"}) + "\n\n" for i in range(20)))
    run(path, tmp_path / "out", text_field="body")
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(
        f"words {i}" for i in range(20)
    )


def test_the_names_of_many_files_cost_little(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        for j in range(50):
            (tmp_path / str(i) / f"{j}.txt").touch()
    made = []
    monkeypatch.setattr(sources.packed, "Path", lambda *words: made.append(words))  # slow
    monkeypatch.setattr(sources.re, "findall", lambda *words: made.append(words))
    assert len(sources.find([str(tmp_path)]).files) == 200
    assert made == []


def test_a_file_is_read_once_under_all_of_its_names(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    once = sources.find(["library"]).files
    (tmp_path / "link").symlink_to(source)
    (source / "z.txt").symlink_to(once[0].absolute())
    (tmp_path / "one.txt").hardlink_to(once[0])  # a file of its own
    for names, count in (
        (["library"], 1),
        (["library", str(once[0]), "library"], 2 + len(once) + 1),
        (["link", "library", f"./{once[0]}"], 2 + len(once) + 1),
        (["library", "one.txt", "one.txt"], 2),
    ):
        found = sources.find(names)
        assert [path.resolve() for path in found.files] == [
            *(path.resolve() for path in once),
            *([tmp_path / "one.txt"] if "one.txt" in names else []),
        ]
        assert found.not_read["named twice"] == count
    twice = [str(once[0])] * 2
    assert len(sources.find_by_rule(twice, 2).files) == len(sources.find_by_rule(twice, 1).files) == 2


def test_a_card_that_is_named_beside_its_directory_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n')
    (tmp_path / "README.md").write_text("words")
    found = sources.find([str(tmp_path), str(tmp_path / "README.md")])
    assert [path.name for path in found.files] == ["a.jsonl", "README.md"]
    assert "named twice" not in found.not_read


def test_a_directory_with_the_name_of_standard_input_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").mkdir()
    (tmp_path / "-" / "a.txt").write_text("words")
    assert sources.find(["./-"]).files == [Path("-/a.txt")]
