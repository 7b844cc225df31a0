"""Disk space: checkpoints have the predicted size, and a disk without room for them is refused."""

import dataclasses
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from conftest import ROOT

from engine import optim
from engine.config import PRESETS
from engine.errors import BadInput
from engine.run import checkpoint, directory
from engine.run.directory import check_disk, checkpoint_bytes
from model.gpt2 import GPT2, GPT2Config

MIB = 2**20
Usage = namedtuple("Usage", "total used free")


def config(**fields):
    return dataclasses.replace(PRESETS["gpt2"], **fields)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_a_checkpoint_with_adamw_has_12_bytes_per_parameter(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT2(PRESETS[name].model).parameters())
    assert checkpoint_bytes(PRESETS[name].model, "adamw") == pytest.approx(12 * parameters, rel=1e-3)
    assert checkpoint_bytes(PRESETS[name].model, None) == pytest.approx(4 * parameters, rel=1e-3)


def save(run, optimizer_name: str | None):
    """Saves a real checkpoint after one update and returns its path."""
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, name=optimizer_name or "adamw"))
    model = GPT2(run.model)
    optimizer = optim.build(model, run.optim)
    optim.set_learning_rate(optimizer, 1e-3)
    tokens = torch.randint(run.model.vocab_size, (2, 8))
    model(tokens, tokens).backward()
    optimizer.step()
    fields = dataclasses.asdict(run)
    state = {"step": 1, "tokens": 16, "identity": {"model": fields["model"]}, "config": fields, "scaler": {}}
    return checkpoint.save(run.out, state, model, optimizer if optimizer_name else None, keep_last=1)


@pytest.mark.parametrize(("optimizer", "rows"), [("adamw", False), ("muon", True), (None, False)])
@pytest.mark.parametrize(
    "model",
    [PRESETS["tiny"].model, GPT2Config(2, 2, 64, 32, 257), GPT2Config(12, 1, 32, 8, 300)],
    ids=["tiny", "small", "deep_and_narrow"],
)
def test_the_bytes_counted_ahead_are_those_on_the_disk(model, optimizer, rows, tmp_path):
    settings = dataclasses.replace(PRESETS["tiny"].optim, muon_rows=rows)
    path = save(dataclasses.replace(PRESETS["tiny"], model=model, out=str(tmp_path), optim=settings), optimizer)
    true = sum(file.stat().st_size for file in path.iterdir())
    counted = checkpoint_bytes(model, optimizer, rows)
    assert counted == pytest.approx(true, rel=0.02)
    assert counted >= true


EACH = checkpoint_bytes(PRESETS["tiny"].model, "muon")


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"num_steps": 1000, "save_every": 10, "keep_last": 2}, 4),  # two, the best, and the one being written
        ({"num_steps": 1000, "save_every": 10, "keep_last": 5}, 7),
        ({"num_steps": 1000, "save_every": None, "keep_last": 5}, 1),
        ({"num_steps": 30, "save_every": 10, "keep_last": 5}, 3),  # after 10, 20 and 30 updates
        ({"num_steps": 31, "save_every": 10, "keep_last": 5}, 4),
        ({"num_steps": 5, "save_every": 10, "keep_last": 5}, 1),
    ],
)
def test_room_is_asked_for_all_checkpoints_that_exist_at_one_time(fields, count, tmp_path, monkeypatch):
    run = dataclasses.replace(PRESETS["tiny"], out=str(tmp_path / "not" / "yet"), **fields)
    needed = count * EACH + MIB
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    check_disk(run)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(BadInput, match=f"for {count} checkpoint"):
        check_disk(run)


def test_the_disk_asked_is_the_one_that_will_hold_the_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, 2**40))
    (tmp_path / "there").mkdir()
    check_disk(dataclasses.replace(PRESETS["tiny"], out=str(tmp_path / "there" / "a" / "b")))
    check_disk(dataclasses.replace(PRESETS["tiny"], out=str(tmp_path / "there")))
    monkeypatch.chdir(tmp_path)
    check_disk(dataclasses.replace(PRESETS["tiny"], out="runs/a"))
    assert asked == [tmp_path / "there", tmp_path / "there", tmp_path]


@pytest.mark.parametrize(("there", "needed"), [(0, 4), (3, 1), (4, 1), (9, 1)])
def test_checkpoints_that_are_there_already_count_but_one_more_is_always_written(there, needed, tmp_path, monkeypatch):
    for step in range(there):
        path = tmp_path / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        with (path / "model.safetensors").open("wb") as file:
            file.truncate(EACH)
    run = dataclasses.replace(PRESETS["tiny"], out=str(tmp_path), num_steps=1000, save_every=10)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: Usage(0, 0, needed * EACH + MIB))
    check_disk(run)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: Usage(0, 0, needed * EACH + MIB - 1))
    with pytest.raises(BadInput):
        check_disk(run)


def test_a_full_disk_gets_a_sentence_with_the_number_of_checkpoints_that_fit(monkeypatch):
    run = config(keep_last=5, out="/runs/a")
    each = checkpoint_bytes(run.model, "adamw")
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: Usage(0, 0, 5 * each + 2 * MIB))
    with pytest.raises(BadInput) as info:
        check_disk(run)
    assert str(info.value) == (
        "train: the disk of --out /runs/a must have 9.7 GiB free, for 7 checkpoints of 1.4 GiB, got 7.0 GiB; lower "
        "--keep-last to 3, make room there or choose another --out"
    )
    check_disk(dataclasses.replace(run, keep_last=3))


def test_a_disk_of_two_mebibytes_holds_what_is_promised_and_no_more(tmp_path):
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"
    allowed = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True, text=True, timeout=60)
    if allowed.returncode:
        pytest.skip(f"a file system of 2 MiB cannot be mounted here: {allowed.stderr.strip()}")
    program = f"""
import dataclasses, shutil
from pathlib import Path
import torch
from engine import optim
from engine.run import checkpoint
from engine.config import PRESETS
from engine.errors import BadInput
from engine.run.directory import check_disk, checkpoint_bytes
from model.gpt2 import GPT2, GPT2Config

run = dataclasses.replace(PRESETS["tiny"], out="{tmp_path}/run", num_steps=100, save_every=1, keep_last=99,
                          model=GPT2Config(1, 1, 16, 16, 257))
run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, name="adamw"))
try:
    check_disk(run)
except BadInput as error:
    print(error)
    most = int(str(error).split("lower --keep-last to ")[1].split(",")[0])
check_disk(dataclasses.replace(run, keep_last=most))

model = GPT2(run.model)
optimizer = optim.build(model, run.optim)
optim.set_learning_rate(optimizer, 1e-3)
tokens = torch.randint(257, (2, 8))
model(tokens, tokens).backward()
optimizer.step()
step = 0
try:
    while True:
        step += 1
        checkpoint.save(run.out, {{"step": step}}, model, optimizer, keep_last=99)
        if step == most + 2:
            print("free", shutil.disk_usage(run.out).free)
except OSError:
    print("whole", len(list((Path(run.out) / "checkpoints").iterdir())))
print("needs", checkpoint_bytes(run.model, "adamw"))
print("promised", most + 2)
"""
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    refusal, *lines = done.stdout.splitlines()
    assert "must have" in refusal
    assert "for 100 checkpoints of " in refusal
    assert "got 2.0 MiB" in refusal
    numbers = {name: int(value) for name, value in (line.split() for line in lines)}
    assert numbers["whole"] >= numbers["promised"] >= 3
    assert MIB - 2 * numbers["needs"] < numbers["free"]  # room for a run's other files
    assert (numbers["whole"] + 1) * numbers["needs"] > 2 * MIB - numbers["needs"]  # there was no room for another one
