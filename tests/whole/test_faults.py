"""Faults of real runs: signals, kills, hangs, ranks that differ, losses and gradients that are not finite.

Runs are in this process where one is enough, forks where ranks must agree, and under torchrun where it launches them
again or hands on a signal. The rows are those of docs/reliability.md.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import forks
import pytest
import torch
from conftest import ROOT, SMALL
from runs import ENVIRONMENT, assert_same_run, measured, newest, train, workers
from safetensors.torch import load_file

from engine import evaluation
from engine.health import stopping
from engine.run import checkpoint, metrics
from engine.tokens import shards
from engine.tokens.prepare import PrepareConfig, prepare
from model.gpt2 import GPT2

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
KILLS = int(os.environ.get("GPT2_KILLS", "1"))  # how often the worker-kill test is repeated


def arguments(out: Path, shards: Path, *flags: str, faults: str = "slow:9:0") -> list[str]:
    """Script and arguments of a rank that trains, with faults (none by default)."""
    script = [str(Path(__file__).with_name("faulty.py")), faults]
    return [*script, *SMALL, "--data", str(shards), "--out", str(out), *flags]


def launched(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """torchrun with two such ranks."""
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*LAUNCHER, *launcher, *words], **options)


def run_two(out: Path, shards: Path, *flags: str, **options) -> forks.Done:
    """Trains on two ranks without torchrun, and waits."""
    return forks.run(*arguments(out, shards, *flags, **options), ranks=2)


def wait_for_row(out: Path, step: int, launcher: subprocess.Popen) -> None:
    """Waits until the run has logged `step`. Fails if the run ends first."""
    deadline = time.monotonic() + 150  # a restart among them, on a loaded machine
    while time.monotonic() < deadline:
        rows = metrics.read_rows(out / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} within 150 s")


# ---- Row 1: resume ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_shards(tmp_path_factory) -> Path:
    """Token shards whose epochs end inside the sixth and the eleventh step."""
    root = tmp_path_factory.mktemp("few")
    (root / "text").mkdir()
    (root / "text" / "book.txt").write_text(" ".join(str(n * n) for n in range(340)))
    prepare([str(root / "text")], PrepareConfig(out=str(root / "few"), tokenizer="bytes", workers=1, val_fraction=0.2))
    return root / "few"


@pytest.fixture(scope="module")
def every_step(few_shards, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of twelve steps with dropout, saved after each, and its flags."""
    flags = ["--num-steps", "12", "--eval-every", "4", "--save-every", "1", "--keep-last", "99", "--skip-z-score", "3"]
    flags += ["--model.dropout", "0.1", "--grace-seconds", "600"]  # so that a slow machine does not fail the tests
    out = tmp_path_factory.mktemp("every") / "run"
    assert train(out, few_shards, *flags) == 0
    windows = shards.TokenStream.open(few_shards, "train", 257).num_windows(32)
    assert windows < 8 * 6 < 8 * 12 < 3 * windows  # two epochs end within the run
    return out, flags


@pytest.mark.parametrize("step", [4, 5, 6, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 10, 11))])
def test_resume_is_bitwise_at_on_and_around_an_evaluation_and_the_end_of_an_epoch(
    every_step, few_shards, tmp_path, step
):
    quiet, flags = every_step
    out = tmp_path / "run"
    shutil.copytree(quiet, out)
    for path in (out / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    assert train(out, few_shards, *flags) == 0
    assert_same_run(quiet, out)
    assert [row["step"] for row in measured(out)] == list(range(13))


# ---- Rows 2, 9, 11: two ranks -------------------------------------------------------------------------------------

STEPS = ["--num-steps", "36", "--eval-every", "24", "--save-every", "10", "--check-replicas-every", "18"]
EACH_STEP = ["--save-every", "1", "--eval-every", "None"]
STEPS += ["--micro-batch-size", "2"]  # two micro-batches per rank, between which a signal is heeded


@pytest.fixture(scope="module")
def quiet(shards, tmp_path_factory) -> Path:
    """An undisturbed run on two ranks."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    done = run_two(out, shards, *STEPS)
    assert done.returncode == 0, done.stderr
    return out


SLOWLY = "slow:0:0,slow:1:0"


def stop(launcher: subprocess.Popen, out: Path, number: int, to_rank: int | None, after: int) -> str:
    """Sends a signal to torchrun, or to a rank, once the run has logged this step. Returns what it printed."""
    wait_for_row(out, after, launcher)
    os.kill(launcher.pid if to_rank is None else workers(launcher)[to_rank], number)
    stdout, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "by a signal: saved" in stdout, stdout + stderr
    beat = json.loads((out / "heartbeat").read_text())
    assert beat["state"] == "stopped"
    assert beat["step"] == checkpoint.read(newest(out)).step >= after
    assert beat["step"] % 10, "it stopped at its own time, not at a checkpoint that was due"
    return stdout + stderr


@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_killed_worker_is_started_again_and_the_run_ends_the_same(quiet, shards, tmp_path, attempt):
    """SIGTERM to torchrun after the restart changes nothing either."""
    out, step = tmp_path / "run", 13 + 10 * (attempt % 2)
    words = arguments(out, shards, *STEPS, faults=f"{SLOWLY},kill:1:{step}")
    said = stop(launched(*words, launcher=("--max-restarts", "1")), out, signal.SIGTERM, None, after=step + 2)
    assert f"going on from {out}" in said
    assert run_two(out, shards, *STEPS).returncode == 0
    assert_same_run(quiet, out)


@pytest.mark.slow
def test_signals_to_the_launcher_or_one_rank_cost_nothing(quiet, shards, tmp_path):
    """SIGTERM to torchrun, then SIGINT to rank 1 of the resumed run; the next resume runs to the end."""
    out = tmp_path / "run"
    words = arguments(out, shards, *STEPS, faults=SLOWLY)
    stop(launched(*words), out, signal.SIGTERM, None, after=13)
    said = stop(launched(*words), out, signal.SIGINT, 1, after=22)
    assert re.search(r"exitcode *: 75 ", said)
    assert run_two(out, shards, *STEPS).returncode == 0
    assert_same_run(quiet, out)


# ---- Row 9: one process, at every place ---------------------------------------------------------------------------


def signal_once(monkeypatch, owner, name: str) -> None:
    """Sends this process SIGTERM when the function is called for the second time."""
    calls, call = [], getattr(owner, name)

    def interrupted(*args, **options):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


PLACES = {
    "an update": (torch.optim.AdamW, "step"),
    "evaluation": (evaluation, "mean_losses"),
    "sampling": (evaluation, "sample"),
    "saving": (checkpoint, "write"),
}


SLOW = [pytest.param(place, marks=pytest.mark.slow) for place in ("an update", "sampling")]


@pytest.mark.parametrize("place", ["evaluation", "saving", *SLOW])
def test_a_signal_during_any_part_of_a_step_costs_nothing(every_step, few_shards, tmp_path, place):
    quiet, flags = every_step
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        signal_once(monkeypatch, *PLACES[place])
        assert train(out, few_shards, *flags) == 75
    assert checkpoint.read(newest(out)).step < 12
    assert json.loads((out / "heartbeat").read_text())["state"] == "stopped"
    assert train(out, few_shards, *flags) == 0
    assert_same_run(quiet, out)


@pytest.mark.parametrize("call", [1, 10])
def test_a_signal_between_micro_batches_keeps_all_updates_before_and_ends_to_the_bit(
    every_step, few_shards, tmp_path, capfd, monkeypatch, call
):
    """In a forward pass of two per step: what is saved are the updates before that step, or nothing."""
    quiet, flags = every_step
    out, calls, forward = tmp_path / "run", [], GPT2.forward

    def interrupted(self, tokens, targets=None):
        if self.training:
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.05)
        return forward(self, tokens, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT2, "forward", interrupted)
        assert train(out, few_shards, *flags, "--save-every", "None") == 75
    made = call // 2  # updates whole before this one, or with this last forward pass
    output = capfd.readouterr()
    assert "SIGUSR1: stopping after this micro-batch" in output.err
    assert f"stopped at step {made} of 12 by a signal: {'saved' if made else 'no update was made'}" in output.out
    assert len(calls) == call, "it stops after this micro-batch"
    assert [int(path.name[-8:]) for path in (out / "checkpoints").glob("step_*")] == ([made] if made else [])
    assert train(out, few_shards, *flags) == 0
    assert_same_run(quiet, out)


def test_a_save_is_due_every_so_many_minutes(few_shards, tmp_path):
    flags = ["--num-steps", "4", "--eval-every", "None", "--save-every", "None", "--keep-last", "9"]
    assert train(tmp_path / "run", few_shards, *flags, "--save-every-minutes", "1e-9") == 0
    assert [int(path.name[-8:]) for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [2, 4]
    assert (train(tmp_path / "other", few_shards, *flags), len([*(tmp_path / "other/checkpoints").iterdir()])) == (0, 1)


@pytest.mark.slow
def test_a_signal_during_the_first_compile(few_shards, tmp_path):
    flags = ["--num-steps", "6", "--eval-every", "None", "--compile", "--grace-seconds", "600"]
    sent = []

    def interrupt(*_: object) -> None:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    torch._dynamo.callback.callback_handler.register_start_callback(interrupt)
    try:
        assert train(tmp_path / "run", few_shards, *flags) == 75
    finally:
        torch._dynamo.callback.callback_handler.remove_start_callback(interrupt)
    assert sent
    assert 0 < checkpoint.read(newest(tmp_path / "run")).step < 6
    assert train(tmp_path / "run", few_shards, *flags) == 0
    assert train(tmp_path / "quiet", few_shards, *flags) == 0
    assert_same_run(tmp_path / "quiet", tmp_path / "run")


def test_max_minutes_saves_and_stops_in_time_and_the_same_command_goes_on(every_step, few_shards, tmp_path):
    quiet, flags = every_step
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stopping, "launched_at", lambda: stopping.now() - 60)  # a minute ago; two are allowed
        monkeypatch.setattr(stopping, "MARGIN", 60.0)
        assert train(tmp_path / "run", few_shards, *flags, "--max-minutes", "2") == 75
    beat = json.loads((tmp_path / "run" / "heartbeat").read_text())
    assert (beat["state"], beat["reason"]) == ("stopped", "--max-minutes")
    assert 0 < beat["step"] < 12
    assert train(tmp_path / "run", few_shards, *flags) == 0
    assert_same_run(quiet, tmp_path / "run")


# ---- Rows 10, 12: ranks that hang ---------------------------------------------------------------------------------


@pytest.mark.slow  # test_lost_ranks and test_heartbeat have a rank that hangs
def test_a_rank_that_hangs_is_named_by_the_one_that_waited(shards, tmp_path):
    flags = [*STEPS, "--timeout-minutes", "0.05", "--grace-seconds", "1"]
    done = run_two(tmp_path / "run", shards, *flags, faults="hang:1:15")
    assert done.codes == [4, 4]
    assert "rank 0 at step 15 (update): rank 1 was at step 15 (data)" in done.stderr
    assert "rank 1 at step 15 (data): rank 0 was at step 15 (update)" in done.stderr
    assert checkpoint.read(newest(tmp_path / "run")).step == 10


@pytest.mark.slow
def test_a_signal_while_a_peer_hangs_ends_within_the_grace_time(shards, tmp_path):
    began = time.monotonic()
    flags = [*STEPS, "--grace-seconds", "3"]
    done = run_two(tmp_path / "run", shards, *flags, faults="hang:1:15,term:0:15")
    assert time.monotonic() - began < 60  # not after the ten minutes of --timeout-minutes
    assert "could not save within the 3 s of --grace-seconds" in done.stderr
    assert 143 in done.codes
    assert checkpoint.read(newest(tmp_path / "run")).step == 10


@pytest.fixture(scope="module")
def harmed(shards, tmp_path_factory) -> tuple[Path, forks.Done]:
    """A run whose loss is NaN on rank 1 at step 3 and a gradient infinite on rank 0 at step 5; at step 9 it ends."""
    out = tmp_path_factory.mktemp("harmed") / "run"
    flags = ["--num-steps", "12", *EACH_STEP, "--keep-last", "19", "--check-replicas-every", "1"]
    return out, run_two(out, shards, *flags, faults="nan:1:3,inf:0:5,token:1:9")


def test_one_launch_two_ranks_a_bad_token_on_one_ends_both_with_its_code_and_one_sentence(harmed):
    out, done = harmed
    assert done.codes == [2, 2]
    assert done.stderr.count("every token must be below the vocabulary size") == 1
    for word in ("--timeout-minutes", "NCCL_SOCKET_IFNAME", "Traceback (most recent call last)"):
        assert word not in done.stderr
    beat = json.loads((out / "heartbeat").read_text())
    assert (beat["state"], beat["reason"][:8]) == ("failed", "rank 1: ")
    assert "every token must be below" in beat["reason"]


@pytest.mark.slow
def test_a_bug_on_one_rank_keeps_its_traceback_there_and_ends_the_other_in_silence(shards, tmp_path):
    done = run_two(tmp_path / "run", shards, *STEPS, faults="bug:1:15")
    assert done.stderr.count("ZeroDivisionError: a bug of ours") == 1
    assert "network" not in done.stderr
    assert done.codes == [1, 1]


SHORT = ["--timeout-minutes", "0.05"]  # 3 s


@pytest.mark.slow
def test_a_suspension_of_all_ranks_longer_than_the_timeout_is_no_hang(shards, tmp_path):
    out = tmp_path / "run"
    launcher = launched(*arguments(out, shards, *STEPS, *SHORT, faults=SLOWLY))
    wait_for_row(out, 15, launcher)
    pids = workers(launcher).values()
    for number, seconds in ((signal.SIGSTOP, 12), (signal.SIGCONT, 0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)
    _, stderr = launcher.communicate(timeout=90)
    assert launcher.returncode == 0, stderr
    assert json.loads((out / "heartbeat").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_validation_longer_than_the_timeout_is_no_hang(shards, tmp_path):
    flags = ["--num-steps", "2", "--eval-every", "None", "--eval-tokens", "200000"]
    began = time.monotonic()
    done = run_two(tmp_path / "run", shards, *flags, *SHORT, faults="eval:1:0")  # rank 0 waits for rank 1
    assert done.returncode == 0, done.stderr
    row = metrics.read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert time.monotonic() - began > 6, row


# ---- Rows 13, 14, 15: ranks that differ, numbers not finite ----------------------------------------------------------


def test_ranks_with_other_flags_or_data_are_refused_and_named(shards, few_shards, tmp_path):
    script = """if True:
        import os, runpy, sys
        rank = int(os.environ["RANK"])
        sys.argv = [*sys.argv[3:], "--seed", str(rank), "--data", sys.argv[1 + rank]]
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    words = (shards, few_shards, ROOT / "engine" / "train.py", *SMALL, "--out", tmp_path / "run")
    done = forks.run("-c", script, *words, ranks=2)
    assert done.codes == [2, 2]
    assert "train: every rank must run the same thing, but these differ" in done.stderr
    assert "--seed: 0 on rank 0; 1 on rank 1" in done.stderr
    assert re.search(r"\bdata: [0-9a-f]{16} on rank 0; [0-9a-f]{16} on rank 1", done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_drifts_is_found_and_nothing_of_it_is_saved(shards, tmp_path):
    done = run_two(tmp_path / "run", shards, *STEPS, faults="nudge:1:25")
    assert done.codes == [3, 3]
    assert "must hold the same weights to the bit" in done.stderr
    assert checkpoint.read(newest(tmp_path / "run")).step == 20


def test_all_ranks_skip_an_update_that_is_not_finite_on_one(harmed):
    out, done = harmed
    saved = [load_file(path / "model.safetensors") for path in sorted((out / "checkpoints").glob("step_*"))]
    assert len(saved) >= 8, done.stderr
    for step, (before, after) in enumerate(pairwise(saved), start=1):
        is_same = all(torch.equal(before[name], after[name]) for name in before)
        assert is_same == (step in (3, 5)), step
    rows = metrics.read_rows(out / "metrics.jsonl")[:8]
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert ["loss" in row for row in rows] == [True] * 3 + [False] + [True] * 4
