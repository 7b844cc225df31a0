"""Training end to end: its files, bitwise resume, and agreement between processes."""

import json
import math
import shutil
from pathlib import Path

import pytest
from runs import assert_same_run, measured, newest, torchrun, train
from safetensors.torch import load_file

from engine.run import metrics


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """A run of 12 steps with dropout that evaluated and saved every 3."""
    out = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--num-steps", "12", "--eval-every", "3", "--save-every", "3", "--keep-last", "9"]
    assert train(out, shards, *flags, "--model.dropout", "0.1") == 0
    return out


def test_a_run_leaves_everything_the_design_promises(finished):
    names = {"config.json", "metrics.jsonl", "samples.txt", "loss_curve.png", "lr_schedule.png", "checkpoints"}
    assert names | {"heartbeat", "latest"} == {path.name for path in finished.iterdir()}
    steps = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert steps == ["step_00000003", "step_00000006", "step_00000009", "step_00000012"]
    rows = metrics.read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(13))
    assert all(row["tokens"] == 256 * row["step"] for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6, 9, 12]
    assert all({"loss", "lr", "grad_norm", "tokens_per_s", "step_ms", "peak_gib"} <= row.keys() for row in rows[:-1])
    assert (finished / "samples.txt").read_text().count("=== step") == 5


def test_it_learns(finished):
    losses = [row["loss"] for row in metrics.read_rows(finished / "metrics.jsonl") if "loss" in row]
    assert abs(losses[0] - math.log(257)) < 1.0
    assert losses[-1] < losses[0] - 1.0


def test_checkpoint_keys_are_the_raw_model_s(finished):
    keys = load_file(newest(finished) / "model.safetensors").keys()
    assert "wte.weight" in keys
    assert "h.0.attn.c_attn.weight" in keys
    assert not any(key.startswith(("_orig_mod", "module")) for key in keys)


@pytest.mark.parametrize("stopped_at", [3, 9])
def test_resume_is_bitwise_identical(finished, shards, tmp_path, stopped_at):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > stopped_at:
            shutil.rmtree(path)
    flags = ["--num-steps", "12", "--eval-every", "3", "--save-every", "3", "--keep-last", "9"]
    assert train(out, shards, *flags, "--model.dropout", "0.1") == 0
    assert_same_run(finished, out)


def test_resume_is_bitwise_identical_with_muon(shards, tmp_path):
    flags = ["--num-steps", "6", "--save-every", "3", "--eval-every", "None", "--optim.name", "muon"]
    assert train(tmp_path / "whole", shards, *flags) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(newest(tmp_path / "stopped"))
    assert train(tmp_path / "stopped", shards, *flags) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_evaluating_saving_and_logging_change_nothing_that_is_trained(finished, shards, tmp_path):
    flags = ["--num-steps", "12", "--eval-every", "None", "--save-every", "None", "--log-every", "5"]
    assert train(tmp_path / "run", shards, *flags, "--model.dropout", "0.1") == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (newest(tmp_path / "run") / name).read_bytes() == (newest(finished) / name).read_bytes()


def test_a_finished_run_says_so_and_shows_its_sample(finished, shards, capfd):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train(finished, shards, "--num-steps", "12", "--model.dropout", "0.1") == 0
    output = capfd.readouterr().out
    assert "this run is complete: 12 steps, final validation loss" in output
    assert "def " in output
    assert "loss_curve.png" in output
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_another_seed_is_another_run(finished, shards, tmp_path):
    assert train(tmp_path / "run", shards, "--num-steps", "2", "--seed", "2", "--model.dropout", "0.1") == 0
    assert measured(tmp_path / "run")[0]["loss"] != measured(finished)[0]["loss"]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_low_precision_trains_float32_weights(shards, tmp_path, precision):
    assert train(tmp_path / "run", shards, "--num-steps", "6", "--precision", precision) == 0
    losses = [row["loss"] for row in metrics.read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert all(
        str(t.dtype) == "torch.float32" for t in load_file(newest(tmp_path / "run") / "model.safetensors").values()
    )
    state = json.loads((newest(tmp_path / "run") / "state.json").read_text())
    assert bool(state["scaler"]) == (precision == "fp16")


@pytest.mark.slow
def test_a_run_goes_on_in_another_precision(finished, shards, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    flags = ["--num-steps", "12", "--save-every", "3", "--keep-last", "9", "--model.dropout", "0.1"]
    flags += ["--resume-changed"]
    assert train(tmp_path / "run", shards, *flags, "--precision", "fp16") == 0
    shutil.rmtree(newest(tmp_path / "run"))
    assert train(tmp_path / "run", shards, *flags, "--num-steps", "13") == 0


def test_a_changed_run_is_refused_with_what_changed(finished, shards, capfd):
    before = sorted(path.name for path in (finished / "checkpoints").iterdir()), (finished / "config.json").read_bytes()
    assert train(finished, shards, "--num-steps", "12", "--tokens-per-step", "512", "--seed", "3") == 2
    output = capfd.readouterr().err
    assert "and its numbers belong to its old settings, but these changed" in output
    assert "\n  model.dropout 0.1 -> 0.0\n  tokens_per_step 256 -> 512\n  seed 1 -> 3\n" in output
    assert "to see its report all the same, add --resume-changed" in output
    changed = ["--num-steps", "12", "--model.dropout", "0.1", "--optim.lr", "1e-3", "--resume-changed"]
    assert train(finished, shards, *changed) == 0
    output = capfd.readouterr().out
    assert (
        "numbers of this finished run belong to its old settings, of which these changed\n  optim.lr 0.002 -> 0.001\n"
        in output
    )
    assert "this run is complete: 12 steps, final validation loss" in output
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert (names, (finished / "config.json").read_bytes()) == before


def test_resume_never_sets_the_old_run_aside(finished, shards, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert train(out, shards, "--num-steps", "1", "--resume", "never") == 0
    assert measured(tmp_path / "run.old1") == measured(finished)
    assert [row["step"] for row in measured(out)] == [0, 1]


EIGHT = ["--num-steps", "8", "--eval-every", "4", "--model.dropout", "0.1"]


@pytest.fixture(scope="module")
def two_processes(shards, tmp_path_factory) -> Path:
    """A run of 8 steps on two processes, with dropout."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = torchrun(2, out, shards, *EIGHT, "--save-every", "4")
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_follow_one_process_s_loss_curve(two_processes, shards, tmp_path):
    assert train(tmp_path / "one", shards, *EIGHT) == 0
    one, two = (metrics.read_rows(out / "metrics.jsonl") for out in (tmp_path / "one", two_processes))
    for left, right in zip(one, two, strict=True):
        for name in ("loss", "val_loss"):
            assert left.get(name) == pytest.approx(right.get(name), abs=1e-5)


def test_one_process_goes_on_from_two(two_processes, shards, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(two_processes, out)
    shutil.rmtree(newest(out))
    assert train(out, shards, *EIGHT, "--save-every", "4") == 0
    for left, right in zip(
        metrics.read_rows(out / "metrics.jsonl"), metrics.read_rows(two_processes / "metrics.jsonl"), strict=True
    ):
        assert left.get("loss") == pytest.approx(right.get("loss"), abs=1e-5)
