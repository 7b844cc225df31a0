"""Records: each line and each value is a document, wherever a file is cut."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from corpora import run, texts

from engine import cli
from engine.errors import BadInput
from engine.tokens.preparation.encode import in_validation, split_digest
from engine.tokens.reading import documents, packed, records, sources, values
from engine.tokens.reading.parts import NotText, Raw, ReadOptions

OPTIONS = ReadOptions()
ODD = b'\xef\xbb\xbf{"text": "a"}\r\n\n \r\n{"text": "b"}\n\r\n\nno JSON\n{"text": "' + b"c" * 60 + b'"}\n{"text": "d"}'


def read(path: Path, options: ReadOptions = OPTIONS) -> list[tuple[str, int]]:
    """(text, or why it is left out, place) of each document."""
    found = []
    for kind, content, _, place, *_ in documents.raw_documents([path], options):
        try:
            found.append((documents.parse(kind, content, options.text_field)[0], place))
        except NotText as error:
            found.append((error.reason, place))
    return found


def after_each_part(path: Path) -> list[tuple[list[Raw], list[Raw]]]:
    """For each position: the documents from it on, and those of a reading that begins there. Places are left out."""
    found = list(documents.parts(path, OPTIONS))

    def contents(parts) -> list[Raw]:
        return [raw._replace(place=0) for part, _ in parts for raw in documents.read(part, OPTIONS)]

    return [
        (contents(found[number:]), contents(documents.parts(path, OPTIONS, position)))
        for number, (_, position) in enumerate(found, 1)
    ]


# ---- Lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [ODD, ODD + b"\n", b"\n\n" + ODD + b"\n\n"], ids=["no end", "an end", "blank lines"]
)
def test_lines_are_the_same_documents_with_the_same_numbers_wherever_they_are_cut(tmp_path, monkeypatch, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    whole = read(path)
    first = 1 + content.startswith(b"\n") * 2
    expected = [("a", 0), ("b", 3), ("not JSON", 6), ("c" * 60, 7), ("d", 8)]
    assert whole == [(text, first + line) for text, line in expected]
    for span in range(1, len(content) + 2):
        monkeypatch.setattr(records, "SPAN", span)
        assert read(path) == whole, span
    monkeypatch.setattr(records, "SPAN", 20)
    assert all(left == right for left, right in after_each_part(path))


def test_a_line_that_is_longer_than_a_span_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "y" * 3_000_000}) + "\n" + json.dumps({"text": "z"}))
    spans = [part for part, _ in documents.parts(path, OPTIONS)]
    assert [len(list(documents.read(span, OPTIONS))) for span in spans] == [1, 0, 1]
    assert sum(span.num_bytes for span in spans) == path.stat().st_size


def test_a_large_file_of_another_format_is_one_loss_and_not_many(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SPAN", 10)
    (tmp_path / "x.ndjson").write_bytes(b"PK\x03\x04" + b"\n" * 100)
    assert read(tmp_path / "x.ndjson") == [("of another format", 0)]


# ---- JSON ----------------------------------------------------------------------------------------------------------

RECORDS = [{"text": "one"}, {"text": "two\nlines"}, {"id": [{"a": "]"}], "text": "drei é \U0001f642"}]
LAYOUTS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "an array in a line": json.dumps(RECORDS),
    "an array of several lines": json.dumps(RECORDS, indent=1, ensure_ascii=False),
    "an array of lines": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "values on one line": " ".join(map(json.dumps, RECORDS)),
    "values on a later line": "\n".join(map(json.dumps, RECORDS[:2])) + " " + "\n".join(map(json.dumps, RECORDS[2:])),
    "values of several lines": "\r\n".join(json.dumps(one, indent=2) for one in RECORDS),
}


@pytest.mark.parametrize("small", [1 << 20, 0], ids=["a worker reads", "the parent reads"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_is_an_array_or_lines_or_values(tmp_path, monkeypatch, layout, small):
    monkeypatch.setattr(records, "SMALL", small)
    path = tmp_path / "x.JSON"
    path.write_text("\ufeff" + LAYOUTS[layout])
    assert read(path) == [(one["text"], number) for number, one in enumerate(RECORDS, 1)]
    assert all(left == right for left, right in after_each_part(path))


def test_one_object_is_one_record(tmp_path):
    for name, content in (("a", '{"text": "words"}'), ("b", '{\n "text": "words",\n "more": {"text": 1}\n}')):
        (tmp_path / f"{name}.json").write_text(content)
        assert read(tmp_path / f"{name}.json") == [("words", 1)]


def test_a_damaged_line_of_a_json_file_costs_itself_alone(tmp_path):
    for damaged in ('{"text": "b"} no JSON', '{"text": "b', '{"text": "b"} {"text'):
        (tmp_path / "x.json").write_text(f'{{"text": "a"}}\n{damaged}\n{{"text": "c"}}\n')
        assert read(tmp_path / "x.json") == [("a", 1), ("not JSON", 2), ("c", 3)]


BROKEN = [
    ('[{"text": "a"}, {"text": "b"', 1, "Expecting ',' delimiter"),
    ('[{"text": "a"}', 1, "the array has no end"),
    ('[{"text": "a"} {"text": "b"}]', 1, "no comma behind it"),
    ('[{"text": "a"}] x', 1, "more behind the end of the array"),
    ('[{"text": "a"}, // a note\n {"text": "b"}]', 1, "Expecting value"),
    ('[{"text": "a"}, ' + "[" * 100_000, 1, "too many brackets"),
    ("{\n// a note\n}", 0, "Expecting property name"),
    ("words", 0, "not JSON at character 0"),
]


@pytest.mark.parametrize(("content", "good", "why"), BROKEN, ids=[one[2] for one in BROKEN])
def test_json_that_is_broken_is_named_by_record_and_costs_the_rest_of_its_file_alone(tmp_path, content, good, why):
    (tmp_path / "x.json").write_text(content)
    (tmp_path / "y.txt").write_text("more")
    assert read(tmp_path / "x.json") == [("a", 1)] * good + [("not JSON", good + 1)]
    if good:
        with pytest.raises(BadInput, match=rf"x.json: record 2, not JSON \({why}"):
            run(tmp_path, tmp_path / "out", on_bad_text="fail")
    else:
        assert why in run(tmp_path, tmp_path / "out")["left_out"]["files"][0]["first"]


def test_a_bad_record_of_an_array_costs_itself_alone(tmp_path):
    bad = b'["text", {"text": "caf\xe9"}, {"text": "a\x01b"}, 1' + b"0" * 5000 + b', {"text": "good"}, {"text": null}]'
    (tmp_path / "x.json").write_bytes(bad)
    reasons = ['no text field "text"', "not UTF-8", "not JSON", "not JSON", "good", "null"]
    assert read(tmp_path / "x.json") == [(why, number) for number, why in enumerate(reasons, 1)]


def made_up(rng: random.Random, depth: int = 3) -> Any:
    """A JSON value."""
    kind = rng.randrange(7 if depth else 5)
    if kind < 5:
        text = "".join(rng.choices('a"\\[]{},: \n\0é\u3000\U0001f642\ud83d', k=rng.randrange(9)))
        return (None, rng.random() < 0.5, rng.randrange(-(10**9), 10**9), rng.random() * 1e20, text)[kind]
    values = [made_up(rng, depth - 1) for _ in range(rng.randrange(4))]
    return values if kind == 5 else {str(i): value for i, value in enumerate(values)}


def test_values_are_those_of_the_array_whatever_is_read_at_once(monkeypatch):
    rng = random.Random(0)
    for _ in range(300):
        array, is_ascii = [made_up(rng) for _ in range(rng.randrange(6))], rng.random() < 0.5
        written = json.dumps(array, indent=rng.choice([None, 0, 3]), ensure_ascii=is_ascii)
        monkeypatch.setattr(values, "PIECE", rng.randrange(1, 40))
        found = [one.content for one in values.read(io.BytesIO(written.encode("utf-8", "surrogatepass")))]
        assert [json.loads(one.decode("utf-8", "surrogatepass")) for one in found] == array


def test_an_error_is_seen_before_the_rest_of_the_file_is_read(monkeypatch):
    monkeypatch.setattr(values, "PIECE", 100)
    file = io.BytesIO(b'[{"text": 1}, {oops}, ' + b'{"text": 2},' * 10_000)
    with pytest.raises(values.Broken):
        list(values.read(file))
    assert file.tell() < 1000
    monkeypatch.setattr(values, "LONGEST", 1000)
    file = io.BytesIO(b'["' + b"x" * 100_000)
    with pytest.raises(values.Broken, match="no end in"):
        list(values.read(file))
    assert file.tell() < 5000


# ---- Standard input ------------------------------------------------------------------------------------------------


@pytest.fixture
def stdin():
    """Puts a file in the place of standard input."""
    before = os.dup(0)
    yield lambda descriptor: os.dup2(descriptor, 0)
    os.dup2(before, 0)
    os.close(before)


def pipe(content: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


def test_standard_input_is_read_among_files_and_is_never_the_data_of_before(tmp_path, stdin, capsys):
    lines = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(40))
    (tmp_path / "x.txt").write_text("a file")
    out = tmp_path / "out"
    args = ["prepare", "-", str(tmp_path / "x.txt"), "--out", str(out), "--tokenizer", "bytes", "--val-fraction", "0.3"]
    stdin(pipe(lines + b"no JSON\n"))
    assert cli.main([*args, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "from 1 .txt, 1 standard input" in printed
    assert "standard input, 8 bytes: line 41, not JSON" in printed
    assert sorted(texts(out, "train") + texts(out, "val")) == sorted([*(f"line {i}" for i in range(40)), "a file"])
    stdin(pipe(lines))
    assert cli.main(args) == 2
    assert "must be new or empty" in capsys.readouterr().err
    other = in_validation(split_digest(b"a file"), 0.3)
    candidates = (f"Plain words.\n\nOf document {i}." for i in range(99))
    text = next(text for text in candidates if in_validation(split_digest(text.encode()), 0.3) != other)
    stdin(pipe(text.encode()))
    assert cli.main([*args, "--format", "txt", "--workers", "1", "--overwrite"]) == 0
    assert sorted(texts(out, "train") + texts(out, "val")) == [text, "a file"]


def test_a_terminal_as_standard_input_and_two_of_it_are_refused(stdin):
    control, terminal = os.openpty()
    stdin(terminal)
    with pytest.raises(BadInput, match=r"standard input must be a pipe or a file, got a terminal; for example: zcat"):
        sources.find(["-"])
    stdin(pipe(b""))
    with pytest.raises(BadInput, match="standard input can be read once"):
        sources.find(["-", "-"])
    os.close(control)
    os.close(terminal)


def test_a_pipe_that_gives_little_at_a_time_is_read_to_its_end():
    class Slow(io.BytesIO):
        def read(self, most: int = -1) -> bytes:
            return super().read(min(most, 3))

    assert packed.Unpacked(Slow(b"0123456789")).read(8) == b"01234567"
