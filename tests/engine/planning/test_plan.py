"""gpt2 plan: its figures against those that they come from, and every line says what it is."""

import dataclasses
import json
import re

import pytest
from runs import run

from engine.chips import CHIPS
from engine.config import PRESETS
from engine.planning import memory, plan, summary
from engine.planning.communication import communication
from engine.planning.plan import Request

LABEL = r"counted|estimate|measured|published|assum|asked for|chosen|bound"


def request_of(preset="gpt2", gpus=8, chip="H100", parallel="ddp", **changes) -> Request:
    config = dataclasses.replace(PRESETS[preset], parallel=parallel)
    return Request(preset, config, gpus, CHIPS[chip], "bf16", 10**10, **changes)


def test_one_h200_is_expected_to_train_gpt2_as_fast_as_it_was_measured():
    made = plan.make(request_of(gpus=1, chip="H200"))
    assert made["efficiency"]["kind"] == "measured"
    assert made["run"]["tokens_per_s"] == pytest.approx(552_619, rel=0.01)
    assert made["run"]["hours"] == pytest.approx(1e10 / 552_619 / 3600, rel=0.01)


def test_a_figure_of_another_size_or_gpu_is_called_an_assumption():
    assert plan.make(request_of("gpt3-13b", chip="H200"))["efficiency"]["kind"] == "assumption"
    assert plan.make(request_of(chip="RTX A6000"))["efficiency"]["kind"] == "assumption"


@pytest.mark.parametrize(("parallel", "gpus"), [("ddp", 8), ("fsdp", 64), ("hsdp", 64)])
def test_a_step_sends_what_communication_counts_and_is_not_faster_than_its_bound(parallel, gpus):
    made = plan.make(request_of("gpt2-xl", gpus, parallel=parallel))
    model, step = PRESETS["gpt2-xl"].model, made["step"]
    calls = communication(model, gpus, parallel, micro_batches=step["micro_batches"], shard_size=min(8, gpus))
    assert step["sent_bytes"] == sum(each.wire_bytes for each in calls)
    for each in made["communication"]:
        assert each["bound_s"] <= each["seconds"] <= each["compute_s"] + each["communication_s"]
        assert each["tokens"] % (each["world_size"] * each["micro_batch_size"] * 1024) == 0
    assert (made["communication"][0]["sent_bytes"], made["communication"][-1]["world_size"]) == (0, 1024)
    for row in made["memory"]:
        config = dataclasses.replace(PRESETS["gpt2-xl"], parallel=row["parallel"], recompute=row["recompute"])
        parts = memory.parts(config, row["micro_batch_size"], "bf16", request_of(gpus=gpus).place(gpus))
        assert {name: row[name] for name in memory.PARTS} == parts


def test_a_budget_buys_the_tokens_that_take_as_long():
    made = plan.make(request_of(budget_hours=24.0))
    seconds = made["budget"]["tokens"] / made["run"]["tokens_per_s"]
    assert seconds == pytest.approx(24 * 3600)
    best = made["budget"]["compute_optimal"]
    assert best["hours"] <= 24
    assert best["tokens"] == 20 * plan.make(request_of(best["preset"]))["parameters"]


def test_every_line_fits_and_says_what_it_is():
    for asked in (request_of(price=2.5, budget_hours=24.0), request_of("gpt3-175b", 1024, parallel="hsdp")):
        lines = summary.text(plan.make(asked)).split("\n")
        assert max(map(len, lines)) <= 80
        for block in "\n".join(lines).split("\n\n")[2:]:
            assert re.search(LABEL, block), block


def test_json_is_the_whole_plan(capsys):
    assert run("plan", "gpt2", "--tokens", "2.5e9", "--budget", "48h", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["tokens"], made["budget"]["hours"]) == (2_500_000_000, 48.0)
    assert made["parameters"] == 124_439_808


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpt5"], "plan: the preset must be one that exists, got 'gpt5'; did you mean"),
        (["gpt2", "--gpu", "h10"], "got 'h10'; did you mean \"h100\"?"),
        (["gpt2", "--gpus", "0"], "--gpus must be 1 to 1,000,000, got 0"),
        (
            ["gpt2", "--gpus", "12"],
            "a multiple of the 8 of --gpus-per-node, or fewer, got 12; the nearest is 8",
        ),
        (["gpt2", "--tokens", "inf"], "--tokens must be a number of 1 to 1e+18 such as 10B"),
        (["gpt2", "--tokens", "1e400"], "got '1e400'"),
        (["gpt2", "--tokens", "0"], "got '0'"),
        (["gpt2", "--budget", "500"], "must come with --price-per-gpu-hour, got '500' alone; for hours write 500h"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(capsys, words, said):
    assert run("plan", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
