"""Whatever lies at a file's place, no reader waits for it, and no command ends in a traceback."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from engine import cli, config, lock
from engine.checks import cache, facts, selfcheck
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.health.heartbeat import Heartbeat
from engine.run import branch, directory, repair, settings
from engine.tokens import shards
from engine.tuning import record


@pytest.fixture(autouse=True)
def at_once():
    """Ends the process if a test waits for a file."""
    timer = threading.Timer(60.0, os._exit, (9,))
    timer.start()
    yield
    timer.cancel()


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_verify_names_a_pipe_at_the_place_of_each_file_of_a_run_and_of_its_data(trained, shards, tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    shutil.copytree(trained, run)
    found = [*data.iterdir(), run / "config.json", run / "metrics.jsonl", *(run / "checkpoints").glob("*/*")]
    for path in found:
        kept = path.rename(tmp_path / "kept")
        pipe(path)
        folder = data if path.parent == data else run
        assert cli.main(["verify", str(folder)]) == 1, path
        assert "a named pipe" in capsys.readouterr().out, path
        os.replace(kept, path)
    assert cli.main(["verify", str(data), str(run)]) == 0


def test_verify_takes_a_limit_of_this_process_for_no_damage(trained, shards, monkeypatch, capsys):
    """Too many open files, at each file that is opened."""
    opened, real = [], os.open

    def limited(path, *args, **kwargs):
        if Path(path).is_relative_to(trained) or Path(path).is_relative_to(shards):
            opened.append(Path(path))
            if len(opened) == failing:
                raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", limited)
    failing = 0
    assert cli.main(["verify", str(trained), str(shards)]) == 0
    most, numbers, codes = len(opened), (errno.EMFILE, errno.ENFILE, errno.ENOMEM), []
    capsys.readouterr()
    for failing in range(1, most + 1):
        number = numbers[failing % 3]
        opened.clear()
        codes.append(cli.main(["verify", str(trained), str(shards)]))
        assert codes[-1] == 0 or os.strerror(number) in capsys.readouterr().err, opened[failing - 1]
    assert 1 not in codes
    assert codes.count(2) >= 8


def test_no_reader_waits_for_a_pipe(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (branch.WENT_BACK, branch.LATEST):
        pipe(tmp_path / name)
        with pytest.raises(BadInput, match=rf"train: .*{name} must be .*, got a named pipe; delete it"):
            branch.find(tmp_path, "auto", print)
        (tmp_path / name).unlink()
    path = pipe(tmp_path / "config.json")
    assert directory.resolved(tmp_path) == {}
    assert settings._read(tmp_path) == []
    for read in (config.load, directory.tokenizer_name):
        with pytest.raises(BadInput, match=r"config.json: must be the config of a run, got a named pipe"):
            read(tmp_path)
    with pytest.raises(ValueError, match="a named pipe"):
        record.load(path)
    assert repair.last_sample(path) == ""
    with pytest.raises(OSError, match="a named pipe"):
        branch._content(path)
    with pytest.raises(OSError, match="seek"):
        lock._read_at(path)
    asked = {"ops": [], "sizes": [], "device": "cpu"}
    monkeypatch.setattr(selfcheck, "_path", lambda asked: path)
    assert selfcheck.recall(asked) is None
    said = []
    kept = cache.CompileCache(tmp_path, {}, 0, said.append)
    kept.folder.mkdir()
    pipe(kept.path)
    assert not kept.load()
    assert "is ignored, a named pipe" in said[0]
    (tmp_path / "gpt2-engine").mkdir()
    pipe(tmp_path / "gpt2-engine" / "secret")
    with pytest.raises(OSError, match="a named pipe"):
        facts.secret()
    pipe(tmp_path / "heartbeat")
    beat = Heartbeat(config.parse(["tiny", "--out", str(tmp_path)], "test"), Ranks(0, 0, 1, torch.device("cpu")))
    beat.open(0)
    assert not beat._was_running
    (tmp_path / "manifest.json").symlink_to("nowhere")
    with pytest.raises(BadInput, match="a link to nowhere, which does not exist"):
        shards.read_manifest(tmp_path)


@pytest.mark.slow
def test_a_minute_of_damaged_files_is_sentences_only():
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--seed", "14", "--seconds", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: nothing" in done.stdout
