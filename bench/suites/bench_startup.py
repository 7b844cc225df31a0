"""How long one waits: for `gpt2 --help`, for what the training program imports, and for a run of one step.

Each is a process of its own, from its start to its end; memory is the most that it held. What it printed or wrote is
checked first. The run of one step also opens its data, evaluates, samples and saves. `pytest bench/suites/bench_startup.py`
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.machine import ROOT
from bench.results import exact
from engine.cli import COMMANDS
from engine.run import checkpoint
from engine.tokens.prepare import PrepareConfig, prepare

ROUNDS = 3
MODULES = ("torch", "engine.tokens.batches", "engine.evaluation", "engine.run.plots", "model.gpt2")
IMPORTS = f"""
import runpy, sys
made = runpy.run_path("engine/train.py")  # under another name than __main__: it trains nothing
print([name for name in {MODULES} if name in sys.modules], made["main"].__name__)
"""
MAX_FIRST_LOSS = 2 * math.log(257)  # nats; bytes drawn at random would cost ln 257

if importlib.util.find_spec("tyro") is None:
    pytest.skip("the command line needs tyro, which is not installed", allow_module_level=True)


@dataclass
class Finished:
    """A process that has ended."""

    code: int
    output: str
    peak_bytes: int  # 0 if nobody looked, or it cannot be read here


def run(*args: str, is_watched: bool) -> Finished:
    """Runs Python to its end; on Linux a watched one is asked for its peak memory every few milliseconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    peak_bytes = 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *args], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        status = Path(f"/proc/{process.pid}/status")  # its resource usage would count this process, which it forks from
        while is_watched and process.poll() is None:
            with contextlib.suppress(OSError):
                found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"), re.MULTILINE)
                peak_bytes = 1024 * int(found[1]) if found else peak_bytes  # a process at its end has none
            time.sleep(0.005)
        process.wait()
        output.seek(0)
        return Finished(process.returncode, output.read(), peak_bytes)


def measure_process(measure, args: list[str], check, before=None) -> None:
    """Times the process; the first, which is checked, is watched."""
    peaks: list[int] = []

    def once() -> Finished:
        done = run(*args, is_watched=not peaks)
        peaks.append(done.peak_bytes)
        return done

    measure(once, check, before=before, rounds=ROUNDS, peak="none")
    measure.info["peak"] = exact(peaks[0], "B")._asdict()


def test_help(measure):
    def check(done: Finished) -> None:
        assert done.code == 0, done.output
        for command in COMMANDS:
            assert f"\n  {command} " in done.output, done.output

    measure_process(measure, ["-m", "engine.cli", "--help"], check)


def test_imports_of_training(measure):
    def check(done: Finished) -> None:
        assert done.code == 0, done.output
        assert done.output.split("\n")[-2] == f"{list(MODULES)} main", done.output

    measure_process(measure, ["-c", IMPORTS], check)


def test_run_of_one_step(measure, tmp_path: Path):
    words, out = tmp_path / "data", tmp_path / "run"
    prepare([str(ROOT / "engine")], PrepareConfig(out=str(words), tokenizer="bytes", workers=1, val_fraction=0.2))
    flags = f"--num-steps 1 --log-every 1 --eval-tokens 1024 --sample-tokens 1 --data {words} --out {out}".split()

    def check(done: Finished) -> None:
        assert done.code == 0, done.output
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 1, lines
        assert 0 < losses[0] < MAX_FIRST_LOSS, lines
        assert checkpoint.damage(out / "checkpoints" / "step_00000001") is None

    def remove() -> None:
        shutil.rmtree(out, ignore_errors=True)

    measure_process(measure, ["-m", "engine.cli", "train", "tiny", *flags], check, before=remove)
