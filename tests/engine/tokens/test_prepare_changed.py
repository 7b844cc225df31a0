"""Preparations that go on after the sources or the options have changed: as much is kept as stays true."""

import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from corpora import config, files, run, set_batch, texts

from engine.errors import BadInput
from engine.tokens import prepare
from engine.tokens.preparation import building, encode, fast, journal
from engine.tokens.reading import hub
from engine.tokens.shards import BUILDING

ROWS = 30
BAD = b'{"words": "no text"}\n'


class Stop(BaseException):
    """A kill, but that what is open is closed."""


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    """Batches of a few rows, two or three a file."""
    set_batch(monkeypatch, 250)


@pytest.fixture
def source(tmp_path) -> Path:
    """Three files of lines."""
    root = tmp_path / "in"
    root.mkdir()
    for name in "abc":
        write(root / f"{name}.jsonl", rows(name))
    return root


def rows(name: str) -> list[bytes]:
    return [json.dumps({"text": f"row {i} of {name}"}).encode() + b"\n" for i in range(ROWS)]


def write(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(lines))


def stop(*_) -> None:
    raise Stop


def stopped(source: Path, out: Path, batch: int = 0, place=(building.Build, "cut_tails"), **options) -> None:
    """Stops a preparation, that writes its journal after each batch, before it takes a batch, or else at a place."""
    calls, take = itertools.count(1), building.Build._take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "EVERY", 0)
        patch.setattr(building.Build, "_take", lambda *given: stop() if next(calls) == batch else take(*given))
        patch.setattr(*place, stop)
        with pytest.raises(Stop):
            run(source, out, **options)


def assert_as_at_once(source: Path, out: Path, **options) -> None:
    """The files are those that a preparation at once makes of the sources as they are now."""
    quiet = out.parent / "quiet" / out.name
    run(source, quiet, **options)
    assert files(out) == files(quiet)


@pytest.mark.parametrize("row", [0, 25], ids=["its first row", "a row behind some that the journal has"])
def test_a_mended_file_is_read_again_and_what_came_before_it_is_kept(source, tmp_path, monkeypatch, capsys, row):
    monkeypatch.setattr(journal, "EVERY", 0)
    out, bad, lines = tmp_path / "out", source / "b.jsonl", rows("b")
    write(bad, [*lines[:row], BAD, *lines[row:]])
    before = sum(len(line) for line in rows("a"))
    with pytest.raises(BadInput, match=rf"b.jsonl: line {row + 1}, .*the same command goes on after") as error:
        run(source, out, on_bad_text="fail", shard_tokens=150, dedup=True)
    promised = int(str(error.value).split(" after ")[-1].split(" ")[0].replace(",", ""))
    assert ("once that file has changed" in str(error.value)) == bool(row)
    assert before - 500 < promised <= before
    write(bad, lines)
    run(source, out, on_bad_text="fail", shard_tokens=150, dedup=True)
    assert f"goes on after {promised:,} of" in capsys.readouterr().err
    assert_as_at_once(source, out, on_bad_text="fail", shard_tokens=150, dedup=True)


@pytest.mark.parametrize("batch", [pytest.param(n, marks=pytest.mark.slow) if n != 5 else n for n in range(2, 9)])
def test_after_any_stop_and_any_change_the_bytes_are_those_of_the_sources_now(source, tmp_path, batch):
    for change in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", ""):
        out = tmp_path / change / "out"
        for name in "abc":
            write(source / f"{name}.jsonl", rows(name))
        (source / "d.jsonl").unlink(missing_ok=True)
        stopped(source, out, batch, shard_tokens=170)
        write(source / change, rows("another")) if change else (source / "b.jsonl").unlink()
        run(source, out, shard_tokens=170)
        assert_as_at_once(source, out, shard_tokens=170)


def test_a_file_behind_a_last_shard_that_is_short_goes_into_that_shard(source, tmp_path, capsys):
    out = tmp_path / "out"
    stopped(source, out)
    write(source / "d.jsonl", rows("d"))
    run(source, out)
    assert "goes on after" in capsys.readouterr().err
    assert_as_at_once(source, out)


def test_a_change_in_what_has_been_read_begins_anew_and_says_so(source, tmp_path, capsys):
    stopped(source, tmp_path / "out", 6)
    write(source / "a.jsonl", rows("x"))
    run(source, tmp_path / "out")
    said = capsys.readouterr().err
    assert "begins anew: files that it had read have changed" in said
    assert "goes on" not in said


def test_a_file_that_was_for_validation_and_is_for_training_now_has_changed():
    known = [("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]
    one, other = (journal.Request("", "", "", known, num_train) for num_train in (1, 2))
    assert one.digest((1, 0)) == other.digest((1, 0))
    assert one.digest((1, 5)) != other.digest((1, 5))
    assert journal.Request("", "", "", known, None).digest((3, 1)) is None


# ---- --on-bad-text fail -------------------------------------------------------------------------------------------


def test_fail_does_not_go_on_from_what_skip_has_left_out_but_from_before_it(source, tmp_path, capsys):
    out, lines = tmp_path / "out", rows("b")
    write(source / "b.jsonl", [BAD, *lines])
    stopped(source, out, 6)
    before = files(out)
    with pytest.raises(
        BadInput, match=r"must be text, got .*\.building made without some: left out: 1 no text"
    ) as error:
        run(source, out, on_bad_text="fail")
    assert "goes on" not in str(error.value)
    assert files(out) == before
    write(source / "b.jsonl", lines)
    assert run(source, out, on_bad_text="fail")["skipped"] == {}
    assert "goes on after" in capsys.readouterr().err


def test_fail_does_not_move_into_place_what_skip_has_made(source, tmp_path):
    out = tmp_path / "out"
    write(source / "b.jsonl", [BAD, *rows("b")])
    stopped(source, out, place=(prepare, "_move"))
    with pytest.raises(BadInput, match=r"every document must be text, got .*\.building made without some"):
        run(source, out, on_bad_text="fail")
    assert not (out / "manifest.json").exists()
    assert run(source, out)["skipped"]


# ---- Standard input -----------------------------------------------------------------------------------------------


@pytest.fixture
def stdin(source):
    """The file a.jsonl, and a row that a wrong gigatoken would encode wrongly, through a pipe."""
    before, (reader, writer) = os.dup(0), os.pipe()
    os.write(writer, b"".join(rows("a")) + b'{"text": "WRONG"}\n')
    os.close(writer)
    os.dup2(reader, 0)
    yield
    os.dup2(before, 0)
    os.close(before)


class Wrong:
    """tiktoken under gigatoken's interface, wrong where a text has the word WRONG."""

    def __init__(self):
        self.plain = encode.fast.tokenizer.load("gpt2")

    def encode(self, content: bytes) -> np.ndarray:
        return self.plain.encode(content.decode()).astype(np.uint32)[:: -1 if b"WRONG" in content else 1].copy()


@pytest.fixture
def wrong(monkeypatch):
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fast, "_load", Wrong)
    encode.encoder.cache_clear()
    yield
    encode.encoder.cache_clear()


def test_standard_input_is_tokenised_with_tiktoken_which_never_begins_again(stdin, wrong, tmp_path):
    manifest = prepare.prepare(["-"], config(tmp_path / "out", tokenizer="gpt2"))
    assert sum(manifest["documents"].values()) == ROWS + 1
    assert manifest["encoder"].startswith("tiktoken")


def test_an_error_of_standard_input_promises_nothing_and_leaves_nothing(stdin, source, tmp_path, monkeypatch):
    write(source / "b.jsonl", [*rows("b"), BAD])
    totals, plain = [], building.Progress
    monkeypatch.setattr(journal, "EVERY", 0)
    monkeypatch.setattr(building, "Progress", lambda total, **more: totals.append(total) or plain(total, **more))
    with pytest.raises(BadInput, match="line 31, no text field") as error:
        prepare.prepare(["-", str(source / "b.jsonl")], config(tmp_path / "out", on_bad_text="fail"))
    assert "goes on" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert totals == [None]


# ---- gigatoken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_the_line_of_a_difference_is_counted_from_the_begin_of_the_file(source, wrong, tmp_path, workers):
    write(source / "b.jsonl", [*rows("b")[:25], b'{"text": "WRONG"}\n'])
    manifest = run(source, tmp_path / "out", tokenizer="gpt2", workers=workers)
    assert manifest["not_fast"].endswith(f"in {source / 'b.jsonl'}, line 26")


def test_what_begins_anew_still_says_that_tiktoken_made_the_tokens(source, wrong, tmp_path, capsys):
    out = tmp_path / "out"
    write(source / "a.jsonl", [b'{"text": "WRONG"}\n', *rows("a")])
    stopped(source, out, 6, tokenizer="gpt2", shard_tokens=50)
    next((out / BUILDING).glob("*_train_000000.bin")).unlink()
    manifest = run(source, out, tokenizer="gpt2", shard_tokens=50)
    said = capsys.readouterr().err
    assert "begins anew, what was left cannot be used" in said
    assert said.count("tokenised again") == 1
    assert (manifest["encoder"][:8], manifest["not_fast"][-6:]) == ("tiktoken", "line 1")


# ---- Files of the hub ---------------------------------------------------------------------------------------------


class Remote(NamedTuple):
    """As of reading.hub."""

    repository: str
    commit: str
    name: str
    size: int
    blob: str

    @property
    def label(self) -> Path:
        return Path(f"hf:{self.repository}/{self.name}")


@pytest.fixture
def commit(source, monkeypatch):
    """Returns what makes another commit of the files, in which the blobs of the named ones are new."""
    blobs = {}

    def find(name: str, _) -> list[Remote]:
        paths = [source / f"{name[-1]}.jsonl"] if name != "hf:all" else sorted(source.iterdir())
        sizes = {path.name: path.stat().st_size for path in paths}
        return [Remote("o/n", blobs["commit"], path, size, blobs.get(path, "")) for path, size in sizes.items()]

    monkeypatch.setattr(hub, "find", find)
    monkeypatch.setattr(hub, "_download", lambda remote, *_: source / remote.name)
    return lambda number, **new: blobs.update(commit=number, **{f"{name}.jsonl": blob for name, blob in new.items()})


def test_another_commit_costs_nothing_where_the_files_are_the_same(source, tmp_path, capsys, commit):
    out = tmp_path / "out"
    commit("1" * 40)
    stopped(Path("hf:all"), out, 6)
    commit("2" * 40, c="new")
    assert run(Path("hf:all"), out)["hub"] == {"o/n": "2" * 40}
    assert "goes on after" in capsys.readouterr().err
    made = files(out)
    commit("3" * 40)
    run(Path("hf:all"), out)
    assert files(out) == made
    commit("3" * 40, b="new")
    with pytest.raises(BadInput, match="must be new or empty"):
        run(Path("hf:all"), out)


def test_validation_sources_may_lie_on_the_hub_in_the_same_commit(tmp_path, monkeypatch, commit):
    commit("1" * 40)
    prepare.prepare(["hf:a"], config(tmp_path / "out", val=("hf:b",), val_fraction=0.01))
    assert set(texts(tmp_path / "out", "val")) == {json.loads(row)["text"] for row in rows("b")}
    assert len(texts(tmp_path / "out", "train")) == ROWS
    numbers = itertools.count()
    find = hub.find
    monkeypatch.setattr(hub, "find", lambda *given: [one._replace(commit=f"{next(numbers)}") for one in find(*given)])
    with pytest.raises(BadInput, match="of one data set must be of one commit, got o/n at 0 and 1"):
        prepare.prepare(["hf:a"], config(tmp_path / "other", val=("hf:b",), val_fraction=0.01))
