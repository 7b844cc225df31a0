"""Ends that come together: done and out of time, a signal in the last evaluation, an end before any save."""

import json
import os
import signal
import time

import pytest
from runs import assert_same_run, newest, train

from engine import evaluation
from engine.run import checkpoint

FLAGS = ["--num-steps", "2", "--eval-every", "None", "--save-every", "None"]


def state(out) -> str:
    return json.loads((out / "heartbeat").read_text())["state"]


def test_a_run_that_is_done_is_done_although_its_time_is_up(shards, tmp_path, capfd):
    assert train(tmp_path / "run", shards, *FLAGS, "--max-minutes", "0.01") == 0
    assert state(tmp_path / "run") == "done"
    assert "done: 2 steps, final validation loss" in capfd.readouterr().out


def test_a_signal_in_the_last_evaluation_saves_the_weights_and_the_same_command_evaluates_them(shards, tmp_path):
    out, quiet, mean_losses = tmp_path / "run", tmp_path / "quiet", evaluation.mean_losses

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.05)
        return mean_losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "mean_losses", interrupted)
        assert train(out, shards, *FLAGS) == 75
    saved = checkpoint.read(newest(out)).state
    assert (saved["step"], saved["val_loss"], state(out)) == (2, None, "stopped")
    assert train(out, shards, *FLAGS) == 0
    assert train(quiet, shards, *FLAGS) == 0
    assert_same_run(quiet, out)
    assert checkpoint.read(newest(out)).state["val_loss"] == checkpoint.read(newest(quiet)).state["val_loss"] > 0


def test_what_a_run_left_that_never_saved_is_kept(shards, tmp_path, capfd):
    out = tmp_path / "run"
    out.mkdir()
    rows = b'{"step": 0, "tokens": 0, "loss": 9.5}\n'
    (out / "metrics.jsonl").write_bytes(rows)
    assert train(out, shards, *FLAGS) == 0
    assert (out / "metrics.jsonl.before1").read_bytes() == rows
    assert "what a run without a checkpoint left is kept as metrics.jsonl.before1" in capfd.readouterr().out
