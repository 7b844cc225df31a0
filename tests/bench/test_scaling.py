"""bench.scaling: a step sends the bytes that bench.communication predicts, and leaves no process behind."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

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


class Reports(dict):
    """What a launch of so many processes counted, launched when it is first asked for."""

    def __missing__(self, n: int) -> dict:
        request = scaling.request_of(MODEL, [*scaling.WAYS], micro_batches=2)
        self[n] = scaling.launch(n, request, limit_s=120)
        return self[n]


@pytest.fixture(scope="module")
def reports() -> dict[int, dict]:
    return Reports()


@pytest.mark.parametrize(("n", "way"), EACH_WAY)
def test_each_rank_sends_the_predicted_bytes_in_the_predicted_calls(reports, n, way):
    expected = scaling.by_kind(scaling.predicted(MODEL, n, way, micro_batches=2))
    assert reports[n]["counted"][way] == [expected] * n
    kinds = {"all_reduce"} if way == "ddp" else {"all_reduce", "all_gather", "reduce_scatter"}
    assert expected.keys() == kinds


@pytest.mark.parametrize(("n", "way"), EACH_WAY)
def test_what_crosses_the_wire_is_gloos_rounds_and_headers(reports, n, way):
    sent = reports[n]["wire_bytes"][way]
    if sent is None:
        pytest.skip("needs a network namespace of its own: unshare and ip")
    payload = scaling.gloo_wire_bytes(scaling.predicted(MODEL, n, way, micro_batches=2))
    assert payload < sent < 1.05 * payload


def synthetic_report(collectives: list, rate: float) -> dict:
    """Two processes: steps of 100 ms, 60 ms without synchronization; bare collectives of 1 ms + bytes / rate."""
    bare = {size: [1.0 + 1e3 * size / rate] * 3 for size in (1_000, 1_000_000)}
    return {
        "counted": {"ddp": [scaling.by_kind(collectives)] * 2},
        "wire_bytes": {"ddp": None},
        "steps_ms": {"ddp": [90.0, 100.0, 110.0]},
        "compute_ms": [50.0, 60.0, 70.0],
        "bare_ms": {"all_reduce": bare},
    }


def test_predicted_time_is_compute_and_latencies_and_bytes_at_the_rate():
    collectives = scaling.predicted(MODEL, 2, "ddp")
    report = synthetic_report(collectives, rate=1e8)
    ceiling = {"kind": "all_reduce", **scaling.fit(report["bare_ms"]["all_reduce"])}
    assert ceiling["latency_ms"] == pytest.approx(1.0)
    assert ceiling["gb_per_s"] == pytest.approx(0.1)
    assert ceiling["worst_relative_error"] < 1e-9
    row = scaling.row_of(2, "ddp", report, [ceiling], MODEL, 1, {"tokens_per_s": 200.0})
    num_bytes = sum(each.payload_bytes for each in collectives)
    assert row["communication_ms_predicted"] == pytest.approx(3 * 1.0 + 1e3 * num_bytes / 1e8)
    assert row["communication_ms"] == 40.0
    ratios = [(alone + row["communication_ms_predicted"]) / step for alone, step in ((50, 90), (60, 100), (70, 110))]
    assert row["predicted_over_measured"] == pytest.approx(statistics.median(ratios))
    assert row["tokens_per_s"] == pytest.approx(2 * 17 / 0.1)
    assert row["efficiency"] == pytest.approx(340 / 200 / 2)


@pytest.mark.parametrize("broken", ["calls", "bytes", "one rank"])
def test_bytes_that_were_not_predicted_fail_the_run(monkeypatch, capsys, broken):
    report = synthetic_report(scaling.predicted(MODEL, 2, "ddp"), rate=1e8)
    counted = json.loads(json.dumps(report["counted"]["ddp"]))
    monkeypatch.setattr(scaling, "PRESETS", {"mini": MODEL})
    monkeypatch.setattr(scaling, "WAYS", {"ddp": {"parallel": "ddp"}})
    monkeypatch.setattr(scaling, "launch", lambda *_, **__: report)
    assert scaling.main(["--processes", "2"]) == 0
    assert "| yes |" in capsys.readouterr().out
    for rank in (1,) if broken == "one rank" else (0, 1):
        counted[rank]["all_reduce"][broken == "bytes"] += 1
    report["counted"]["ddp"] = counted
    assert scaling.main(["--processes", "2"]) == 1
    assert "| no |" in capsys.readouterr().out


def test_bad_input_is_all_told_at_once(capsys):
    assert scaling.main(["--processes", "0,x", "--model", "huge", "--sequences", "0", "--seconds", "nan"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bench.scaling: --processes must be numbers from 1 to 16 with commas between, got '0,x'"
    assert lines[1].startswith("bench.scaling: --model must be one of tiny, mini, gpt2, ")
    assert lines[2:] == [
        "bench.scaling: --sequences must be at least 1, got 0",
        "bench.scaling: --seconds must be above 0, got nan",
    ]


def running(word: str) -> list[int]:
    """Processes with this in their command line, zombies left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path, how):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.scaling", "--processes", "2", "--model", "tiny"]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(running(f"{tmp_path}/scaling_")) >= 3, 60)  # the one that forks, and two
        time.sleep(3.0)
        child.send_signal(how)
        code = child.wait(timeout=30)
    finally:
        child.kill()
    wait_until(lambda: not running(f"{tmp_path}/scaling_"), 30)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]


def wait_until(is_so, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)
