"""gpt2 plan: its figures against those that they come from, and every line says what it is."""

import dataclasses
import json
import re

import pytest
import torch
from runs import run
from torch.utils.flop_counter import FlopCounterMode

from engine.chips import CHIPS
from engine.config import PRESETS, batch_shape
from engine.config.presets import with_recipe
from engine.optim import muon
from engine.planning import memory, owners, plan, summary
from engine.planning.communication import communication, muon_communication
from engine.planning.plan import Request
from model.presets import GPT2Config

LABEL = r"counted|estimate|measured|published|assum|asked for|chosen|bound"


def request_of(preset="gpt2", gpus=8, chip="H100", parallel="ddp", recipe="preset", **changes) -> Request:
    config = dataclasses.replace(with_recipe(PRESETS[preset], recipe), parallel=parallel)
    return Request(preset, config, gpus, CHIPS[chip], "bf16", 10**10, **changes)


def test_one_h200_is_expected_to_train_gpt2_as_fast_as_it_was_measured():
    made = plan.make(request_of(gpus=1, chip="H200"))
    assert made["efficiency"]["kind"] == "measured"
    assert made["run"]["tokens_per_s"] == pytest.approx(552_619, rel=0.01)
    assert made["run"]["hours"] == pytest.approx(1e10 / 552_619 / 3600, rel=0.01)


def test_a_figure_counts_for_its_own_training_only_and_is_called_an_assumption_for_others():
    def kind(*words, **changes):
        return plan.make(request_of(*words, **changes))["efficiency"]["kind"]

    assert (kind(), kind("gpt2-xl"), kind(chip="A100")) == ("published",) * 3
    others = [kind("gpt3-13b", chip="H200"), kind(chip="RTX A6000"), kind(parallel="fsdp"), kind("gpt2-large")]
    others += [kind(gpus=1024), kind(gpus=7), kind("gpt3-small")]  # one sequence at a time; another context
    assert set(others) == {"assumption"}


def test_a_host_of_rtx_a6000_is_joined_by_pcie_as_a_bridge_of_nvlink_joins_two_cards():
    made = plan.make(request_of(chip="RTX A6000"))
    assert made["step"]["communication_s"] == pytest.approx(made["step"]["sent_bytes"] / 32e9)


def test_a_time_that_is_the_roofline_bound_says_so():
    for asked, by in ((request_of(gpus=7), "bound"), (request_of(), "mfu"), (request_of("tiny", 1), "bound")):
        made = plan.make(asked)
        assert (made["step"]["by"], made["step"]["compute_s"] == made["step"]["bound_s"]) == (by, by == "bound")
        assert ("by         the bound, which is above" in summary.text(made)) == (by == "bound")


@pytest.mark.parametrize(
    ("preset", "gpus", "parallel"), [("gpt2-xl", 64, "hsdp"), ("gpt2", 7, "ddp"), ("gpt3-175b", 8, "ddp")]
)
def test_the_marked_memory_is_of_the_step_that_is_planned_and_train_takes_that_step(preset, gpus, parallel):
    made = plan.make(request_of(preset, gpus, parallel=parallel))
    step, config = made["step"], dataclasses.replace(PRESETS[preset], tokens_per_step=made["step"]["tokens"])
    row = next(row for row in made["memory"] if (row["parallel"], row["recompute"]) == (parallel, "none"))
    assert (row["micro_batch_size"], row["fits"]) == (step["micro_batch_size"], step["fits"])
    shape = (step["micro_batch_size"], step["micro_batches"])
    assert batch_shape(config, gpus, row["micro_batch_size"]) == shape  # raises if the step does not divide
    needs = f"needs      --tokens-per-step {step['tokens']}, "
    assert (needs in summary.text(made)) == (step["tokens"] != PRESETS[preset].tokens_per_step) == (gpus == 7)


def test_a_step_that_does_not_fit_into_memory_has_no_time_in_the_table():
    made = plan.make(request_of("gpt3-13b", 1024, parallel="fsdp"))
    fits = {f"{row['world_size']:,}": row["fits"] for row in made["communication"]}
    assert (fits["1"], fits["1,024"]) == (False, True)
    table = summary.text(made).split("communication per step")[1]
    rows = dict(re.findall(r"^[> ] +([\d,]+) +\d+ x \d+ (.*)$", table, re.MULTILINE))
    assert {world_size: re.search(r"- +-$", row) is None for world_size, row in rows.items()} == fits


@pytest.mark.parametrize(
    ("parallel", "gpus", "recipe"),
    [("ddp", 8, "preset"), ("fsdp", 64, "preset"), ("hsdp", 64, "preset"), ("ddp", 8, "fast"), ("hsdp", 64, "fast")],
)
def test_a_step_sends_what_communication_counts_and_is_not_faster_than_its_bound(parallel, gpus, recipe):
    asked = request_of("gpt2-xl", gpus, parallel=parallel, recipe=recipe)
    made, model = plan.make(asked), PRESETS["gpt2-xl"].model
    step, of_muon = made["step"], muon_communication(asked.config, gpus, min(8, gpus))
    calls = communication(model, gpus, parallel, micro_batches=step["micro_batches"], shard_size=min(8, gpus))
    assert step["sent_bytes"] == sum(each.wire_bytes for each in calls + of_muon)
    assert (made["optimizer"], bool(of_muon)) == (("muon", True) if recipe == "fast" else ("adamw", False))
    if of_muon:  # which nothing hides
        without = plan.make(request_of("gpt2-xl", gpus, parallel=parallel))["step"]
        added = sum(each.wire_bytes for each in of_muon) / plan.link(asked, "", min(8, gpus), 8)
        shown = [each["communication_s"] - each["hidden_s"] for each in (step, without)]
        assert shown[0] - shown[1] == pytest.approx(added)
    for each in made["communication"]:
        assert each["bound_s"] <= each["seconds"] <= each["compute_s"] + each["muon_s"] + each["communication_s"]
        assert each["tokens"] % (each["world_size"] * each["micro_batch_size"] * 1024) == 0
    assert (made["communication"][0]["sent_bytes"], made["communication"][-1]["world_size"]) == (0, 1024)
    for row in made["memory"]:
        config = dataclasses.replace(asked.config, parallel=row["parallel"], recompute=row["recompute"])
        parts = memory.parts(config, row["micro_batch_size"], "bf16", request_of(gpus=gpus).place(gpus))
        assert {name: row[name] for name in memory.PARTS} == parts


def test_muons_products_are_the_largest_share_counted_by_hand_and_take_their_part_of_the_step():
    # Two columns, per quintic: q, k and v of 2 x 2, each (4 + 4 + 4) * 2 * 2 = 48; c_proj 48; two of 2 x 8, each 64 for
    # x x^T, 16 for G G, 64 for P x = 144. Two ranks: c_attn and mlp.c_proj, 288; c_fc and c_proj, 192.
    model = GPT2Config(n_layer=1, n_head=1, n_embd=2)
    assert [owners.flops(model, size) for size in (1, 2, 3, 100)] == [5 * 480, 5 * 288, 5 * 192, 5 * 144]

    def step(gpus, parallel, recipe):
        return plan.make(request_of("gpt2", gpus, parallel=parallel, recipe=recipe))["step"]

    for gpus, parallel, size in ((1, "ddp", 1), (64, "ddp", 64), (64, "fsdp", 64), (64, "hsdp", 8)):
        fast, slow = step(gpus, parallel, "fast"), step(gpus, parallel, "preset")
        assert fast["muon_flops"] == owners.flops(PRESETS["gpt2"].model, size)
        shown = fast["communication_s"] - fast["hidden_s"]
        assert fast["seconds"] == pytest.approx(fast["compute_s"] + fast["muon_s"] + shown)
        assert (slow["muon_flops"], slow["muon_s"]) == (0, 0)
    alone = plan.make(request_of("gpt2", 1, recipe="fast"))
    assert alone["step"]["muon_s"] == pytest.approx(10 * 30 * 768**3 * 12 / (0.405 * 989e12), rel=0.01)
    assert "  Muon       4.07 ms of it, 0.36%, for 1.631e+12 FLOPs" in summary.text(alone)
    assert "  Muon  " not in summary.text(plan.make(request_of("gpt2", 1)))


def test_muons_products_are_those_that_its_quintics_make_on_a_gpu(monkeypatch):
    monkeypatch.setattr(muon, "GRAM_STEPS", 1)  # as on a GPU
    model = GPT2Config(n_layer=1, n_head=1, n_embd=8)
    with FlopCounterMode(display=False) as counted:
        for name, shape in owners.matrices(model).items():
            muon.orthogonalize(torch.ones(shape).unflatten(0, (owners.parts(name), -1)))
    assert counted.get_total_flops() == owners.flops(model, 1)


def test_a_budget_buys_the_tokens_that_take_as_long():
    made = plan.make(request_of(budget_hours=24.0))
    seconds = made["budget"]["tokens"] / made["run"]["tokens_per_s"]
    assert seconds == pytest.approx(24 * 3600)
    best = made["budget"]["compute_optimal"]
    assert best["hours"] <= 24
    assert best["tokens"] == 20 * plan.make(request_of(best["preset"]))["parameters"]


def test_a_budget_names_the_presets_that_do_not_fit_into_memory():
    made = plan.make(request_of(gpus=64, budget_hours=1e4))
    left_out = made["budget"]["too_large"]
    assert left_out[0] == "gpt3-6.7b"
    for name in left_out:
        assert not plan.make(request_of(name, 64))["step"]["fits"]
    assert f"left out, as they do not fit into memory with ddp, recompute none: {left_out[0]}" in " ".join(
        summary.text(made).split()
    )


def test_every_line_fits_and_says_what_it_is():
    most = {"gpus": 1_000_000, "chip": "A100", "parallel": "fsdp"}
    huge = dataclasses.replace(request_of("gpt3-175b", **most, price=1e9, budget_hours=1e9), tokens=10**18)
    small = dataclasses.replace(request_of("tiny", 1, "RTX A6000"), tokens=1)
    for asked in (request_of(price=2.5, budget_hours=24.0), request_of("gpt3-175b", 1024), huge, small):
        made = plan.make(asked)
        lines = summary.text(made).split("\n")
        assert max(map(len, lines)) <= 80
        rows = {line for line in lines if re.match(r"[> ] +[\d,]+ +\d+ x \d+ |[> ] (ddp|fsdp|hsdp) ", line)}
        assert len(rows) == len(made["memory"]) + len(made["communication"])  # one line each
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
        (["gpt2", "--recipe", "fsat"], "plan: --recipe must be one that is known, got 'fsat'; did you mean \"fast\"?"),
        (["gpt2", "--budget", "3d"], "--budget must be hours such as 24h, up to 1e+09, or money such as 5000"),
        (["gpt2", "--budget=-5h"], "got '-5h'"),
        (["gpt2", "--budget", "2e9h"], "got '2e9h'"),
        (["gpt2", "--budget", "500"], "must come with --price-per-gpu-hour, got '500' alone; for hours write 500h"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(capsys, words, said):
    assert run("plan", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
