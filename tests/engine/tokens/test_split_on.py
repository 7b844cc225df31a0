"""`--split-on`: documents of a text file between separators."""

from pathlib import Path

import pytest
from corpora import config, run, texts

from engine.errors import BadInput
from engine.tokens.preparation import summary
from engine.tokens.reading import cuts

STORIES = [f"  Story {i} was short.\n\nIt ended." for i in range(40)]


def stories(path: Path, between: str) -> Path:
    path.write_text(between.join(STORIES) + between)
    return path


@pytest.mark.parametrize(
    ("between", "separator"),
    [
        pytest.param("\n<|endoftext|>\n", "<|endoftext|>", id="TinyStories"),
        pytest.param("<|endoftext|>", "<|endoftext|>", id="without line ends"),
        pytest.param("\r\n\r\n\r\n", r"\r\n\r\n\r\n", id="empty lines of Windows"),
        pytest.param("\t\\n", r"\t\\n", id="a literal backslash"),
        pytest.param("\n<|endoftext|>\n \n<|endoftext|>\n", "<|endoftext|>", id="white space between separators"),
    ],
)
@pytest.mark.parametrize("long", [cuts.LONG, 30, 10])
def test_documents_are_what_lies_between_separators(tmp_path, monkeypatch, between, separator, long):
    source = stories(tmp_path / "x.txt", between)
    for name, value in (("LONG", long), ("PART", 10), ("BLOCK", 10)):
        monkeypatch.setattr(cuts, name, value)
    manifest = run(source, tmp_path / "out", split_on=separator)
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(STORIES)
    assert sum(manifest["documents"].values()) == 40
    assert manifest["skipped"] == {}
    assert manifest["markers"] == 0
    if (
        long > source.stat().st_size
    ):  # a group of white space alone, which is that long in a real file only, counts none
        assert manifest["source_bytes"] == source.stat().st_size


def test_documents_have_the_split_that_files_of_their_own_have(tmp_path):
    (tmp_path / "files").mkdir()
    for index, story in enumerate(STORIES):
        (tmp_path / "files" / f"{index:03}.txt").write_text(story)
    run(tmp_path / "files", tmp_path / "a" / "out")
    run(stories(tmp_path / "x.txt", "<|end|>"), tmp_path / "b" / "out", split_on="<|end|>")
    for split in ("train", "val"):
        assert texts(tmp_path / "a" / "out", split) == texts(tmp_path / "b" / "out", split) != []


def test_a_bad_document_alone_is_left_out_and_named_by_its_byte(tmp_path):
    content = "<|end|>".join(STORIES).encode() + b"<|end|>\nbad \xff document"
    (tmp_path / "x.txt").write_bytes(content)
    manifest = run(tmp_path / "x.txt", tmp_path / "out", split_on="<|end|>")
    assert sum(manifest["documents"].values()) == 40
    (loss,) = manifest["left_out"]["files"]
    assert loss["first"] == f"document at byte {content.index(b'bad'):,}, not UTF-8 at byte 4 of 14 (0xff)"


def test_nothing_but_separators_is_one_empty_document(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("\n--\n--")
    stories(tmp_path / "in" / "y.txt", "--")
    assert run(tmp_path / "in", tmp_path / "out", split_on="--")["skipped"] == {"empty": 1}


@pytest.mark.parametrize("long", [cuts.LONG, 10])
def test_white_space_that_is_not_ascii_is_an_empty_document(tmp_path, monkeypatch, long):
    for name, value in (("LONG", long), ("PART", 10), ("BLOCK", 10)):
        monkeypatch.setattr(cuts, name, value)
    (tmp_path / "x.txt").write_text("".join(f"{story}--" for story in [*STORIES, "\u3000" * 20, " " * 40]))
    manifest = run(tmp_path / "x.txt", tmp_path / "out", split_on="--")
    assert manifest["skipped"] == {"empty": 1}
    assert manifest["left_out"]["files"][0]["bytes"] >= 60


def test_another_separator_is_another_request(tmp_path):
    source = stories(tmp_path / "x.txt", "\n--\n==\n")
    run(source, tmp_path / "out", split_on="--")
    run(source, tmp_path / "out", split_on="--")
    with pytest.raises(BadInput, match="must be new or empty"):
        run(source, tmp_path / "out", split_on="==")


def test_markers_that_are_kept_name_the_option(tmp_path):
    manifest = run(stories(tmp_path / "x.txt", "<|endoftext|>"), tmp_path / "out", split_on="Story")
    assert manifest["markers"] == 40
    assert "--split-on '<|endoftext|>'" in summary.describe(manifest, "out")


@pytest.mark.parametrize(("separator", "words"), [("", "at least one character"), ("\udcff", "must be UTF-8")])
def test_a_separator_that_cannot_be_is_refused(separator, words):
    with pytest.raises(BadInput, match=f"--split-on .*{words}"):
        config(Path("out"), split_on=separator)
