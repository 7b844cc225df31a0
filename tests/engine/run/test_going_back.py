"""`--resume PATH` goes back once: later checkpoints are set aside, and the branch goes on from its newest."""

import dataclasses
import errno
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from runs import steps, train

from engine import config
from engine.config import TrainConfig
from engine.errors import BadInput
from engine.run import branch, checkpoint, directory, metrics, resume
from engine.run.checkpoint import Checkpoint

RECORD = ("metrics.jsonl", "samples.txt")


@functools.cache  # parsing takes longer than all else here
def parsed_flags(*flags: str) -> TrainConfig:
    return config.parse([*SMALL, "--num-steps", "99", *flags], "test")


def parsed(out: Path, *flags: str, resume_from: Path | str = "auto") -> TrainConfig:
    return dataclasses.replace(parsed_flags(*flags), out=str(out), resume=str(resume_from))


def save(out: Path, *at: int, keep_last: int = 9) -> None:
    """Saves checkpoints of these steps, as a run does that writes a row and a sample before each."""
    train_config = parsed(out)
    identity = resume.identity(train_config, "bytes", "d", "fp32")
    tensors = {"model.weight": torch.ones(1), "optimizer.weight.step": torch.ones(1)}
    for step in at:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        with (out / RECORD[0]).open("a") as file:
            file.write(json.dumps({"step": step - 1, "tokens": 0, "of": out.name}) + "\n")
        with (out / RECORD[1]).open("a") as file:
            file.write(f"=== step {step - 1} ===\n{out.name}\n\n")
        state = {
            "step": step,
            "tokens": 0,
            "val_loss": None,
            "identity": identity,
            "config": config.to_dict(train_config),
        }
        checkpoint.write(out, state, tensors, keep_last, print)


def find(out: Path, resume_from: Path | str, *flags: str) -> tuple[Checkpoint | None, str]:
    """(checkpoint that a run goes on from, what it prints), in place of starting one."""
    lines = []
    train_config = parsed(out, *flags, resume_from=resume_from)
    identity = resume.identity(train_config, "bytes", "d", "fp32")
    return resume.find_checkpoint(train_config, identity, lines.append), "\n".join(lines)


def step_of(out: Path, resume_from: Path | str = "auto") -> int | None:
    found, _ = find(out, resume_from)
    return None if found is None else found.step


def at(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step_{step:08d}"


def everything(out: Path) -> dict[str, bytes]:
    """Content of every file below a directory by its path, without what a run notes of itself."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name not in ("latest", "went_back")}


@pytest.fixture
def out(tmp_path) -> Path:
    """A run with checkpoints of steps 10, 20 and 30."""
    save(tmp_path / "run", 10, 20, 30)
    return tmp_path / "run"


# ---- One run ------------------------------------------------------------------------------------------------------


def test_going_back_sets_later_ones_aside_and_then_goes_on_from_the_newest_of_the_branch(out):
    record = {name: (out / name).read_bytes() for name in RECORD}
    before = everything(out)
    found, said = find(out, at(out, 10))
    aside = out / "checkpoints" / "aside_1"
    assert found.step == 10
    assert said.count("\n") == 0
    assert f"went back to {at(out, 10)}: 2 checkpoints, and a copy of the record, are set aside in {aside}" in said
    assert steps(out) == [10]
    assert sorted(os.listdir(aside)) == [*RECORD, "step_00000020", "step_00000030"]
    assert {name: (aside / name).read_bytes() for name in RECORD} == record
    moved = {name.replace("checkpoints/step", "checkpoints/aside_1/step"): name for name in before}
    after = everything(out)
    assert all(before[name] == after.get(name, after.get(there)) for there, name in moved.items())  # nothing is lost

    assert step_of(out) == step_of(out, at(out, 10)) == 10
    save(out, 15)
    found, said = find(out, at(out, 10))
    assert found.step == 15
    assert f"goes on from its newest checkpoint, of step 15; to go back once more, delete {out / 'went_back'}" in said
    assert step_of(out) == 15
    assert step_of(out, os.path.relpath(at(out, 10))) == 15  # the same path, spelled otherwise
    save(out, 25, 35, keep_last=1)
    assert not at(out, 10).exists()
    assert step_of(out, at(out, 10)) == 35  # PATH itself was rotated away

    (out / "went_back").unlink()
    with pytest.raises(BadInput, match="must be a directory such as"):
        find(out, at(out, 10))
    assert steps(out) == [35]
    assert step_of(out, aside / "step_00000020") == 20  # back to the branch that was left
    assert steps(out) == []
    assert [path.name for path in (out / "checkpoints").iterdir()] in (["aside_1", "aside_2"], ["aside_2", "aside_1"])
    assert (out / RECORD[0]).read_bytes() == record[RECORD[0]]  # its record, of which Metrics drops the rows from 20 on
    assert step_of(out) == 20
    save(out, 21)
    assert step_of(out) == step_of(out, aside / "step_00000020") == 21


def test_a_run_that_is_moved_remembers_where_it_went_back_to(out, tmp_path):
    assert step_of(out, at(out, 10)) == 10
    save(out, 12)
    out.rename(tmp_path / "elsewhere")
    assert step_of(tmp_path / "elsewhere", at(tmp_path / "elsewhere", 10)) == 12


def test_the_newest_has_nothing_to_set_aside(out):
    found, said = find(out, at(out, 30))
    assert (found.step, said, steps(out)) == (30, "", [10, 20, 30])
    save(out, 40)
    assert step_of(out, at(out, 30)) == 40


def test_what_is_refused_moves_nothing(out):
    (at(out, 20) / "model.safetensors").write_bytes(b"")
    before = everything(out)
    for path, flags, sentence in (
        (at(out, 20), [], "step_00000020 must be whole, but model.safetensors must have"),
        (at(out, 11), [], "must be a directory such as"),
        (at(out, 10), ["--seed", "5"], "these changed\n  seed 1 -> 5"),
        (at(out, 10), ["--num-steps", "9"], "--num-steps must be at least the 10 steps"),
    ):
        with pytest.raises(BadInput) as refused:
            find(out, path, *flags)
        assert sentence in str(refused.value)
    assert everything(out) == before
    assert not (out / "went_back").exists()


@pytest.mark.parametrize("content", ["", "[]", "4", "{}", '{"to": 4}', "\0"])
def test_a_damaged_memory_is_a_sentence_and_no_going_back(out, content):
    assert step_of(out, at(out, 10)) == 10
    (out / "went_back").write_text(content)
    for resume_from in ("auto", at(out, 10)):
        with pytest.raises(BadInput, match=r"went_back must be as gpt2 train wrote it, got .*; delete it"):
            find(out, resume_from)


# ---- Another run --------------------------------------------------------------------------------------------------


def test_another_run_s_checkpoint_sets_all_of_out_s_own_aside(out, tmp_path):
    there = tmp_path / "other"
    save(there, 5, 50)
    before = everything(there)
    found, said = find(out, at(there, 5))
    assert found.path == at(there, 5)
    assert "3 checkpoints" in said
    assert steps(out) == []
    assert not (out / "latest").exists()
    assert {row["of"] for row in metrics.read_rows(out / RECORD[0])} == {"other"}  # the record of the weights it has
    assert "run" in (out / "checkpoints" / "aside_1" / RECORD[1]).read_text()
    assert step_of(out) == step_of(out, at(there, 5)) == 5  # nothing saved yet
    save(out, 7)
    assert step_of(out) == step_of(out, at(there, 5)) == 7
    assert everything(there) == before


def test_a_new_run_begins_at_another_s_checkpoint_once(tmp_path):
    save(tmp_path / "other", 5)
    (tmp_path / "run").mkdir()
    assert find(tmp_path / "run", at(tmp_path / "other", 5))[1] == ""
    save(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "other")
    assert step_of(tmp_path / "run", at(tmp_path / "other", 5)) == 6


# ---- Kills --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of SIGKILL: nothing of the program catches it."""


@pytest.mark.parametrize("to", ["own", "other"])
def test_a_kill_between_any_two_steps_of_going_back_loses_nothing(tmp_path, to):
    save(tmp_path / "whole" / "other", 5)
    save(tmp_path / "whole" / "run", 10, 20, 30)
    shutil.copytree(tmp_path / "whole", tmp_path / "template")

    def made(where: Path) -> Path:
        shutil.copytree(tmp_path / "template", where)
        return where / "run"

    def target(run: Path) -> Path:
        return at(run, 10) if to == "own" else at(run.parent / "other", 5)

    whole = tmp_path / "whole" / "run"
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        count(patch, calls, None)
        find(whole, target(whole))
    assert len(calls) >= 9
    for killed_at in range(len(calls)):
        run = made(tmp_path / str(killed_at))
        with pytest.MonkeyPatch.context() as patch:
            count(patch, [], killed_at)
            with pytest.raises(Killed):
                find(run, target(run))
        resume_from = "auto" if killed_at % 2 and (run / "went_back").exists() else target(run)
        assert step_of(run, resume_from) == (10 if to == "own" else 5), (killed_at, calls[killed_at])
        leftovers = {name: content for name, content in everything(run).items() if ".writing" not in name}
        assert leftovers.keys() == everything(whole).keys()
        assert leftovers["checkpoints/aside_1/metrics.jsonl"] == everything(whole)["checkpoints/aside_1/metrics.jsonl"]
    save(run, 35)
    assert step_of(run) == step_of(run, target(run)) == 35


def count(patch, calls: list[str], killed_at: int | None) -> None:
    """Notes every change on the disk; call `killed_at` raises Killed in place of it."""
    for name in ("rename", "replace", "unlink", "mkdir", "write_text", "write_bytes"):
        original = getattr(Path, name)

        def counted(path, *args, name=name, call=original, **options):
            if len(calls) == killed_at:
                raise Killed
            calls.append(name)
            return call(path, *args, **options)

        patch.setattr(Path, name, counted)


def test_a_disk_that_refuses_is_a_sentence_and_the_same_command_finishes(out, monkeypatch):
    rename = Path.rename

    def refusing(path, target):
        if path.name == "step_00000030":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(BadInput, match=r"Input/output error.*; nothing is deleted, and the same command goes on"):
        find(out, at(out, 10))
    monkeypatch.undo()
    assert step_of(out, at(out, 10)) == 10
    assert sorted(os.listdir(out / "checkpoints" / "aside_1")) == [*RECORD, "step_00000020", "step_00000030"]


def test_an_interrupted_move_whose_disk_is_gone_is_refused(out, monkeypatch):
    rename = Path.rename

    def killed(path, target):
        if path.name == "step_00000030":
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        find(out, at(out, 10))
    monkeypatch.undo()
    shutil.rmtree(out / "checkpoints" / "aside_1" / "step_00000020")
    with pytest.raises(BadInput, match="must hold step_00000020, which was to be set aside, got none there"):
        find(out, at(out, 10))


# ---- Checkpoints that vanished ------------------------------------------------------------------------------------


def empty(root: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path)


def a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("mine")


@pytest.mark.parametrize("harm", [empty, shutil.rmtree, a_file])
@pytest.mark.parametrize("resume_from", ["auto", "path"])
def test_announced_checkpoints_that_are_gone_are_no_fresh_start(out, tmp_path, harm, resume_from):
    save(tmp_path / "other", 5)
    harm(out / "checkpoints")
    record = [(out / name).read_bytes() for name in RECORD]
    with pytest.raises(BadInput, match="--resume never"):
        find(out, "auto" if resume_from == "auto" else at(tmp_path / "other", 5))
    assert [(out / name).read_bytes() for name in RECORD] == record
    assert find(out, "never") == (None, "")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_checkpoints_that_cannot_be_listed_are_no_fresh_start(out, monkeypatch, number):
    def refusing(path, scandir=os.scandir):
        if Path(path).name == "checkpoints":
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for latest in (True, False):
        with pytest.raises(BadInput, match=rf"checkpoints: {os.strerror(number)}; make it readable .*--resume never"):
            find(out, "auto")
        if latest:
            (out / "latest").unlink()  # a run of an older version


def test_a_run_that_announced_none_starts_afresh_and_an_older_version_s_goes_on(out, tmp_path):
    (tmp_path / "new" / "checkpoints" / ".writing_step_00000010").mkdir(parents=True)
    assert find(tmp_path / "new", "auto") == (None, "")
    (out / "latest").unlink()
    assert find(out, "auto")[0].step == 30
    shutil.rmtree(at(out, 30))
    save(out, 40)
    assert (out / "latest").read_text() == "step_00000040\n"
    shutil.rmtree(at(out, 40))
    found, said = find(out, "auto")
    assert found.step == 20
    assert said == f"passing over {at(out, 40)}: it was saved, and is missing"


# ---- Training -----------------------------------------------------------------------------------------------------


def test_a_branch_is_trained_to_its_end_and_its_loss_is_that_of_its_weights(shards, tmp_path, capfd):
    out, flags = tmp_path / "run", ["--save-every", "2", "--eval-every", "2", "--keep-last", "9"]
    assert train(out, shards, *flags, "--num-steps", "4") == 0
    first = json.loads((at(out, 4) / "state.json").read_text())["val_loss"]
    back = [*flags, "--num-steps", "4", "--resume", str(at(out, 2)), "--optim.lr", "0.01", "--resume-changed"]
    capfd.readouterr()
    for outcome in ("done", "this run is complete"):
        assert train(out, shards, *back) == 0
        val_loss = json.loads((at(out, 4) / "state.json").read_text())["val_loss"]
        assert val_loss != first
        assert f"{outcome}: 4 steps, final validation loss {val_loss:.4f} nats per byte\n" in capfd.readouterr().out
    history = json.loads((out / "config.json").read_text())["history"]
    assert [(entry["step"], entry["config"]["optim"]["lr"]) for entry in history] == [(0, 2e-3), (2, 0.01)]

    rows = (out / RECORD[0]).read_text().replace('"val_loss": ', '"val_loss": 9')
    (out / RECORD[0]).write_text(rows)  # the record is not what is reported
    assert train(out, shards, *flags, "--num-steps", "4", "--optim.lr", "0.01") == 0
    assert f"final validation loss {val_loss:.4f} " in capfd.readouterr().out
    assert "=== step" not in (report := directory.report(parsed(out), "byte", "done", 4, None))
    assert "validation loss not known, step 4 was saved without one; see it with gpt2 eval --run" in report
    assert "(no sample of step 3)" in directory.report(parsed(out), "byte", "done", 3, float("nan"))
    assert "nan" not in directory.report(parsed(out), "byte", "done", 3, float("nan"))

    (out / "checkpoints").rename(tmp_path / "unmounted")
    record = [(out / name).read_bytes() for name in RECORD]
    assert train(out, shards, *flags, "--num-steps", "4", "--optim.lr", "0.01") == 2
    assert (
        "must hold the checkpoints of this run, step_00000004 at least, got no such directory" in capfd.readouterr().err
    )
    assert [(out / name).read_bytes() for name in RECORD] == record
    assert branch.run_of(at(out, 4)) == branch.run_of(out / "checkpoints" / "aside_1" / "step_00000004") == out
