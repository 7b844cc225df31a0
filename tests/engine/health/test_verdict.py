"""One rank's error ends every rank: two ranks in this process, with a store between them."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL

from engine import config
from engine.distributed import Ranks
from engine.errors import BadInput, Diverged, Lost, PeerFailed, exit_code
from engine.health import heartbeat as module
from engine.health import verdict
from engine.health.heartbeat import HEARTBEAT, Heartbeat

CUT = RuntimeError("Connection closed by peer [127.0.0.1]:1234")


class Left(BaseException):
    """Stands for os._exit, in the thread that calls it."""


@pytest.fixture
def left(monkeypatch) -> dict[str, int]:
    """Exit codes of os._exit, by thread. Ranks share a store, and wait for each other 3 s at most."""
    codes, store = {}, dist.HashStore()

    def leave(code: int) -> None:
        codes[threading.current_thread().name] = code
        raise Left

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(Ranks, "connect_store", lambda self: store)
    monkeypatch.setattr(module, "EVERY", 0.02)
    monkeypatch.setattr(verdict, "HEAD_START", 0.2)
    monkeypatch.setattr(verdict, "CAUSE", 0.6)
    monkeypatch.setattr(verdict, "READERS", 3.0)
    return codes


def start(out: Path, *ends: BaseException | None) -> list[BaseException | None]:
    """Runs a rank for each end in a thread: it raises that, or waits for 1 s. Returns what left each rank."""
    raised: list = [None] * len(ends)
    flags = config.parse([*SMALL, "--out", str(out)], "test")

    def rank(number: int, end: BaseException | None) -> None:
        heartbeat = Heartbeat(flags, Ranks(number, number, len(ends), torch.device("cpu")))
        heartbeat._reporter.name = f"reports of rank {number}"
        try:
            with heartbeat:
                heartbeat.open(3)
                heartbeat.begin(4)
                time.sleep(0.1)
                if end is None:
                    time.sleep(1)
                else:
                    raise end
        except BaseException as error:
            raised[number] = error

    threads = [threading.Thread(target=rank, args=each) for each in enumerate(ends)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize(
    "error", [BadInput("a bad token"), Diverged("loss"), ValueError("a bug"), SystemExit(7)], ids=repr
)
def test_a_rank_that_waits_ends_with_the_code_of_the_one_that_failed(tmp_path, left, error):
    began = time.monotonic()
    raised = start(tmp_path, None, error)
    assert raised[1] is error
    assert left == {"reports of rank 0": exit_code(error)}
    beat = json.loads((tmp_path / HEARTBEAT).read_text())
    assert (beat["state"], beat["reason"]) == ("failed", f"rank 1: {error}")
    assert time.monotonic() - began < 3  # the one that failed did not wait longer than it took the other to read it


def test_a_collective_that_fails_because_its_peer_did_is_no_fault_of_the_network(tmp_path, left):
    raised = start(tmp_path, CUT, BadInput("a bad token"))
    assert str(raised[1]) == "a bad token"
    assert (type(raised[0]), raised[0].code) == (PeerFailed, 2)
    assert json.loads((tmp_path / HEARTBEAT).read_text())["reason"] == "rank 1: a bad token"


def test_a_peer_that_is_gone_without_a_word_is_a_lost_one(tmp_path, left):
    raised = start(tmp_path, CUT, CUT)
    assert [type(error) for error in raised] == [Lost, Lost]
    assert "Connection closed by peer" in json.loads((tmp_path / HEARTBEAT).read_text())["reason"]


def test_what_all_ranks_raise_alike_rank_0_says_alone(tmp_path, left):
    raised = start(tmp_path, *(Diverged("20 in a row") for _ in range(3)))
    assert [type(error) for error in raised] == [Diverged, PeerFailed, PeerFailed]
    assert {exit_code(error) for error in raised} == {3}


def test_a_bug_keeps_its_traceback_on_the_rank_where_it_happened(tmp_path, left):
    raised = start(tmp_path, BadInput("no room"), ValueError("a bug"))
    assert [type(error) for error in raised] == [BadInput, ValueError]


def test_a_save_in_progress_has_its_chance_when_another_rank_fails(tmp_path, left, monkeypatch):
    saved, saved_before = [], []
    leave, store = module.os._exit, Ranks.connect_store(None)
    monkeypatch.setattr(module.os, "_exit", lambda code: (saved_before.append(len(saved)), leave(code)))

    def save() -> None:
        while verdict.read(store) is None:
            time.sleep(0.01)
        time.sleep(0.3)  # the rest of a save that had begun when the other rank failed
        saved.append(True)

    threading.Thread(target=save, name="saver").start()
    start(tmp_path, None, BadInput("a bad token"))
    assert saved_before == [1]
    assert left == {"reports of rank 0": 2}


def test_only_the_first_verdict_holds():
    store = dist.HashStore()
    assert verdict.read(store) is None
    first, second = verdict.Verdict(1, 2, "é\n"), verdict.Verdict(0, 3, "later")
    assert verdict.publish(store, first) == verdict.publish(store, second) == verdict.read(store) == first
