"""Ends: done and out of time, a signal in the last evaluation, before any save, after skips, without memory."""

import json
import os
import signal
import time

import pytest
import torch
from runs import assert_same_run, newest, train
from safetensors.torch import load_file

from engine import evaluation
from engine.run import checkpoint
from engine.tokens import batches
from model.gpt2 import GPT2

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


def test_a_run_that_only_skips_ends_and_has_saved_no_such_number(shards, tmp_path, capfd, monkeypatch):
    forward = GPT2.forward
    calls = []

    def spoiled(self, tokens, targets=None):
        calls.append(None)
        out = forward(self, tokens, targets)
        return out * float("nan") if self.training and len(calls) > 8 else out

    monkeypatch.setattr(GPT2, "forward", spoiled)
    flags = ["--num-steps", "30", "--save-every", "1", "--eval-every", "None", "--max-skipped", "5"]
    assert train(tmp_path / "run", shards, *flags) == 3
    assert "got 5 updates in a row that were not" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "heartbeat").read_text())["state"] == "failed"
    for path in (tmp_path / "run/checkpoints").glob("step_*"):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


def test_running_out_of_memory_names_the_flag_and_the_next_smaller_value(shards, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(batches.Batches, "at", lambda *_: torch.empty(10**15))
    assert train(tmp_path / "run", shards, "--num-steps", "3", "--eval-every", "None") == 2
    output = capfd.readouterr().err
    assert "got out of memory at --micro-batch-size 4" in output
    assert "try --micro-batch-size 2" in output
    assert "Traceback" not in output
