"""Ranks that fall silent: a real process that is killed or stopped ends the others with exit code 4."""

import json
import os
import threading
from pathlib import Path

import forks
import pytest
from conftest import ROOT, SMALL

from engine import rendezvous
from engine.distributed import Ranks
from engine.errors import BAD_INPUT, LOST
from engine.health.heartbeat import HEARTBEAT, Silence

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# Two ranks for each signal, which connect as under torchrun. Rank 1 sends itself the signal. Rank 0 sleeps, as if it
# waited for a GPU, so that no collective fails. Rank 1 does so too after SIGCONT, which changes nothing.
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGCONT")
GONE = """
import json, os, signal, socket, sys, time
from engine import config, distributed
from engine.health import heartbeat
heartbeat.SILENT = 3.0
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", LOCAL_RANK="0")
os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"  # as torchrun sets it
pids = {}
for name in sys.argv[2].split():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    out = f"{sys.argv[1]}/{name}"
    os.mkdir(out)
    for rank in (0, 1):
        os.environ["RANK"] = str(rank)
        pids[name, rank] = os.fork()
        if pids[name, rank] == 0:
            os.dup2(os.open(f"{out}/stderr{rank}", os.O_CREAT | os.O_WRONLY), 2)
            flags = config.parse([*sys.argv[3:], "--out", out], "test")
            with distributed.process_group() as ranks, heartbeat.Heartbeat(flags, ranks) as watched:
                watched.open(17)
                watched.begin(4)
                watched.at(17, "update")
                print(os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"], file=sys.stderr, flush=True)
                time.sleep(0.5)
                if rank == 1:
                    os.kill(os.getpid(), getattr(signal, name))
                time.sleep(9)
                os._exit(0)
codes = {name: os.waitstatus_to_exitcode(os.waitpid(pids[name, 0], 0)[1]) for name, rank in pids if rank == 0}
for (name, rank), pid in pids.items():
    if rank == 1:
        os.kill(pid, signal.SIGKILL)
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """Directory with an OUT for each signal, and the exit code of rank 0 for each."""
    root = tmp_path_factory.mktemp("pairs")
    done = forks.run("-c", GONE, root, " ".join(SIGNALS), *SMALL, seconds=90)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_falls_silent_ends_the_others_with_code_4_and_a_sentence(pairs, name):
    root, codes = pairs
    assert codes[name] == LOST
    setting, sentence = (root / name / "stderr0").read_text().splitlines()
    assert setting == "0"  # else NCCL's own thread would abort the process before
    assert "got no report of rank 1 for 3 s at rank 0 at step 17 (update): a process or host is gone" in sentence
    last = json.loads((root / name / HEARTBEAT).read_text())
    assert (last["state"], last["reason"]) == ("failed", "no report of rank 1")


def test_a_rank_whose_main_thread_is_busy_is_not_lost(pairs):
    root, codes = pairs
    assert codes["SIGCONT"] == 0
    assert "no report" not in (root / "SIGCONT" / "stderr0").read_text()


def silences(*readings: tuple[float, dict]) -> dict[int, float]:
    silence = Silence(longest_step=2.0)
    silence._now = readings[0][0]
    for now, places in readings:
        silence.update(places, now)
    return silence.seconds


def test_only_time_without_a_new_report_of_a_rank_that_has_reported_is_silence():
    old, new = (5, "update", 1.0), (5, "update", 2.0)  # the same place a second later
    assert silences((0, {}), (1, {}), (2, {})) == {}  # still starting
    assert silences((0, {1: old}), (1, {1: old}), (3, {1: old})) == {1: 3.0}
    assert silences((0, {1: old}), (1, {1: old}), (3, {1: new})) == {1: 0.0}
    assert silences((0, {1: old, 2: old}), (1, {1: new, 2: old})) == {1: 0.0, 2: 1.0}
    assert silences((0, {1: old}), (600, {1: old})) == {1: 2.0}  # this process was suspended, as rank 1 may have been


def test_only_time_in_which_this_process_runs_counts_while_the_ranks_join(monkeypatch):
    now, jump, left = 0.0, 3600.0, []
    ranks, has_joined, is_late = Ranks(1, 1, 2, None), threading.Event(), threading.Event()

    def wait(seconds: float) -> bool:
        nonlocal now
        now += seconds + jump
        return bool(left) or now > 100 * (1 + jump)  # a hundred ticks

    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: now)
    monkeypatch.setattr(rendezvous.os, "_exit", left.append)
    monkeypatch.setattr(has_joined, "wait", wait)
    rendezvous.watch(ranks.rank, ranks.world_size, 600.0, has_joined, is_late)  # a suspension of an hour at each tick
    assert (left, is_late.is_set()) == ([], False)
    now, jump = 0.0, 0.0
    rendezvous.watch(ranks.rank, ranks.world_size, 60.0, has_joined, is_late)
    assert (left, is_late.is_set()) == ([BAD_INPUT], True)
    assert now == pytest.approx(66, abs=1)
