"""Preparations that fail or are killed: no partial data is visible, and the next goes on and makes the same bytes."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from conftest import ROOT
from corpora import documents, files, run, set_batch, write_library

from engine.errors import BadInput
from engine.tokens import prepare
from engine.tokens.preparation import building, encode, journal, tails
from engine.tokens.preparation.writer import ShardWriter
from engine.tokens.shards import TokenStream

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def source(tmp_path) -> Path:
    return write_library(tmp_path / "library")


def fail_at(count: int, plain, error: BaseException, counts=lambda *_: True):
    """`plain`, whose call number `count` of those that count raises the error instead."""
    calls = []

    def wrapped(*args):
        if counts(*args):
            calls.append(args)
            if len(calls) == count:
                raise error
        return plain(*args)

    return wrapped


def is_move(_: Path, target: Path) -> bool:
    """Whether this renames a file out of .building."""
    return ".building" not in str(target)


@pytest.mark.parametrize("failing", ["the second shard", "a write", "a journal", "the first move", "the second move"])
def test_after_a_failure_nothing_is_taken_for_data_and_the_same_command_goes_on(source, tmp_path, monkeypatch, failing):
    full, out, quiet = OSError(errno.ENOSPC, "No space left on device"), tmp_path / "out", tmp_path / "quiet" / "out"
    set_batch(monkeypatch, 40)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "EVERY", 0)
        if failing == "the second shard":
            patch.setattr(ShardWriter, "_finish", fail_at(2, ShardWriter._finish, full))
        elif failing == "a write":
            patch.setattr(ShardWriter, "add", fail_at(9, ShardWriter.add, full))
        elif failing == "a journal":
            patch.setattr(journal, "write", fail_at(3, journal.write, full))
        else:
            patch.setattr(os, "replace", fail_at(1 + (failing == "the second move"), os.replace, full, is_move))
        with pytest.raises(BadInput, match=r"must be a directory that can be written, .* No space left.*goes on after"):
            run(source, out, shard_tokens=100)
    assert_no_data(out)
    run(source, out, shard_tokens=100, workers=2)
    run(source, quiet, shard_tokens=100)
    assert files(out) == files(quiet)


KILLED = """
import os, signal, sys, time
from engine.tokens import prepare
from engine.tokens.preparation import building, journal
from engine.tokens.reading import records

plain_take, plain_replace, moves = building.Build._take, os.replace, []

def take(build, encoded):
    time.sleep(0.0 if int(sys.argv[3]) else 0.005)  # so that it can be killed in the middle
    return plain_take(build, encoded)

def replace(source, target):
    if ".building" not in str(target):
        moves.append(target)
        if len(moves) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    plain_replace(source, target)

building.Build._take, os.replace, journal.EVERY = take, replace, 0.02
building.BATCH_BYTES = records.SPAN = 1000  # many batches, so that workers finish out of order
workers = int(sys.argv[4])
config = prepare.PrepareConfig(sys.argv[2], "bytes", workers, 0.3, shard_tokens=7000, dedup=True)
prepare.prepare([sys.argv[1]], config)
"""
OPTIONS = {"shard_tokens": 7000, "dedup": True}


def start(source: Path, out: Path, killed_at_move: int, workers: int = 1) -> subprocess.Popen:
    """Starts a preparation that kills itself at the given move of a file into place (0: never)."""
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(killed_at_move), str(workers)]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def assert_no_data(out: Path) -> None:
    for split in ("train", "val"):
        with pytest.raises(BadInput):
            TokenStream.open(out, split, 257)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, "the preparation ended before it could be killed"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def big_source(tmp_path_factory) -> Path:
    """Three files of 400 documents, of which 40 are equal to one before, and one that is no text."""
    root = tmp_path_factory.mktemp("big")
    for name in ("a", "b", "c"):
        records = [{"text": f"record {name} {i - i % 10 // 9} " * 10} for i in range(400)]
        records[7] = {"words": "no text"}
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture(scope="module")
def whole(big_source, tmp_path_factory) -> dict[str, str]:
    """Sums of the files that an undisturbed preparation makes."""
    out = tmp_path_factory.mktemp("quiet") / "out"
    manifest = run(big_source, out, **OPTIONS)
    assert manifest["duplicates"]["documents"] == 120
    assert sum(manifest["documents"].values()) == 3 * 399 - 120
    return files(out)


def shards_of(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each shard that the journal says is finished."""
    stats = [(out / ".building" / one["file"]).stat() for one in journal.read(out / ".building")["shards"]]
    names = [one["file"] for one in journal.read(out / ".building")["shards"]]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)}


@pytest.mark.parametrize(("killed", "again"), [(1, 2), (2, 1)])
def test_killed_while_it_writes_the_next_keeps_the_finished_shards_and_makes_the_same_bytes(
    big_source, whole, tmp_path, capsys, killed, again
):
    out = tmp_path / "out"
    process = start(big_source, out, 0, killed)
    wait_for(lambda: len((journal.read(out / ".building") or {"shards": ()})["shards"]) > 2, process)
    process.kill()
    process.communicate()
    assert sorted(path.name for path in out.iterdir()) == [".building", ".lock"]
    assert_no_data(out)
    finished = shards_of(out)
    run(big_source, out, workers=again, **OPTIONS)
    assert "prepare: goes on after" in capsys.readouterr().err
    assert files(out) == whole
    after = {name: (out / name).stat() for name in finished}
    assert {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in after.items()} == finished


@pytest.mark.slow
def test_killed_again_and_again_with_other_workers_the_bytes_are_the_same(big_source, whole, tmp_path):
    random, kills = Random(0), 0
    for round_ in range(4):
        out = tmp_path / str(round_) / "out"
        while (process := start(big_source, out, 0, random.choice((1, 2, 3)))).poll() is None:
            before = journal.read(out / ".building")
            while random.random() < 0.998 and journal.read(out / ".building") == before and process.poll() is None:
                time.sleep(0.01)  # mostly until it has got somewhere
            time.sleep(random.uniform(0, 0.3))
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice([process.pid, *children(process.pid)]), signal.SIGKILL)
            _, error = process.communicate(timeout=60)
            if process.returncode == 0 or (out / "manifest.json").exists():  # killed when all was in place
                break
            assert process.returncode == -signal.SIGKILL or "BadInput: prepare: its" in error
            kills += 1
            assert_no_data(out)
        assert {name: sum_ for name, sum_ in files(out).items() if name != ".lock"} == whole
    assert kills >= 10


@pytest.mark.parametrize("move", [1, 3, -1], ids=["before the first", "between two shards", "before the manifest"])
def test_killed_while_it_moves_shards_nothing_is_taken_for_data_and_the_next_moves_the_rest(
    big_source, whole, tmp_path, monkeypatch, move
):
    out = tmp_path / "out"
    monkeypatch.setattr(os, "replace", fail_at(move if move > 0 else len(whole), os.replace, Killed(), is_move))
    with pytest.raises(Killed):
        run(big_source, out, **OPTIONS)
    assert not (out / "manifest.json").exists()
    assert_no_data(out)
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "build", None)  # nothing is made again
    run(big_source, out, **OPTIONS)
    assert files(out) == whole


class Killed(BaseException):
    """A kill, but that what is open is closed."""


def stop(source: Path, out: Path, monkeypatch, batches: int = 20, batch_bytes: int = 1000, **options) -> None:
    """Runs a preparation until it has taken some batches."""
    with monkeypatch.context() as patch:
        patch.setattr(building.Build, "_take", fail_at(batches, building.Build._take, Killed()))
        set_batch(patch, batch_bytes)
        patch.setattr(journal, "EVERY", 0)
        with pytest.raises(Killed):
            run(source, out, **options)
    assert_no_data(out)


def test_a_stop_after_any_batch_makes_the_same_bytes(source, tmp_path, monkeypatch):
    set_batch(monkeypatch, 100)
    run(source, tmp_path / "out", shard_tokens=150, dedup=True)
    whole = files(tmp_path / "out")
    for batches in (2, 3, 5, 8):
        shutil.rmtree(tmp_path / "out")
        for more in (batches, 3):  # and once more
            stop(source, tmp_path / "out", monkeypatch, more, 30, shard_tokens=150, dedup=True)
        run(source, tmp_path / "out", shard_tokens=150, dedup=True)
        assert files(tmp_path / "out") == whole


def test_another_command_does_not_remove_what_was_left_but_with_overwrite_and_says_so(
    big_source, tmp_path, monkeypatch, capsys
):
    stop(big_source, tmp_path / "out", monkeypatch)
    before = files(tmp_path / "out")
    with pytest.raises(BadInput, match=r"got .*\.building of another command, which has read 1\d,\d\d\d bytes; go on "):
        run(big_source, tmp_path / "out", shard_tokens=5000)
    assert files(tmp_path / "out") == before
    run(big_source, tmp_path / "out", shard_tokens=5000, overwrite=True)
    assert "out/.building, which another command has left" in capsys.readouterr().err
    run(big_source, tmp_path / "quiet" / "out", shard_tokens=5000)
    assert files(tmp_path / "out") == files(tmp_path / "quiet" / "out")


@pytest.mark.parametrize("damage", ["torn journal", "short shard", "lost shard", "short digests"])
def test_what_cannot_be_used_is_made_anew(big_source, whole, tmp_path, monkeypatch, capsys, damage):
    out = tmp_path / "out"
    stop(big_source, out, monkeypatch, 70, **OPTIONS)
    path = {
        "torn journal": journal.FILE,
        "short shard": "out_train_000001.bin",
        "lost shard": "out_train_000000.bin",
        "short digests": building.SEEN,
    }[damage]
    content = (out / ".building" / path).read_bytes()
    (out / ".building" / path).unlink()
    if damage != "lost shard":
        (out / ".building" / path).write_bytes(content[: len(content) // 2])
    run(big_source, out, **OPTIONS)
    said = capsys.readouterr().err
    assert ("begins anew" in said) == (damage != "torn journal")
    assert files(out) == whole


def test_a_worker_that_is_killed_is_a_sentence_and_the_same_command_goes_on(big_source, whole, tmp_path):
    out = tmp_path / "out"
    process = start(big_source, out, 0, workers=2)
    wait_for(lambda: journal.read(out / ".building") is not None, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert "its 2 worker processes must be able to run, got one that was killed" in error
    assert "; the same command goes on after" in error.splitlines()[-1]
    assert_no_data(out)
    run(big_source, out, **OPTIONS)
    assert files(out) == whole


def test_a_bad_row_is_named_with_its_file_and_the_rest_is_made_without_it(big_source, tmp_path, monkeypatch, capsys):
    out, bad = tmp_path / "out", big_source / "a.jsonl"
    said = rf"got {bad}: line 8, no text field .*the same command goes on after \d\d\d "
    with monkeypatch.context() as patch:
        set_batch(patch, 100)
        patch.setattr(journal, "EVERY", 0)
        with pytest.raises(BadInput, match=said):
            run(big_source, out, on_bad_text="fail")
    assert_no_data(out)
    manifest = run(big_source, out, on_bad_text="skip")
    assert "goes on after" in capsys.readouterr().err
    assert manifest["skipped"] == {'no text field "text"': 3}


def test_tails_that_are_cut_after_a_stop_are_the_same(tmp_path, monkeypatch):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * (9 + 40 * number))
    source, options = tmp_path, {"val_fraction": 0.1, "shard_tokens": 60}
    monkeypatch.setattr(encode, "in_validation", lambda *_: False)
    monkeypatch.setattr(tails, "PIECE", 7)
    with monkeypatch.context() as patch:
        patch.setattr(tails, "cut", fail_at(1, tails.cut, Killed()))
        with pytest.raises(Killed):
            run(source, tmp_path / "out", **options)
    assert_no_data(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(building, "encode_batch", fail_at(1, building.encode_batch, Killed()))  # not again
        manifest = run(source, tmp_path / "out", **options)
    kept = [list(path.read_bytes()) for path in sorted(source.glob("*.txt"))]
    cuts = [len(text) - int(0.1 * len(text)) for text in kept]
    assert documents(tmp_path / "out", "train") == [[256, *text[:cut]] for text, cut in zip(kept, cuts, strict=True)]
    val = [[256, *text[cut:]] for text, cut in zip(kept, cuts, strict=True) if cut < len(text)]
    assert documents(tmp_path / "out", "val") == val
    assert manifest["documents"] == {"train": 6, "val": 5}
    assert not (tmp_path / "out" / ".building").exists()


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes under /proc")
def test_killed_with_workers_none_of_them_stays(big_source, tmp_path):
    command = (
        "import sys; from engine.tokens import prepare; from engine.tokens.reading import records; records.SPAN = 1; "
        "prepare.prepare([sys.argv[1]], prepare.PrepareConfig(sys.argv[2], tokenizer='bytes', workers=2))"
    )
    source = tmp_path / "big.jsonl"
    source.write_text((big_source / "a.jsonl").read_text() * 500)
    process = subprocess.Popen([sys.executable, "-c", command, source, tmp_path / "out"], cwd=ROOT, env=ENVIRONMENT)
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
