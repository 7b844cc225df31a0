"""Helpers that start, read and compare runs: in this process, under torchrun, or as checkpoints alone.

Floats are compared as hex, files by their bytes.
"""

import os
import signal
import subprocess
from pathlib import Path

import forks
import pytest
import torch
from conftest import ROOT, SMALL
from torch import nn

from engine import cli
from engine.health.stopping import SIGNALS
from engine.run import checkpoint, metrics

TIMINGS = {"step_ms", "data_ms", "compute_ms", "communication_ms", "eval_ms", "checkpoint_ms"}
TIMINGS |= {"tokens_per_s", "peak_gib"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*args: str) -> int:
    """Runs a command in this process and returns its exit code."""
    try:
        return cli.main(list(args))
    except SystemExit as done:
        return done.code


def train(out: Path, shards: Path, *flags: str) -> int:
    """Trains in this process and returns the exit code."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["train", *SMALL, "--data", str(shards), "--out", str(out), *flags])
        return exit_info.value.code
    finally:
        for number, handler in before.items():  # a run that was asked to stop ignores them until its process ends
            signal.signal(number, handler)


def torchrun(num_processes: int, out: Path, shards: Path, *flags: str) -> forks.Done:
    """Trains on ranks as torchrun starts them, and waits for all. They are forks: see forks.py."""
    command = [ROOT / "engine" / "train.py", *SMALL, "--data", shards, "--out", out, *flags]
    return forks.run(*command, ranks=num_processes)


def measured(out: Path) -> list[dict]:
    """Rows of metrics.jsonl without the timings, floats as hex."""
    rows = metrics.read_rows(out / "metrics.jsonl")
    return [
        {key: value.hex() if isinstance(value, float) else value for key, value in row.items() if key not in TIMINGS}
        for row in rows
    ]


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step_*"))


def assert_same_run(left: Path, right: Path) -> None:
    """Asserts that two runs have the same rows, samples, weights and optimizer state, to the bit."""
    assert measured(left) == measured(right)
    assert (left / "samples.txt").read_bytes() == (right / "samples.txt").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (newest(left) / name).read_bytes() == (newest(right) / name).read_bytes()


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """Process id of each rank."""
    pids = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{child}/environ").read_text().split("\0"))
        if "RANK" in environment:
            pids[int(environment["RANK"])] = int(child)
    return pids


def save_filled(out: Path, step: int, keep_last: int = 10) -> Path:
    """Saves a checkpoint of a tiny model, all of whose weights are `step`. Returns its path."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    nn.init.constant_(model.bias, step)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    nn.init.constant_(model.weight, step)
    nn.init.constant_(model.bias, step)
    return checkpoint.save(out, {"step": step}, model, optimizer, keep_last)


def load_filled(saved: checkpoint.Checkpoint) -> int:
    """Loads a checkpoint of save_filled and returns its step. Asserts that all weights equal it."""
    model = nn.Linear(3, 2)
    checkpoint.load_weights(saved, model)
    checkpoint.load_optimizer(saved, model, torch.optim.AdamW(model.parameters(), fused=True))
    assert all((p == saved.step).all() for p in model.parameters())
    return saved.step


def steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((out / "checkpoints").glob("step_*"))]


def refuse(line: str) -> None:
    raise AssertionError(f"nothing to warn of, but: {line}")
