"""Rotation keeps the newest checkpoints and the best, even if a delete fails or a kill interrupts it."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import load_filled, refuse, save_filled, steps
from torch import nn

from engine import config
from engine.config import TrainConfig
from engine.errors import BadInput
from engine.run import checkpoint, directory, export, resume
from engine.run.checkpoint import MANIFEST, SHARDED, STATE
from engine.run.verify import checkpoint_damage
from model.gpt2 import GPT2, GPT2Config


def save(out: Path, step: int, val_loss: float | None, keep_last: int = 1, warn=refuse) -> Path:
    """Saves a checkpoint with one weight, which is `step`. Returns its path."""
    tensors = {"model.weight": torch.tensor([float(step)])}
    return checkpoint.write(out, {"step": step, "val_loss": val_loss}, tensors, keep_last, warn)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# ---- The best one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "best", "kept"),
    [
        pytest.param([3.0, 2.0, 1.0], 3, [3], id="falling"),
        pytest.param([1.0, 2.0, 3.0], 1, [1, 3], id="rising"),
        pytest.param([3.0, 1.0, 2.0, 4.0, 5.0], 2, [2, 5], id="in between"),
        pytest.param([3.0, 1.0, 2.0, 0.5, 5.0], 4, [4, 5], id="a better one replaces it"),
        pytest.param([2.0, 1.0, 3.0, 1.0, 2.0], 2, [2, 5], id="the first of equals"),
        pytest.param([None, None, None], None, [3], id="never evaluated"),
        pytest.param([None, 2.0, None, None], 2, [2, 4], id="evaluated once"),
        pytest.param([math.nan, 2.0, 3.0], 2, [2, 3], id="nan is no loss"),
        pytest.param([2.0, math.nan, math.nan], 1, [1, 3], id="nan later"),
        pytest.param([-math.inf, 2.0, 3.0], 2, [2, 3], id="nor is infinity"),
        pytest.param([math.nan, math.nan], None, [2], id="nothing but nan"),
    ],
)
def test_the_lowest_validation_loss_outlives_rotation(tmp_path, losses, best, kept):
    for step, loss in enumerate(losses, start=1):
        save(tmp_path, step, loss)
    assert steps(tmp_path) == kept
    path = checkpoint.best(tmp_path)
    assert path == (None if best is None else tmp_path / "checkpoints" / f"step_{best:08d}")
    assert all(checkpoint_damage(path) is None for path in (tmp_path / "checkpoints").iterdir())


def test_a_limit_on_open_files_does_not_cost_the_best(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    real, said = os.open, []

    def limited(path, *args, **kwargs):
        if Path(path).match("step_*/state.json"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", limited)
        save(tmp_path, 3, 3.0, warn=said.append)
    assert steps(tmp_path) == [1, 2, 3]
    assert len(said) == 1
    assert "Too many open files" in said[0]
    save(tmp_path, 4, 4.0)
    assert steps(tmp_path) == [1, 4]


def test_the_best_is_kept_besides_the_newest(tmp_path):
    for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0], start=1):
        save(tmp_path, step, loss, keep_last=2)
    assert steps(tmp_path) == [2, 4, 5]


def test_the_best_may_be_later_than_what_was_just_written(tmp_path):
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0)):
        save(tmp_path, step, loss, keep_last=9)
    save(tmp_path, 25, 5.0)
    assert steps(tmp_path) == [25, 30]


@pytest.mark.parametrize("content", ["", "[]", "4", '"x"', "null", "\0\0", '{"val_loss": "low"}', '{"val_loss": null}'])
def test_a_damaged_state_is_nobody_s_best_and_ends_no_save(tmp_path, content):
    bad = save(tmp_path, 1, 0.5, keep_last=9)
    (bad / STATE).write_text(content)
    save(tmp_path, 2, 2.0, keep_last=9)
    assert checkpoint.best(tmp_path).name == "step_00000002"
    save(tmp_path, 3, 3.0)
    assert steps(tmp_path) == [2, 3]


def test_there_is_no_best_where_there_is_no_run(tmp_path):
    assert checkpoint.best(tmp_path / "missing") is None


# ---- Deletes that fail --------------------------------------------------------------------------------------------


def test_a_failed_delete_warns_and_the_next_save_tries_again(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step, None, keep_last=9)
    old, rmtree, warnings = tmp_path / "checkpoints/step_00000001", shutil.rmtree, []

    def refusing(path, *args, **options):
        if path == old:
            raise PermissionError(1, "Operation not permitted", str(path))
        rmtree(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", refusing)
        assert save(tmp_path, 4, None, warn=warnings.append).exists()
    assert steps(tmp_path) == [1, 4]  # the others are deleted
    assert warnings == [
        f"checkpoint: {old} is no longer needed but could not be deleted: [Errno 1] Operation not permitted: '{old}'"
    ]
    save(tmp_path, 5, None)
    assert steps(tmp_path) == [5]


def test_a_half_deleted_one_is_passed_over(tmp_path):
    """A kill during a delete leaves a checkpoint that is older than the newest and does not verify."""
    half, whole = save_filled(tmp_path, 1), save_filled(tmp_path, 2)
    (half / MANIFEST).unlink()
    assert load_filled(checkpoint.newest(tmp_path, refuse)) == 2
    (whole / STATE).write_text("")
    with pytest.raises(BadInput, match=r"step_00000001: manifest\.json is missing"):
        checkpoint.newest(tmp_path, refuse)
    save_filled(tmp_path, 3, keep_last=1)
    assert steps(tmp_path) == [3]


# ---- Replacing a checkpoint of the same step ----------------------------------------------------------------------

FINAL, REPLACED, WRITING = "step_00000005", ".replaced_step_00000005", ".writing_step_00000005"


def copy_of(out: Path, value: int, name: str) -> None:
    """Writes a whole checkpoint of step 5 under this name; its one weight is `value`."""
    tensors = {"model.weight": torch.tensor([float(value)])}
    made = checkpoint.write(out / "elsewhere", {"step": 5}, tensors, 9, refuse)
    made.rename(out / "checkpoints" / name)


def value_of(out: Path) -> float:
    newest = checkpoint.newest(out, refuse)
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(torch.zeros(1))
    checkpoint.load_weights(newest, model)
    return model.weight.item()


@pytest.mark.parametrize(
    ("there", "value"),
    [
        pytest.param({FINAL: 1, WRITING: 2}, 1, id="before the first rename"),
        pytest.param({REPLACED: 1, WRITING: 2}, 1, id="between the two"),
        pytest.param({REPLACED: 1, FINAL: 2}, 2, id="before the old one is deleted"),
        pytest.param({FINAL: 2}, 2, id="after all of it"),
    ],
)
def test_a_kill_while_one_is_replaced_leaves_the_old_or_the_new_one(tmp_path, there, value):
    (tmp_path / "checkpoints").mkdir()
    for name, filled in there.items():
        copy_of(tmp_path, filled, name)
    checkpoint.recover(tmp_path / "checkpoints")
    assert steps(tmp_path) == [5]
    assert value_of(tmp_path) == value
    assert REPLACED not in names(tmp_path)
    checkpoint.recover(tmp_path / "checkpoints")  # a second call changes nothing
    assert value_of(tmp_path) == value
    save(tmp_path, 6, None, keep_last=9)
    assert names(tmp_path) == [FINAL, "step_00000006"]


def test_a_real_kill_between_the_renames_of_a_replacement(tmp_path):
    save(tmp_path, 5, None)
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def last(path, target):
            if path.name == WRITING:
                os._exit(9)
            return rename(path, target)

        Path.rename = last
        checkpoint.write(tmp_path, {"step": 5}, {"model.weight": torch.tensor([7.0])}, 9, print)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert names(tmp_path) == [REPLACED, WRITING]
    checkpoint.recover(tmp_path / "checkpoints")
    assert value_of(tmp_path) == 5


def test_a_rename_that_fails_gives_the_old_one_its_name_back_at_once(tmp_path, monkeypatch):
    save(tmp_path, 5, None)
    rename = Path.rename

    def refusing(path, target):
        if path.name == WRITING:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.write(tmp_path, {"step": 5}, {"model.weight": torch.tensor([7.0])}, 9, refuse)
    assert names(tmp_path) == [FINAL]
    assert value_of(tmp_path) == 5


def test_a_replaced_checkpoint_leaves_nothing_of_the_old_one(tmp_path):
    save(tmp_path, 5, None)
    (tmp_path / "checkpoints" / FINAL / "stranger").touch()
    tensors = {"model.weight": torch.tensor([7.0])}
    checkpoint.write(tmp_path, {"step": 5}, tensors, 9, refuse)
    assert names(tmp_path) == [FINAL]
    assert value_of(tmp_path) == 7
    assert not (tmp_path / "checkpoints" / FINAL / "stranger").exists()


# ---- Shards -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A checkpoint in the layout of a sharded model, with two files."""
    path = save(tmp_path, 1, None)
    (path / SHARDED).mkdir()
    (path / "model.safetensors").rename(path / SHARDED / "a.safetensors")
    (path / SHARDED / "b.safetensors").write_bytes(b"more")
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"]["model.safetensors"]
    for name in ("a", "b"):
        file = path / SHARDED / f"{name}.safetensors"
        manifest["files"][f"{SHARDED}/{name}.safetensors"] = checkpoint._flushed(file)
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint_damage(path) is None
    return path


def test_a_file_among_the_shards_that_is_not_listed_is_damage(sharded):
    """The reader of sharded checkpoints reads every file in the directory."""
    shutil.copy(sharded / SHARDED / "a.safetensors", sharded / SHARDED / "c.safetensors")
    assert checkpoint_damage(sharded) == f"{MANIFEST} must list sharded/c.safetensors"


def test_a_missing_or_changed_shard_is_damage(sharded):
    (sharded / SHARDED / "b.safetensors").write_bytes(b"mora")
    assert checkpoint_damage(sharded) == "sharded/b.safetensors does not match its sha256"
    (sharded / SHARDED / "b.safetensors").unlink()
    assert checkpoint_damage(sharded) == "b.safetensors is missing"
    shutil.rmtree(sharded / SHARDED)
    assert checkpoint_damage(sharded) == "a.safetensors is missing"


# ---- The model of the best ----------------------------------------------------------------------------------------

BYTES = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=257)


@pytest.fixture
def run(tmp_path) -> TrainConfig:
    """A run with checkpoints of steps 1 to 3. Step 2 is the best; ln_f.bias holds the step."""
    train = TrainConfig(out=str(tmp_path), model=BYTES)
    identity = resume.identity(train, "bytes", "none")
    directory.write_config(train, "bytes", {})
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        model = GPT2(BYTES)
        nn.init.constant_(model.ln_f.bias, step)
        state = {"step": step, "val_loss": val_loss, "identity": identity, "config": config.to_dict(train)}
        checkpoint.save(tmp_path, state, model, None, 9)
    return train


@pytest.mark.parametrize(("is_best", "step"), [(True, 2), (False, 3)])
def test_a_run_s_model_is_the_newest_or_the_best(run, is_best, step):
    model, tokenizer, loaded = export.load_model(run.out, refuse, is_best=is_best)
    assert (loaded.step, tokenizer.name, model.training) == (step, "bytes", False)
    assert (model.ln_f.bias == step).all()


def test_without_validation_losses_there_is_no_best(run):
    for path in (Path(run.out) / "checkpoints").iterdir():
        if path.name != "step_00000003":
            shutil.rmtree(path)
    last = checkpoint.read(Path(run.out) / "checkpoints/step_00000003")
    checkpoint.save(run.out, last.state | {"step": 4, "val_loss": None}, GPT2(BYTES), None, 9)
    shutil.rmtree(last.path)
    with pytest.raises(BadInput, match=r"with a validation loss to have a best one, got none; .* newest, of step 4"):
        export.load_model(run.out, refuse, is_best=True)
    assert export.load_model(run.out, refuse)[2].step == 4


def test_a_damaged_best_is_an_error_and_not_another_model(run):
    (Path(run.out) / "checkpoints/step_00000002/model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"step_00000002 must be whole, but model\.safetensors must have"):
        export.load_model(run.out, refuse, is_best=True)
