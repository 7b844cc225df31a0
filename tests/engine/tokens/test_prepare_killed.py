"""Preparations that fail or are killed: no partial data is visible, and the next makes the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from corpora import config, files, run, write_library

from engine.errors import BadInput
from engine.tokens import building, prepare
from engine.tokens.shards import TokenStream

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def source(tmp_path) -> Path:
    return write_library(tmp_path / "library")


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
        monkeypatch.setattr(building, "write_shard", fail_at(2, building.write_shard))
    else:
        count = {"replace the first": 1, "replace the second": 2, "replace the manifest": 3}[failing]
        monkeypatch.setattr(os, "replace", fail_at(count, os.replace))
    with pytest.raises(BadInput, match=r"must be a directory that can be written, .* no space left"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys, time
from engine.tokens import building, prepare

plain_write, plain_replace, moves = building.write_shard, os.replace, []

def write(path, tokens):
    plain_write(path, tokens)
    time.sleep(0.0 if int(sys.argv[3]) else 0.02)  # a slow disk, so that it can be killed in the middle

def replace(source, target):
    moves.append(target)
    if len(moves) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    plain_replace(source, target)

building.write_shard, os.replace = write, replace
building.BATCH_BYTES = 2000  # many batches, so that workers finish out of order
workers = int(sys.argv[4])
config = prepare.PrepareConfig(sys.argv[2], tokenizer="bytes", workers=workers, val_fraction=0.3, shard_tokens=100)
prepare.prepare([sys.argv[1]], config)
"""


def start(source: Path, out: Path, killed_at_move: int, workers: int = 1) -> subprocess.Popen:
    """Starts a preparation that kills itself at the given move of a file into place (0: never)."""
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
    assert sorted(path.name for path in out.iterdir()) == [".building", ".lock"]
    assert_no_data(out)
    assert_recovers(big_source, out)


@pytest.mark.parametrize(("killed", "again"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("move", [0, 3], ids=["while it writes", "while it moves"])
def test_killed_and_run_again_with_other_workers_the_bytes_are_the_same(
    big_source, tmp_path, monkeypatch, killed, again, move
):
    monkeypatch.setattr(building, "BATCH_BYTES", 2000)
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
    """Process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes under /proc")
def test_killed_with_workers_none_of_them_stays(big_source, tmp_path):
    command = (
        "import sys; from engine.tokens import building, prepare; building.BATCH_BYTES = 1; "
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
