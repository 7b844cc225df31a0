"""Heartbeat file, hang watchdog and lost peers, on real files, processes and errors."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL

from engine import config
from engine.distributed import Ranks
from engine.errors import LOST, BadInput, Diverged, Lost
from engine.health import heartbeat as module
from engine.health.heartbeat import HEARTBEAT, Heartbeat, account, write_heartbeat

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def heartbeat_of(
    out: Path, rank: int = 0, world_size: int = 1, start: int = 3, timeout_minutes: float = 10.0
) -> Heartbeat:
    flags = ["--out", str(out), "--num-steps", "50", "--timeout-minutes", str(timeout_minutes)]
    ranks = Ranks(rank, rank, world_size, torch.device("cpu"))
    heartbeat = Heartbeat(config.parse([*SMALL, *flags], "test"), ranks)
    heartbeat.open(start)
    heartbeat.begin(4)
    return heartbeat


def beat(out: Path) -> dict:
    return json.loads((out / HEARTBEAT).read_text())


def wait_for(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- Heartbeat ----------------------------------------------------------------------------------------------------


def test_a_heartbeat_is_one_line_of_json_and_leaves_no_other_file(tmp_path):
    write_heartbeat(tmp_path, step=3, state="running", reason="é\n")
    text = (tmp_path / HEARTBEAT).read_text()
    assert text.rstrip() == '{"step": 3, "state": "running", "reason": "\\u00e9\\n"}'
    assert (text.count("\n"), text[-1], len(text)) == (1, "\n", module.WIDTH)
    assert os.listdir(tmp_path) == [HEARTBEAT]


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600", "\udcff"], ids=ascii)
def test_a_long_reason_is_cut_to_what_fits(tmp_path, character):
    for length in (100, 150, 200, 2000, 300_000):
        write_heartbeat(tmp_path, step=1, reason=character * length)
        assert (tmp_path / HEARTBEAT).stat().st_size == module.WIDTH
        kept = len(beat(tmp_path)["reason"])
        assert kept == length or 12 * kept > module.WIDTH - 700


def test_no_reader_ever_sees_half_a_heartbeat(tmp_path):
    sizes = (1, 1500, 20, 700)
    write_heartbeat(tmp_path, reason="")
    is_over, seen = threading.Event(), []

    def read():
        while not is_over.is_set():
            seen.append(len(beat(tmp_path)["reason"]))

    reader = threading.Thread(target=read)
    reader.start()
    for size in sizes * 500:
        write_heartbeat(tmp_path, reason="x" * size)
    wait_for(lambda: len(seen) > 50 or not reader.is_alive())
    assert reader.is_alive()  # else it met half a heartbeat and ended
    is_over.set()
    reader.join()
    assert len(seen) > 50
    assert set(seen) <= {0, *sizes}
    assert len(set(seen)) > 1


def test_a_full_disk_costs_no_heartbeat(tmp_path, monkeypatch):
    write_heartbeat(tmp_path, state="running", reason="")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)  # no new file has room
    monkeypatch.setattr(Path, "write_text", full)
    write_heartbeat(tmp_path, state="failed", reason="a full disk")
    assert beat(tmp_path) == {"state": "failed", "reason": "a full disk"}
    assert os.listdir(tmp_path) == [HEARTBEAT]


def test_a_heartbeat_of_another_size_is_replaced(tmp_path):
    (tmp_path / HEARTBEAT).write_text('{"state": "running"}\n' + "x" * 5000)
    write_heartbeat(tmp_path, state="done", reason="")
    assert beat(tmp_path) == {"state": "done", "reason": ""}


def fail(out: Path, error: Exception, is_open: bool) -> None:
    """A run that fails before its loop, once --out is its own or before."""
    flags = config.parse([*SMALL, "--out", str(out)], "test")
    with Heartbeat(flags, Ranks(0, 0, 1, torch.device("cpu"))) as heartbeat:
        if is_open:
            heartbeat.open(3)
        raise error


@pytest.mark.parametrize("is_open", [False, True])
def test_refused_input_leaves_the_heartbeat_of_the_run_there(tmp_path, is_open):
    write_heartbeat(tmp_path, state="stopped", reason="a signal")
    before = (tmp_path / HEARTBEAT).read_bytes()
    with pytest.raises(BadInput):
        fail(tmp_path, BadInput("weights of another model"), is_open)
    assert (tmp_path / HEARTBEAT).read_bytes() == before


@pytest.mark.parametrize(("there", "error"), [("stopped", MemoryError()), ("running", BadInput("no room"))])
def test_a_start_that_fails_and_one_after_a_kill_leave_a_failed_heartbeat(tmp_path, there, error):
    write_heartbeat(tmp_path, state=there, reason="")
    with pytest.raises(BadInput):
        fail(tmp_path, error, is_open=True)
    assert (beat(tmp_path)["state"], beat(tmp_path)["step"]) == ("failed", 3)
    if isinstance(error, MemoryError):
        assert "the model must fit into the memory of" in beat(tmp_path)["reason"]
        assert "try a smaller preset" in beat(tmp_path)["reason"]


def test_leaving_at_once_writes_the_last_heartbeat_although_the_threads_still_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)
    with heartbeat_of(tmp_path) as heartbeat:
        heartbeat.ends_with("stopped", "a second signal")  # as Stop does before os._exit
        time.sleep(0.05)
        last = beat(tmp_path)
        assert (last["state"], last["reason"]) == ("stopped", "a second signal")


@pytest.mark.parametrize("ends", [("done", ""), ("stopped", "a signal"), ("stopped", "--max-minutes")])
def test_the_heartbeat_says_that_a_run_goes_on_and_how_it_ended(tmp_path, monkeypatch, ends):
    monkeypatch.setattr(module, "EVERY", 0.01)
    began = time.time()
    with heartbeat_of(tmp_path) as heartbeat:
        wait_for((tmp_path / HEARTBEAT).exists)
        first = beat(tmp_path)
        assert began <= first["time"] <= time.time()
        assert first == {"step": 3, "num_steps": 50, "time": first["time"], "state": "running", "reason": ""}
        heartbeat.at(7, "update")
        wait_for(lambda: beat(tmp_path)["step"] == 7)
        moved = beat(tmp_path)
        assert moved["time"] > first["time"]
        time.sleep(0.05)
        assert beat(tmp_path) == moved  # time of the last progress, not of the file
        heartbeat.ends = ends
    assert beat(tmp_path) == {**moved, "state": ends[0], "reason": ends[1]}
    time.sleep(0.05)
    assert beat(tmp_path)["state"] == ends[0]  # no thread writes another


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Diverged("20 in a row"), "20 in a row"),
        (BadInput("no room"), "no room"),
        (KeyboardInterrupt(), "KeyboardInterrupt()"),
        (SystemExit(7), "7"),
        (RecursionError("too deep"), "too deep"),
        (ValueError("shape [1, 2]"), "shape [1, 2]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_that_fails_leaves_its_reason_and_its_own_error(tmp_path, error, reason):
    heartbeat = heartbeat_of(tmp_path)
    heartbeat.at(9, "checkpoint")
    with pytest.raises(type(error)) as raised, heartbeat:
        raise error
    assert raised.value is error
    last = beat(tmp_path)
    assert (last["state"], last["reason"], last["step"]) == ("failed", reason, 9)


def test_a_run_that_leaves_the_loop_in_an_unknown_way_has_failed(tmp_path):
    with heartbeat_of(tmp_path):
        pass
    assert beat(tmp_path)["state"] == "failed"


def test_rank_0_alone_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)
    with heartbeat_of(tmp_path, rank=1):
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_takes_no_heartbeat_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)
    with heartbeat_of(tmp_path / "missing") as heartbeat:
        time.sleep(0.05)
        assert heartbeat._thread.is_alive()
        heartbeat.ends = ("done", "")


# ---- Ranks that are behind -----------------------------------------------------------------------------------------


ALIKE = {0: (5, "update", 99.0), 1: (5, "update", 99.0)}


@pytest.mark.parametrize(
    ("rank", "places", "expected"),
    [
        pytest.param(0, ALIKE, "no other rank is behind", id="alike"),
        pytest.param(
            0,
            ALIKE | {1: (4, "checkpoint", 99.0)},
            "rank 1 was at step 4 (checkpoint) and last heard of 1 s ago",
            id="a step behind",
        ),
        pytest.param(
            0,
            ALIKE | {1: (5, "data", 98.0)},
            "rank 1 was at step 5 (data) and last heard of 2 s ago",
            id="at another part of the step",
        ),
        pytest.param(1, ALIKE | {0: (5, "update", 95.0)}, "no other rank is behind", id="just not silent"),
        pytest.param(
            1,
            ALIKE | {0: (5, "update", 94.0)},
            "rank 0 was at step 5 (update) and last heard of 6 s ago",
            id="silent",
        ),
        pytest.param(1, {1: (5, "update", 99.0)}, "rank 0 was not heard of", id="never heard of"),
        pytest.param(
            0,
            ALIKE | {2: (6, "data", 99.0)},
            "rank 1 was at step 5 (update) and last heard of 1 s ago; "
            "rank 2 was at step 6 (data) and last heard of 1 s ago",
            id="beside this one, behind a third",
        ),
        pytest.param(
            2,
            {0: (7, "eval", 100.0), 1: (6, "update", 40.0), 2: (7, "eval", 100.0), 3: (5, "update", 99.6)},
            "rank 1 was at step 6 (update) and last heard of 60 s ago; "
            "rank 3 was at step 5 (update) and last heard of 0 s ago",
            id="two of four",
        ),
    ],
)
def test_those_are_named_who_are_behind_or_silent(rank, places, expected):
    assert account(rank, max(places) + 1, places, now=100.0) == expected


def test_ranks_tell_each_other_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)
    store = dist.HashStore()
    monkeypatch.setattr(Ranks, "connect_store", lambda self: store)
    with heartbeat_of(tmp_path, 0, 2) as first, heartbeat_of(tmp_path, 1, 2) as second:
        first.at(7, "update")
        second.at(5, "evaluation")
        wait_for(lambda: "step 5 (evaluation)" in first.account() and "step 7 (update)" in second.account())
        assert first.account() == (
            "rank 0 at step 7 (update): rank 1 was at step 5 (evaluation) and last heard of 0 s ago"
        )
        assert second.account().startswith("rank 1 at step 5 (evaluation): ")
        first.ends = second.ends = ("done", "")


# ---- Hangs --------------------------------------------------------------------------------------------------------


HANG = """
import sys, time
import torch
from engine import config
from engine.distributed import Ranks
from engine.health.heartbeat import Heartbeat
def stuck_in_my_own_function():
    time.sleep(60)
flags = config.parse(sys.argv[1:], "test")
heartbeat = Heartbeat(flags, Ranks(0, 0, 1, torch.device("cpu")))
heartbeat.open(0)
heartbeat.ranks = Ranks(0, 0, 2, torch.device("cpu"))  # of two ranks, without a store to ask the other
with heartbeat:
    heartbeat.at(17, "evaluation")
    stuck_in_my_own_function()
"""


def test_a_hang_ends_the_process_with_step_phase_and_stacks(tmp_path):
    flags = [*SMALL, "--out", str(tmp_path), "--timeout-minutes", "0.02"]
    done = forks.run("-c", HANG, *flags, seconds=40)
    assert done.returncode == LOST == 4
    assert "within the 0.02 min of --timeout-minutes, got none for 3 s: " in done.stderr
    assert "rank 0 at step 17 (evaluation): rank 1 was not heard of" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    stacks = tmp_path / "hang_rank0.txt"
    assert str(stacks) in done.stderr
    assert "in stuck_in_my_own_function" in stacks.read_text()
    last = beat(tmp_path)
    assert (last["state"], last["reason"], last["step"]) == ("failed", "hang", 17)


def test_progress_prevents_it_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)
    left = []
    monkeypatch.setattr(Heartbeat, "_leave", lambda self, waited: left.append(waited))
    one = heartbeat_of(tmp_path, timeout_minutes=0.005)  # 0.3 s
    with one:
        time.sleep(0.6)
        one.ends = ("done", "")
    assert left == []  # no watchdog for a single process
    heartbeat = heartbeat_of(tmp_path, timeout_minutes=0.005)
    heartbeat.ranks = Ranks(0, 0, 2, torch.device("cpu"))
    with heartbeat:
        for step in range(20):
            heartbeat.at(step, "update")
            time.sleep(0.05)
        assert left == []
        wait_for(lambda: left)
        assert 0.3 < left[0] < 1
        heartbeat.ends = ("done", "")


# ---- What errors mean ---------------------------------------------------------------------------------------------


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [10.0.0.2]:4711: Connection reset by peer"


def test_a_lost_peer_becomes_a_sentence_with_step_and_hint(tmp_path):
    heartbeat = heartbeat_of(tmp_path, timeout_minutes=0.5)
    heartbeat.at(12, "update")
    with pytest.raises(Lost) as raised, heartbeat:
        raise RuntimeError(f"{GLOO}\nException raised from here\n  frame #0")
    message = str(raised.value)
    got = "Read error [10.0.0.2]:4711: Connection reset by peer"
    assert f"within the 0.5 min of --timeout-minutes, got {got} at rank 0 at step 12 (update): no other rank" in message
    assert "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME" in message
    assert "\n" not in message
    assert beat(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("failing", [lambda: torch.empty(10**15), lambda: bytearray(1 << 60)], ids=["torch", "python"])
def test_memory_that_ran_out_becomes_bad_input_with_the_flag(tmp_path, failing):
    wanted = r"one step must fit .*; try --micro-batch-size 2 .*or --recompute block$"
    with pytest.raises(BadInput, match=wanted), heartbeat_of(tmp_path):
        failing()
    assert beat(tmp_path)["state"] == "failed"


def test_an_ordinary_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="must match the size"), heartbeat_of(tmp_path):
        torch.ones(3) + torch.ones(4)
