"""`--profile START:STOP`: traces those steps only, in the format of Chrome's trace viewer."""

import dataclasses
import gzip
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from engine.config import PRESETS, parse_profile
from engine.distributed import Ranks
from engine.health import timing
from engine.health.timing import Trace, phase
from model.gpt2 import GPT2, GPT2Config

ONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(PRESETS["tiny"], out=str(tmp_path))


def run(trace: Trace, steps: range) -> None:
    """Trains a small model for these steps, each in a phase of its own."""
    model = GPT2(GPT2Config(1, 2, 16, 8, 257))
    tokens = torch.randint(257, (2, 8))
    for step in steps:
        trace.step(step)
        with phase(f"step {step}"):
            with phase("forward"):
                loss = model(tokens, tokens)
            with phase("backward"):
                loss.backward()


def events(path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def names(path) -> list[str]:
    return [event["name"] for event in events(path) if event.get("ph") == "X"]


@pytest.mark.parametrize(("text", "steps"), [("0:1", (0, 1)), ("10:13", (10, 13))])
def test_start_and_stop_are_read(text, steps):
    assert parse_profile(text) == steps


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "3:3", "4:3", "-1:3", "a:b", "1:2:3", " 1:2", "1.0:2", "1_0:20"])
def test_what_is_no_range_of_steps_is_refused_with_a_sentence(text):
    with pytest.raises(ValueError, match=r"--profile must be START:STOP, .* got '" + text):
        parse_profile(text)


def test_two_steps_are_traced_with_their_phases(config, tmp_path, capsys):
    trace = Trace("2:4", config.out, ONE)
    run(trace, range(6))
    trace.close()
    path = tmp_path / "trace_2_4.json.gz"
    assert capsys.readouterr().out == f"trace of steps 2 to 3: {path}; open it at https://ui.perfetto.dev\n"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    traced = names(path)
    assert [name for name in traced if name.startswith("step ")] == ["step 2", "step 3"]
    assert traced.count("forward") == traced.count("backward") == 2
    assert any(name.startswith("aten::") for name in traced)


def test_the_file_is_a_chrome_trace(config, tmp_path):
    trace = Trace("0:1", config.out, ONE)
    run(trace, range(2))
    complete = [event for event in events(tmp_path / "trace_0_1.json.gz") if event["ph"] == "X"]
    assert complete
    for event in complete:
        assert isinstance(event["name"], str)
        assert event["ts"] > 0
        assert event["dur"] >= 0
        assert {"pid", "tid"} <= event.keys()
    phases = {event["name"]: event for event in complete if event["name"] in ("step 0", "forward", "backward")}
    outer = phases.pop("step 0")
    for inner in phases.values():  # Perfetto draws them as nested
        assert (inner["pid"], inner["tid"]) == (outer["pid"], outer["tid"])
        assert outer["ts"] <= inner["ts"] < inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_a_run_that_ends_inside_leaves_what_there_is(config, tmp_path, capsys):
    trace = Trace("1:100", config.out, ONE)
    run(trace, range(2))
    assert not list(tmp_path.iterdir())
    trace.close()
    assert "trace of step 1:" in capsys.readouterr().out
    assert "step 1" in names(tmp_path / "trace_1_100.json.gz")
    trace.close()
    assert capsys.readouterr().out == ""


def test_a_run_that_begins_inside_traces_the_rest(config, tmp_path):
    trace = Trace("2:6", config.out, ONE)
    run(trace, range(5, 8))
    assert [name for name in names(tmp_path / "trace_2_6.json.gz") if name.startswith("step ")] == ["step 5"]


def test_steps_that_never_come_leave_a_sentence_and_no_file(config, tmp_path, capsys):
    trace = Trace("2:4", config.out, ONE)
    run(trace, range(5, 7))
    trace.close()
    assert capsys.readouterr().out == "no trace: this run did none of the steps 2 to 3\n"
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(config, tmp_path, capsys):
    trace = Trace("0:1", tmp_path / "gone", ONE)
    run(trace, range(2))
    assert capsys.readouterr().out.startswith(f"no trace: {tmp_path / 'gone' / 'trace_0_1.json.gz'} could not be")


def test_only_rank_0_traces(config, tmp_path):
    trace = Trace("0:1", config.out, Ranks(1, 1, 2, torch.device("cpu")))
    run(trace, range(2))
    trace.close()
    assert not list(tmp_path.iterdir())


def test_without_profile_nothing_happens_and_phases_are_free(config, tmp_path, capsys):
    trace = Trace(None, config.out, ONE)
    run(trace, range(2))
    trace.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, phase("mine"):
        pass
    assert "mine" not in [event.name for event in profiler.events()]
    assert timing._is_recording is False


def test_profile_is_checked_without_importing_pytorch():
    program = """
import sys
from engine.config import PRESETS, parse_profile
import dataclasses
assert parse_profile("2:4") == (2, 4)
assert "--profile must be START:STOP" in dataclasses.replace(PRESETS["tiny"], profile="4:2").problems()[0]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
