"""Two processes, one directory: the first goes on as if it were alone, the second ends with code 2 and says why."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from runs import ENVIRONMENT, assert_same_run, run, steps, train

from engine import lock
from engine.run import plots
from engine.tokens import batches


def at_step(monkeypatch, step: int, act) -> None:
    """Has the next run in this process do something else before its update `step`."""
    plain = batches.Batches.at

    def at(self, index):
        if index == step:
            monkeypatch.setattr(batches.Batches, "at", plain)
            act()
        return plain(self, index)

    monkeypatch.setattr(batches.Batches, "at", at)


def train_elsewhere(out: Path, shards: Path, *flags: str) -> int:
    command = [sys.executable, "-m", "engine.cli", "train", *SMALL, "--data", str(shards), "--out", str(out), *flags]
    return subprocess.run(command, env=ENVIRONMENT).returncode


@pytest.mark.parametrize("second", [train, pytest.param(train_elsewhere, marks=pytest.mark.slow)])
def test_two_trainings_into_one_out(second, trained, shards, tmp_path, monkeypatch, capfd):
    out, codes = tmp_path / "run", []

    def second_writers():
        before = {path: path.read_bytes() for path in out.rglob("*.json*")}
        codes.append(second(out, shards, "--num-steps", "2"))
        codes.append(second(out, shards, "--num-steps", "2", "--resume", "never"))
        codes.append(run("import", "anything", "--out", str(out)))
        assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before

    at_step(monkeypatch, 1, second_writers)
    assert train(out, shards, "--num-steps", "2") == 0
    assert codes == [2, 2, 2]
    refused = f"train: --out {out} must have one writer, got process {os.getpid()} of host "
    assert capfd.readouterr().err.count(refused) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_same_run(out, trained)
    assert not (out / lock.NAME).exists()
    assert train(out, shards, "--num-steps", "2") == 0  # complete; it frees the lock too
    assert train(out, shards, "--num-steps", "1") == 2  # refused, like any run that cannot begin
    assert not (out / lock.NAME).exists()


def test_a_run_that_was_taken_over_saves_nothing_more(shards, tmp_path, monkeypatch, capfd):
    out, others = tmp_path / "run", {"nonce": "1" * 32}

    def take_over():
        path = out / lock.NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | others | {"host": "elsewhere"}) + "\n")

    def leave(code):
        raise SystemExit(code)

    at_step(monkeypatch, 2, take_over)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(lock, "BEAT", 600.0)  # the save notices, not the thread
    assert train(out, shards, "--num-steps", "4", "--save-every", "2") == 4
    assert "of host elsewhere (gpt2 train, since 2" in capfd.readouterr().err
    assert steps(out) == [2]
    assert json.loads((out / lock.NAME).read_text())["host"] == "elsewhere"


def test_an_out_that_cannot_be_renamed_is_a_sentence_that_names_another(trained, shards, tmp_path, monkeypatch, capfd):
    """A mount point, which a volume's --out often is."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)

    def refuse(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(lock.Lock, "rename", refuse)
    assert train(out, shards, "--num-steps", "2", "--resume", "never") == 2
    error = capfd.readouterr().err
    assert f"--resume never must rename --out to {out}.old1, got Device or resource busy for {out}" in error
    assert f"such as {out / 'run2'}" in error
    assert steps(out) == [2]


def test_gpt2_plot_draws_beside_a_run_that_draws(tmp_path, monkeypatch):
    class Figure:
        def __init__(self, drawn, meanwhile=lambda: None):
            self.drawn, self.meanwhile = drawn, meanwhile

        def savefig(self, path, **_):
            path.write_text(self.drawn)
            self.meanwhile()

    def plot():
        monkeypatch.setattr(os, "getpid", lambda: 1)
        plots.save(Figure("gpt2 plot's"), tmp_path / "loss_curve.png")

    plots.save(Figure("the run's", plot), tmp_path / "loss_curve.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss_curve.png"]
    assert (tmp_path / "loss_curve.png").read_text() == "the run's"


SLOW = """
import sys, time
from engine.tokens import prepare
from engine.tokens.preparation import writer
plain = writer.ShardWriter._finish
writer.ShardWriter._finish = lambda *args: (plain(*args), time.sleep(0.05))
prepare.prepare([sys.argv[1]], prepare.PrepareConfig(sys.argv[2], "bytes", 2, 0.3, 2000))
"""


def test_two_preparations_into_one_directory(tmp_path, capfd):
    source, out, quiet = tmp_path / "text.jsonl", tmp_path / "out" / "data", tmp_path / "quiet" / "data"
    source.write_text("".join(json.dumps({"text": f"record {i} " * 10}) + "\n" for i in range(400)))
    flags = ["--tokenizer", "bytes", "--workers", "1", "--val-fraction", "0.3", "--shard-tokens", "2000", "--overwrite"]
    first = subprocess.Popen([sys.executable, "-c", SLOW, source, out], env=ENVIRONMENT, cwd=ROOT)
    while len(list(out.glob(".building/*.bin"))) < 3:
        assert first.poll() is None
        time.sleep(0.005)
    assert run("prepare", str(source), "--out", str(out), *flags) == 2
    assert f"prepare: --out {out} must have one writer, got process {first.pid} of" in capfd.readouterr().err
    assert run("export", "--run", str(tmp_path), "--out", str(out)) == 2
    assert first.wait() == 0
    assert run("prepare", str(source), "--out", str(quiet), *flags) == 0
    read = [{path.name: path.read_bytes() for path in made.iterdir() if path.suffix == ".bin"} for made in (out, quiet)]
    assert read[0] == read[1]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in quiet.iterdir())


def test_what_the_lock_refuses_it_does_not_change(trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "run")
    hf, taken = tmp_path / "hf", tmp_path / "taken"
    assert run("export", "--run", str(tmp_path / "run"), "--out", str(hf)) == 0
    assert lock.others(hf) == list(hf.iterdir())
    with lock.acquire(taken, "export"):
        assert run("export", "--run", str(tmp_path / "run"), "--out", str(taken)) == 2
        assert run("import", str(hf), "--out", str(taken)) == 2
        assert lock.others(taken) == []
    error = capfd.readouterr().err
    assert f"export: --out {taken} must have one writer, got process {os.getpid()}" in error
    assert f"import: --out {taken} must have one writer, got process {os.getpid()}" in error
    assert not taken.exists()
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / lock.NAME).touch()  # of an import that was killed before it wrote anything
    assert run("import", str(hf), "--out", str(tmp_path / "dead")) == 0
