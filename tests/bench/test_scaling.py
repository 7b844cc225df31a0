"""bench.scaling: a step sends the bytes that engine.planning.communication computes, and leaves no process behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import scaling
from model.presets import GPT2Config

MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=130, n_positions=17, vocab_size=257)  # 1.8 MB: two buckets; odd axes
EACH_WAY = [
    pytest.param(n, way, id=f"{n} processes, {way}", marks=[pytest.mark.slow] if n == 4 else [])
    for n in (2, 4)
    for way in scaling.WAYS
]


# A launch whose ranks are forks of a process that has imported what they need.
LAUNCH = """
import functools, json, sys
import torch.multiprocessing
from bench import scaling
from model.presets import GPT2Config
torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
request = scaling.Request(GPT2Config(**json.loads(sys.argv[2])), micro_batches=2)
print(json.dumps(scaling.launch(int(sys.argv[1]), request)))
"""


class Reports(dict):
    """What a launch of so many processes counted, launched when it is first asked for."""

    def __missing__(self, n: int) -> dict:
        done = forks.run("-c", LAUNCH, n, json.dumps(dataclasses.asdict(MODEL)))
        assert done.returncode == 0, done.stderr
        self[n] = json.loads(done.stdout)
        return self[n]


@pytest.fixture(scope="module")
def reports() -> dict[int, dict]:
    return Reports()


@pytest.mark.parametrize(("n", "way"), EACH_WAY)
def test_each_rank_sends_the_computed_bytes_in_the_computed_calls(reports, n, way):
    expected = scaling.computed(MODEL, n, way, micro_batches=2)
    assert reports[n]["counted"][way] == expected
    kinds = {"all_reduce"} if "ddp" in way else {"all_reduce", "all_gather", "reduce_scatter"}
    if "muon" in way:
        kinds |= {"broadcast"} if "ddp" in way else {"all_to_all"}
    assert expected[0].keys() == kinds


def synthetic_report(world_size: int) -> dict:
    """Steps of 100 ms, 60 ms without synchronization."""
    expected = scaling.computed(MODEL, world_size, "ddp")
    times = {"ddp": [0.09, 0.1, 0.11], "alone": [0.05, 0.06, 0.07]}
    return {"counted": {"ddp": expected}, "times": times}


@pytest.mark.parametrize("broken", [None, "calls", "bytes", "one rank"])
def test_bytes_that_were_not_computed_fail_the_run(monkeypatch, capsys, broken):
    def launch(world_size, request):
        report = json.loads(json.dumps(synthetic_report(world_size)))
        for rank in (1,) if broken == "one rank" else (0, 1) if broken and world_size > 1 else ():
            if world_size > 1:
                report["counted"]["ddp"][rank]["all_reduce"][broken == "bytes"] += 1
        return report

    monkeypatch.setattr(scaling, "PRESETS", {"mini": MODEL})
    monkeypatch.setattr(scaling, "WAYS", {"ddp": {"parallel": "ddp"}})
    monkeypatch.setattr(scaling, "launch", launch)
    assert scaling.main(["--processes", "1", "2"]) == (0 if broken is None else 1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 processes"))
    assert ("the collectives must be" in line) == (broken is not None)
    assert "| 340 tokens/s (" in line  # 2 processes, 17 tokens each, in 100 ms
    assert "| 100.0%" in line  # of twice one process's 170


@pytest.mark.parametrize("flag", ["--processes=0", "--processes=17", "--model=huge", "--sequences=0", "--seconds=nan"])
def test_bad_input_names_its_flag_and_ends_with_code_2(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        scaling.main([flag])
    assert ended.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def children(pid: int) -> set[int]:
    """Every process below this one."""
    try:
        found = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()
    return found.union(*(children(child) for child in found))


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(how):
    command = [sys.executable, "-m", "bench.scaling", "--processes", "2", "--model", "tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(children(child.pid)) >= 2, 60)
        time.sleep(5.0)
        left = children(child.pid)
        child.send_signal(how)
        code = child.wait(timeout=30)
    finally:
        child.kill()
    wait_until(lambda: not any(map(is_running, left)), 30)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]


def wait_until(is_so, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)
