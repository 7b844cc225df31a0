"""Text to shards: the same bytes every time, every bad document counted, and nothing half made is ever visible."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine import corpus, data, prepare, tokenizer
from engine.data import TokenStream
from engine.errors import BadInput
from engine.prepare import PrepareConfig

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def config(out: Path, **changes) -> PrepareConfig:
    """Small and in this process: bytes as tokens, a third of the documents for validation."""
    return PrepareConfig(**{"out": str(out), "tokenizer": "bytes", "workers": 1, "val_fraction": 0.3} | changes)


def run(source: Path, out: Path, **changes) -> dict:
    return prepare.prepare([str(source)], config(out, **changes))


@pytest.fixture
def source(tmp_path) -> Path:
    """A tree such as the standard library's: packages of .py files, some .txt and .md, and files of other kinds."""
    root = tmp_path / "library"
    for package in ("json", "email", "email/mime"):
        (root / package).mkdir(parents=True)
        for i in range(6):
            (root / package / f"module_{i}.py").write_text(f'"""{package} {i}."""\n' + "x = 1\n" * (i + 1))
    (root / "README.md").write_text("# A library\n")
    (root / "notes.txt").write_text("Übung macht den Meister.\n")
    (root / "records.jsonl").write_text("".join(json.dumps({"text": f"record {i}", "id": i}) + "\n" for i in range(9)))
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    return root


def documents(out: Path, split: str, end_of_text: int = 256) -> list[list[int]]:
    """Each document's tokens, without the end-of-text token that begins it."""
    stream = TokenStream.open(out, split, end_of_text + 1)
    tokens = stream.read(0, len(stream))
    assert tokens[0] == end_of_text
    return [piece.tolist() for piece in np.split(tokens, np.flatnonzero(tokens == end_of_text))[1:]]


def texts(out: Path, split: str) -> list[str]:
    return [bytes(tokens[1:]).decode() for tokens in documents(out, split)]


def files(directory: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones too."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_document_is_there_once_and_begins_with_the_end_of_text(source, tmp_path):
    manifest = run(source, tmp_path / "out")
    found = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    expected = [path.read_text() for path in source.rglob("*") if path.suffix in (".py", ".txt", ".md")]
    expected += [f"record {i}" for i in range(9)]
    assert sorted(found) == sorted(expected)
    assert manifest["documents"] == {split: len(texts(tmp_path / "out", split)) for split in ("train", "val")}
    assert manifest["skipped"] == {}
    assert min(manifest["documents"].values()) > 2


def test_gpt2_documents_begin_with_50256(source, tmp_path):
    manifest = run(source, tmp_path / "out", tokenizer="gpt2")
    gpt2 = tokenizer.load("gpt2")
    found = [gpt2.decode(d[1:]) for split in ("train", "val") for d in documents(tmp_path / "out", split, 50256)]
    assert len(found) == 29
    assert "Übung macht den Meister.\n" in found
    assert (manifest["tokenizer"], manifest["vocab_size"]) == ("gpt2", 50257)
    assert data.tokenizer_name(tmp_path / "out") == "gpt2"


def test_any_number_of_workers_makes_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 40)  # many batches, so that workers finish out of order
    run(source, tmp_path / "one" / "out", workers=1, shard_tokens=200)
    run(source, tmp_path / "two" / "out", workers=2, shard_tokens=200)
    one = files(tmp_path / "one" / "out")
    assert one == files(tmp_path / "two" / "out")
    assert len(one) > 4


def test_documents_keep_their_split_when_the_corpus_grows(source, tmp_path):
    run(source, tmp_path / "before")
    (source / "a_new_one.txt").write_text("new")
    (source / "email" / "another.py").write_text("y = 2\n")
    run(source, tmp_path / "after")
    for split in ("train", "val"):
        before, after = texts(tmp_path / "before", split), texts(tmp_path / "after", split)
        assert [text for text in after if text in before] == before


def test_the_split_takes_its_share():
    chosen = [prepare.is_validation(f"document {i}", 0.2) for i in range(5000)]
    assert sum(chosen) / 5000 == pytest.approx(0.2, abs=0.03)
    assert chosen == [prepare.is_validation(f"document {i}", 0.2) for i in range(5000)]
    assert all(prepare.is_validation(f"document {i}", 0.5) for i in range(5000) if chosen[i])  # a larger one only adds


def test_a_single_book_gives_its_tail_to_validation(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{i}\n" for i in range(1000)))
    manifest = run(book, tmp_path / "out", val_fraction=0.1)
    (train,), (val,) = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "val")
    assert train + val == book.read_text()
    assert len(val) == len(book.read_text()) // 10
    assert manifest["split"] == "the tail of each document"


def test_text_too_short_for_two_splits_is_refused_with_what_was_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("ab")
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(
        BadInput, match=r"must fill both splits, got 3 training and 0 validation .* left out: 1 not UTF-8"
    ):
        run(tmp_path / "in", tmp_path / "out", val_fraction=0.01)
    assert not (tmp_path / "out").exists()


def test_shards_are_cut_at_the_size_asked_for(source, tmp_path):
    manifest = run(source, tmp_path / "out", shard_tokens=100)
    for split in ("train", "val"):
        sizes = [shard["tokens"] for shard in manifest["shards"] if shard["split"] == split]
        assert len(sizes) > 1
        assert set(sizes[:-1]) == {100}
        assert 0 < sizes[-1] <= 100
        assert sum(sizes) == manifest["tokens"][split]
    whole = run(source, tmp_path / "whole")
    assert whole["tokens"] == manifest["tokens"]
    assert len(whole["shards"]) == 2
    for split in ("train", "val"):
        assert texts(tmp_path / "out", split) == texts(tmp_path / "whole", split)


def test_the_manifest_tells_the_truth(source, tmp_path):
    manifest = run(source, tmp_path / "out", shard_tokens=100)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    on_disk = files(tmp_path / "out")
    del on_disk["manifest.json"]
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == on_disk  # and nothing else lies there
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["file"]
        assert path.stat().st_size == shard["bytes"]
        assert len(data.open_shard(path)) == shard["tokens"]


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i}" for i in range(30)] + [None, ""]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": rows, "id": list(range(32))}), path)
    manifest = run(path, tmp_path / "out")
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(rows[:30])
    assert manifest["skipped"] == {"empty": 2}
    with pytest.raises(BadInput, match=r"x.parquet: must have a column body, got text, id"):
        run(path, tmp_path / "other", text_field="body")


# ---- Bad text -----------------------------------------------------------------------------------------------------

BAD_FILES = [
    pytest.param("bad.txt", b"caf\xe9", "not UTF-8", id="latin-1"),
    pytest.param("bad.txt", b"ab\xed\xa0\x80", "not UTF-8", id="a surrogate as UTF-8"),
    pytest.param("bad.py", "é".encode("utf-16"), "not UTF-8", id="UTF-16"),
    pytest.param("bad.txt", b"", "empty", id="an empty file"),
    pytest.param("bad.md", b" \n\t\r\n", "empty", id="white space only"),
    pytest.param("bad.txt", b"\xef\xbb\xbf", "empty", id="a byte-order mark only"),
    pytest.param("bad.jsonl", b'{"text": "half', "not JSON", id="malformed JSON"),
    pytest.param("bad.jsonl", b"[" * 100_000, "not JSON", id="JSON nested too deep"),
    pytest.param("bad.jsonl", b'{"text": "caf\xe9"}', "not UTF-8", id="JSON in latin-1"),
    pytest.param("bad.jsonl", b'{"body": "words"}', 'no text field "text"', id="a missing field"),
    pytest.param("bad.jsonl", b'{"text": 7}', 'no text field "text"', id="a number for text"),
    pytest.param("bad.jsonl", b'["text"]', 'no text field "text"', id="a list for a record"),
    pytest.param("bad.jsonl", rb'{"text": "a\ud800b"}', "not UTF-8", id="a lone surrogate in JSON"),
    pytest.param("bad.jsonl", b'{"text": ""}', "empty", id="an empty text"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES)
def test_bad_text_is_left_out_and_counted(source, tmp_path, name, content, reason):
    clean = run(source, tmp_path / "clean")
    (source / name).write_bytes(content)
    manifest = run(source, tmp_path / "out")
    assert manifest["skipped"] == {reason: 1}
    assert {key: manifest[key] for key in ("documents", "tokens", "text_bytes")} == {
        key: clean[key] for key in ("documents", "tokens", "text_bytes")
    }
    assert f"left out: 1 {reason}" in prepare.describe(manifest, "out")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES[:1] + BAD_FILES[6:7])
def test_bad_text_fails_when_asked_to_and_leaves_nothing(source, tmp_path, name, content, reason, workers):
    (source / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"every document must be text, left out: 1 {reason}; see --on-bad-text"):
        run(source, tmp_path / "out", on_bad_text="fail", workers=workers)
    assert not (tmp_path / "out").exists()


KEPT = [
    pytest.param(b"\xef\xbb\xbfwith a mark", "with a mark", id="a byte-order mark is stripped"),
    pytest.param(b"in the \xef\xbb\xbfmiddle", "in the \ufeffmiddle", id="but not inside"),
    pytest.param(b"a\r\nb\rc\n", "a\r\nb\rc\n", id="line ends stay"),
    pytest.param(b"a\x00b", "a\x00b", id="NUL stays"),
    pytest.param(b"x" * 10_000_000, "x" * 10_000_000, id="a line of 10 MB"),
    pytest.param(b"a<|endoftext|>b", "a<|endoftext|>b", id="a literal end of text is text"),
]


@pytest.mark.parametrize(("content", "text"), KEPT)
def test_odd_but_valid_text_is_kept_as_it_is(source, tmp_path, content, text):
    (source / "odd.txt").write_bytes(content)
    manifest = run(source, tmp_path / "out")
    assert text in texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert manifest["skipped"] == {}


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
    found = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert text in found
    assert "the next line" in found
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


# ---- Requests -----------------------------------------------------------------------------------------------------


def test_the_same_request_again_does_nothing(source, tmp_path):
    first = run(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(source, tmp_path / "out") == first
    assert run(source, tmp_path / "out", overwrite=True, workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_changed_sources_are_another_request(source, tmp_path):
    run(source, tmp_path / "out")
    (source / "notes.txt").write_text("changed")
    with pytest.raises(BadInput, match=r"must be new or empty, got 3 files, .* or add --overwrite"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    assert "changed" in texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")


def test_lost_shards_are_made_again(source, tmp_path):
    first = run(source, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "out" / first["shards"][0]["file"]).unlink()
    (tmp_path / "out" / first["shards"][1]["file"]).write_bytes(b"cut short")
    run(source, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before


def test_foreign_files_are_refused_and_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = files(tmp_path / "out")
    with pytest.raises(BadInput, match=r"must be new or empty, got 1 files, such as thesis.tex"):
        run(source, tmp_path / "out")
    assert files(tmp_path / "out") == before
    run(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"  # it stands in nobody's way


def test_overwrite_replaces_all_older_shards(source, tmp_path):
    run(source, tmp_path / "out", shard_tokens=50)
    many = len(files(tmp_path / "out"))
    manifest = run(source, tmp_path / "out", shard_tokens=10_000, overwrite=True)
    assert many > 5
    assert set(files(tmp_path / "out")) == {"manifest.json", *(s["file"] for s in manifest["shards"])}


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "an app"}'], ids=["no JSON", "a list", "another program's"])
def test_a_foreign_manifest_is_refused_and_can_be_replaced(source, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(BadInput, match=r"manifest.json: must be a manifest of shards"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == content
    run(source, tmp_path / "out", overwrite=True)
    assert TokenStream.open(tmp_path / "out", "train", 257)


def test_bad_sources_are_sentences(tmp_path):
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    (tmp_path / "empty").mkdir()
    for name, sentence in (
        ("nowhere", "must be a file, a directory or the word stdlib, got .*nowhere"),
        ("x.pdf", "a source must end in .txt, .md, .py, .jsonl, .parquet, got .*x.pdf"),
        ("empty", "the sources must hold files in .txt, .*, got none"),
    ):
        with pytest.raises(BadInput, match=sentence):
            run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_a_sentence(source, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BadInput, match=r"--out must be a directory that can be written, got .*out: "):
        run(source, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_a_bad_config_names_everything_that_is_off():
    with pytest.raises(
        BadInput, match=r"--val-fraction must .*got 1.0; --shard-tokens must .*got 0; --workers must .*got 0"
    ):
        PrepareConfig("out", val_fraction=1.0, shard_tokens=0, workers=0)


def test_the_standard_library_is_a_source_without_its_tests():
    found = corpus.find_files(["stdlib"])
    parts = {part for path in found for part in path.relative_to(Path(os.__file__).parent).parts[:-1]}
    assert len(found) > 300
    assert "json" in parts
    assert not parts & {"test", "tests", "site-packages", "__pycache__", "idle_test"}
    assert found == corpus.find_files(["stdlib"])


# ---- Failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write_shard", "replace the first", "replace the second", "replace the manifest"])
def test_a_failure_leaves_nothing_behind(source, tmp_path, monkeypatch, failing):
    calls = []

    def fail_at(count, plain):
        def wrapped(*args):
            calls.append(args)
            if len(calls) == count:
                raise OSError("no space left on device")
            return plain(*args)

        return wrapped

    if failing == "write_shard":
        monkeypatch.setattr(data, "write_shard", fail_at(2, data.write_shard))
    else:
        count = {"replace the first": 1, "replace the second": 2, "replace the manifest": 3}[failing]
        monkeypatch.setattr(os, "replace", fail_at(count, os.replace))
    with pytest.raises(OSError, match="no space left"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys, time
from engine import data, prepare

plain_write, plain_replace, moves = data.write_shard, os.replace, []

def write(path, tokens):
    plain_write(path, tokens)
    time.sleep(0.0 if int(sys.argv[3]) else 0.02)  # a slow disk, so that it can be killed in the middle

def replace(source, target):
    moves.append(target)
    if len(moves) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    plain_replace(source, target)

data.write_shard, os.replace = write, replace
prepare.BATCH_BYTES = 2000  # many batches, so that workers finish out of order
workers = int(sys.argv[4])
config = prepare.PrepareConfig(sys.argv[2], tokenizer="bytes", workers=workers, val_fraction=0.3, shard_tokens=100)
prepare.prepare([sys.argv[1]], config)
"""


def start(source: Path, out: Path, killed_at_move: int, workers: int = 1) -> subprocess.Popen:
    """A preparation in a process of its own, which ends itself with SIGKILL at the given move into place (0: never)."""
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(killed_at_move), str(workers)]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT)


def assert_no_data(out: Path) -> None:
    for split in ("train", "val"):
        with pytest.raises(BadInput):
            TokenStream.open(out, split, 257)


@pytest.fixture
def big_source(tmp_path) -> Path:
    path = tmp_path / "big.jsonl"
    path.write_text("".join(json.dumps({"text": f"record {i} " * 10}) + "\n" for i in range(400)))
    return path


def test_killed_while_it_writes_nothing_is_visible_and_the_next_run_succeeds(big_source, tmp_path):
    out = tmp_path / "out"
    process = start(big_source, out, killed_at_move=0)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob(".building/*.bin"))) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, "the preparation ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [path.name for path in out.iterdir()] == [".building"]
    assert_no_data(out)
    assert_recovers(big_source, out)


@pytest.mark.parametrize(("killed", "again"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("move", [0, 3], ids=["while it writes", "while it moves"])
def test_killed_and_run_again_with_other_workers_the_bytes_are_the_same(
    big_source, tmp_path, monkeypatch, killed, again, move
):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 2000)
    out, quiet = tmp_path / "out", tmp_path / "quiet" / "out"
    process = start(big_source, out, killed_at_move=move, workers=killed)
    deadline = time.monotonic() + 60
    while not move and len(list(out.glob(".building/*.bin"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    if not move:
        process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert_no_data(out)
    run(big_source, out, shard_tokens=100, workers=again)
    run(big_source, quiet, shard_tokens=100, workers=1)
    assert files(out) == files(quiet)


def children(pid: int) -> list[int]:
    """Process numbers of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes under /proc")
def test_killed_with_workers_none_of_them_stays(big_source, tmp_path):
    command = (
        "import sys; from engine import prepare; prepare.BATCH_BYTES = 1; "
        "prepare.prepare([sys.argv[1]], prepare.PrepareConfig(sys.argv[2], tokenizer='bytes', workers=2))"
    )
    big_source.write_text(big_source.read_text() * 500)
    process = subprocess.Popen([sys.executable, "-c", command, big_source, tmp_path / "out"], cwd=ROOT, env=ENVIRONMENT)
    workers = []
    try:
        deadline = time.monotonic() + 60
        while len(workers) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, "the preparation ended before it could be killed"
            workers = children(process.pid)
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert len(workers) == 2
    assert not left


@pytest.mark.parametrize("move", [1, 3, -1], ids=["before the first", "between two shards", "before the manifest"])
def test_killed_while_it_moves_shards_nothing_is_taken_for_data(big_source, tmp_path, move):
    out = tmp_path / "out"
    small = prepare.prepare([str(big_source)], config(tmp_path / "small", shard_tokens=100))
    process = start(big_source, out, killed_at_move=move if move > 0 else len(small["shards"]) + 1)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert_no_data(out)
    assert_recovers(big_source, out)


def assert_recovers(source: Path, out: Path) -> None:
    manifest = run(source, out, shard_tokens=5000)
    assert set(files(out)) == {"manifest.json", *(shard["file"] for shard in manifest["shards"])}
    assert sum(manifest["documents"].values()) == 400
