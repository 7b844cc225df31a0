"""How long one waits: for `gpt2 --help`, and for a run of one step."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine import ROOT
from engine.cli import COMMANDS
from engine.run.verify import checkpoint_damage
from engine.tokens.prepare import PrepareConfig, prepare

ROUNDS = 3
MAX_FIRST_LOSS = 2 * math.log(257)  # nats; bytes drawn at random would cost ln 257

pytest.importorskip("tyro", reason="the command line needs tyro, which is not installed")


def python(*args: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.check_output([sys.executable, *args], cwd=ROOT, env=environment, text=True)


def test_help(measure):
    def check(output: str) -> None:
        for command in COMMANDS:
            assert f"\n  {command} " in output, output

    measure(lambda: python("-m", "engine.cli", "--help"), check, rounds=ROUNDS, peak="none")


def test_run_of_one_step(measure, tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "run"
    prepare([str(ROOT / "engine")], PrepareConfig(out=str(data), tokenizer="bytes", workers=1, val_fraction=0.2))
    flags = f"--num-steps 1 --log-every 1 --eval-tokens 1024 --sample-tokens 1 --data {data} --out {out}".split()

    def check(_: str) -> None:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        (loss,) = [line["loss"] for line in lines if "loss" in line]
        assert 0 < loss < MAX_FIRST_LOSS, lines
        assert checkpoint_damage(out / "checkpoints" / "step_00000001") is None

    def remove() -> None:
        shutil.rmtree(out, ignore_errors=True)

    run = ("-m", "engine.cli", "train", "tiny", *flags)
    measure(lambda: python(*run), check, before=remove, rounds=ROUNDS, peak="none")
