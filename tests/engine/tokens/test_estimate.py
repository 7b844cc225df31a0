"""`gpt2 prepare --dry-run`: close to what the preparation makes, and nothing is written."""

import json
import re
from pathlib import Path

import pytest
from corpora import config, files, run, write_library

from engine.commands.data import prepare
from engine.errors import BadInput
from engine.tokens.preparation import estimate
from engine.tokens.reading import cuts, text


def numbers(line: str) -> list[float]:
    return [float(one.replace(",", "")) for one in re.findall(r"[\d,]*\d(?:\.\d+)?", line)]


def estimated(source: Path, **changes) -> dict[str, list[float]]:
    """Numbers of each line of an estimate."""
    lines = estimate.estimate([str(source)], config(source.parent / "out", **changes)).splitlines()
    return {line.split()[0]: numbers(line) for line in lines}


def test_an_estimate_is_close_and_writes_nothing(tmp_path):
    source = write_library(tmp_path / "library")
    (source / "bad.md").write_bytes(b"\xff" * 200)
    before = files(tmp_path)
    found = estimated(source)
    assert files(tmp_path) == before
    assert list(tmp_path.iterdir()) == [source]
    manifest = run(source, tmp_path / "out")
    assert found["tokens"][0] == pytest.approx(sum(manifest["tokens"].values()), rel=0.1)
    assert found["documents"][0] == pytest.approx(sum(manifest["documents"].values()), abs=4)
    assert found["not"][0] == pytest.approx(100 * 200 / manifest["source_bytes"], rel=0.2)
    assert found["shards"][0] == pytest.approx(2 * found["tokens"][0] / 1000, abs=0.1)


def test_long_texts_and_records_are_read_in_part_only(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    words = b"1 2 3 4 5 6 7\n" * 5000 + b"internationally comprehensible\n" * 2500
    (tmp_path / "in" / "a.txt").write_bytes(words)
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    for name, value in (("LONG", 20_000), ("BLOCK", 1000), ("PART", 1000)):
        monkeypatch.setattr(cuts, name, value)
    manifest = run(tmp_path / "in", tmp_path / "out", tokenizer="gpt2", val_fraction=0.5)
    monkeypatch.setattr(text, "WINDOW_BYTES", 200)
    monkeypatch.setattr(estimate, "PLACE_BYTES", 200)
    monkeypatch.setattr(cuts.Scan, "update", None)  # a whole pass would call it
    found = estimated(tmp_path / "in", tokenizer="gpt2")
    assert found["estimate"][0] < 20  # kB
    assert found["tokens"][0] == pytest.approx(sum(manifest["tokens"].values()), rel=0.1)


@pytest.mark.parametrize(("separator", "documents"), [(None, 1), ("<|endoftext|>", 300), (r"\n\n", 300)])
def test_documents_are_counted_as_they_are_split(tmp_path, separator, documents):
    (tmp_path / "x.txt").write_text("a story\n\n<|endoftext|>\n" * 300)
    assert estimated(tmp_path / "x.txt", split_on=separator)["documents"][0] == pytest.approx(documents, abs=1)


def test_the_command_prints_the_estimate_and_makes_no_directory(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("words " * 100)
    prepare([str(tmp_path / "x.txt"), "--out", str(tmp_path / "new" / "out"), "--dry-run", "--workers", "7"], "gpt2")
    assert "with 7 workers" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_empty_files_and_standard_input(tmp_path):
    (tmp_path / "x.txt").touch()
    assert estimated(tmp_path / "x.txt")["tokens"][0] <= 1
    with pytest.raises(BadInput, match="must have files to read, got standard input"):
        estimate.estimate(["-"], config(tmp_path / "out"))
