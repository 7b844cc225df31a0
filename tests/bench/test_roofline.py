"""What bench.roofline makes of counts, ceilings and measured times, and what its command line says."""

import argparse
import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import machine, roofline, roofline_plot
from bench.chips import CHIPS, Chip, faster, from_rows
from bench.communication import num_parameters
from bench.roofline_measure import cases, per_step
from bench.roofline_ops import HEAD, step_ops
from engine import metrics
from model.presets import PRESETS, GPT2Config

SMALL = GPT2Config(n_layer=3, n_head=2, n_embd=48, n_positions=20, vocab_size=200)


# Chips and measured times


def test_a_chip_has_the_peak_by_which_mfu_is_reckoned():
    for name, chip in CHIPS.items():
        assert chip.flops_per_s["bf16"] == 1e12 * metrics.PEAK_TFLOPS[name]
        assert chip.flops_per_s["bf16"] > chip.flops_per_s["tf32"] > chip.flops_per_s["fp32"]
        assert chip.source


def test_of_two_measurements_the_higher_ceilings_hold():
    one, other = Chip("c", "", {"fp32": 3e9}, 1e9), Chip("c", "", {"fp32": 2e9}, 4e9)
    assert faster(one, other) == faster(other, one) == Chip("c", "", {"fp32": 3e9}, 4e9)


def phases(**median_ms: float) -> dict:
    return {name: {"median_ms": ms, "rate": 800.0} for name, ms in median_ms.items()}


GPU = {
    "machine": {"gpu": "NVIDIA H200"},
    "rows": [
        {"section": "ceilings", "op": "ceiling", "contestant": "bf16 matmul", "phases": phases(forward=1.0)},
        {"section": "ceilings", "op": "ceiling", "contestant": "device copy", "phases": phases(forward=1.0)},
        {"section": "accuracy", "op": "attention", "contestant": "bf16", "status": "checked"},
        {
            "section": "attention",
            "op": "attention",
            "contestant": "triton",
            "status": "measured",
            "phases": phases(forward=1.0, backward=2.0, both=3.0),
        },
        {
            "section": "layer_norm",
            "op": "add_layer_norm",
            "contestant": "triton",
            "status": "measured",
            "phases": phases(forward=0.5, backward=0.25),
        },
        {
            "section": "cross_entropy",
            "op": "linear_cross_entropy",
            "contestant": "triton",
            "status": "measured",
            "phases": phases(forward_no_grad=5.0, both=30.0),
        },
        {
            "section": "attention",
            "op": "attention",
            "contestant": "eager",
            "status": "measured",
            "phases": phases(forward=9),
        },
        {"section": "gelu", "op": "bias_gelu", "contestant": "triton", "status": "failed", "reason": "none"},
    ],
}


@pytest.fixture
def gpu_json(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(GPU))
    return path


def run(*args) -> roofline.Roofline:
    namespace = argparse.Namespace(
        **{"model": "gpt2", "chip": "H200", "micro_batch_size": None, "context": None, "precision": None}
        | {"recompute": "none", "tokens_per_step": None, "gpus": 1, "measured": None, "measure": False}
        | {"n_layer": None, "n_embd": None, "n_head": None}
        | dict(args)
    )
    return roofline.build(namespace)


def test_kernel_times_of_a_gpu_stand_beside_their_ops_as_often_as_a_step_calls_them(gpu_json):
    found = run(("measured", gpu_json), ("recompute", "attention"))
    assert found.micro_batches == 8
    assert found.measured == {
        ("attention", "forward"): 8 * 12 * 1.0,
        ("attention again", "backward"): 8 * 12 * 1.0,
        ("attention", "backward"): 8 * 12 * 2.0,
        ("add_layer_norm", "forward"): 8 * 23 * 0.5,
        ("add_layer_norm", "backward"): 8 * 23 * 0.25,
        ("add_layer_norm, ln_f", "forward"): 8 * 0.5,
        (HEAD, ""): 8 * 30.0,
    }
    over = {row["op"]: row["measured_ms"] - row["bound_ms"] for row in found.rows() if row["measured_ms"] is not None}
    assert found.verdict().startswith(f"{max(over, key=over.get)} (")
    assert "costs the most above its bound" in found.verdict()
    head = [op for op in found.ops if op.group == HEAD]
    whole = next(row for row in found.rows() if row["op"] == roofline.TOGETHER)
    assert whole["bound_ms"] == pytest.approx(sum(op.bound_ms(found.chip, "bf16") for op in head))


def test_ceilings_come_from_the_measured_rows_where_the_chip_is_this(gpu_json):
    chip = run(("measured", gpu_json), ("chip", "this")).chip
    assert (chip.name, chip.flops_per_s, chip.bytes_per_s) == ("NVIDIA H200", {"bf16": 8e14}, 8e11)
    assert chip.is_measured
    assert from_rows(GPU["rows"][:1], "x") is None


def test_totals_follow_from_the_ops():
    found = run(("gpus", 8), ("chip", "A100"))
    totals, peak = found.totals(), 312e12
    ops_ms = sum(op.bound_ms(found.chip, "bf16") for op in found.ops)
    assert totals["ops_ms"] == pytest.approx(ops_ms)
    assert totals["forward_ms"] + totals["backward_ms"] + totals["optimizer_ms"] == pytest.approx(ops_ms)
    assert totals["tokens_per_s"] == pytest.approx(524_288 / (1e-3 * ops_ms))
    flops = metrics.flops_per_token(PRESETS["gpt2"], 1024)
    assert totals["mfu"] == pytest.approx(flops * totals["tokens_per_s"] / (8 * peak))
    gradients = 4 * num_parameters(PRESETS["gpt2"])
    assert totals["wire_ms"] == pytest.approx(1e3 * 2 * 7 / 8 * (gradients + 12) / 300e9)
    assert any(op.name == "copy into buckets" for op in found.ops)


def test_every_op_of_a_step_is_timed():
    B, T = 1, 8
    for precision in ("fp32", "bf16"):
        calls = dict(cases(SMALL, B, T, precision, torch.device("cpu")))
        for call in calls.values():
            call()
        ops = step_ops(SMALL, B, T, precision, "block", micro_batches=2)
        measured = per_step(ops, dict.fromkeys(calls, 2.0), "block")
        missing = {op.name for op in ops if op.group != HEAD and (op.name, op.phase) not in measured}
        assert not missing
        assert measured["c_attn again", "backward"] == 2 * SMALL.n_layer * 2.0
        assert measured[HEAD, ""] == 2 * 2.0


# The command line


def said(capsys, *args: str) -> tuple[int, str, str]:
    code = roofline.main(list(args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["gpt5"], "the model must be one that exists, got 'gpt5'"),
        (["--chip", "H20"], """the chip|--chip must be one that is known, got 'H20'; did you mean "H200"?"""),
        (["--context", "2048"], "--context must be at most the model's 1024 positions"),
        (["--micro-batch-size", "0"], "--micro-batch-size must be at least 1"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--n-head", "7"], "n_embd must be a multiple of n_head"),
        (["--gpus", "3"], "--tokens-per-step must be a multiple"),
        (["--measure"], "--chip must be this with --measure"),
        (["--measured", "none.json"], "must be a JSON file of results, got none.json"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(capsys, args, sentence):
    code, out, err = said(capsys, *args)
    assert (code, out) == (2, "")
    assert sentence.split("|")[-1] in err
    assert "Traceback" not in err


def test_results_of_another_step_are_refused(capsys, gpu_json, tmp_path):
    code, _, err = said(capsys, "gpt2-medium", "--measured", str(gpu_json))
    assert code == 2
    assert "holds kernels at the sizes of gpt2" in err
    code, _, err = said(capsys, "--chip", "A100", "--measured", str(gpu_json))
    assert code == 2
    assert "must be what" in err
    assert "was measured on, NVIDIA H200, got A100" in err
    (tmp_path / "half.json").write_text('{"roofline": "gpt2"}')
    code, _, err = said(capsys, "--measured", str(tmp_path / "half.json"))
    assert code == 2
    assert "must be a whole file of results" in err


def test_without_measured_times_it_says_so_and_draws(capsys, tmp_path):
    code, out, _ = said(capsys, "gpt2", "--gpus", "8", "--micro-batch-size", "16", "--out", str(tmp_path / "r.png"))
    assert code == 0
    assert "Nothing is measured here. The op with the largest bound is head " in out
    assert "communication: 0.8713 GB sent by each device" in out
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes((tmp_path / "r.png").read_bytes()[16:20], "big") == 1200  # pixels wide
    table = out.splitlines()
    lines = table[table.index(next(line for line in table if line.startswith("op "))) :]
    assert len({len(line) for line in lines[: lines.index("")]}) == 1, "columns must line up"


def test_what_is_saved_can_be_drawn_again(capsys, monkeypatch, tmp_path, gpu_json):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    code, out, _ = said(capsys, "--measured", str(gpu_json), "--save")
    assert code == 0
    path = tmp_path / "nvidia-h200" / "roofline.json"
    assert path.with_suffix(".png").exists()
    saved = json.loads(path.read_text())
    assert saved["facts"]["torch"] == torch.__version__
    assert saved["measured_on"] == GPU["machine"]
    code, again, _ = said(capsys, "--measured", str(path))
    assert code == 0
    assert again.splitlines()[-1] == out.splitlines()[-3]  # the sentence, after which the first said what it wrote


def test_bars_hold_the_whole_bound_and_what_was_measured(gpu_json):
    found = run(("measured", gpu_json))
    bars = roofline_plot.groups(found.ops, found.measured, found.chip, "bf16")
    assert sum(bar["compute"] + bar["memory"] for bar in bars) == pytest.approx(found.totals()["ops_ms"])
    assert sum(bar["measured"] or 0.0 for bar in bars) == pytest.approx(sum(found.measured.values()))
    names = [bar["name"] for bar in bars]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_this_machine_is_measured_and_every_op_beside_its_bound(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    args = ["tiny", "--chip", "this", "--measure", "--micro-batch-size", "2", "--save"]
    code, out, _ = said(capsys, *args)
    assert code == 0
    saved = json.loads(next(tmp_path.glob("*/roofline.json")).read_text())
    assert saved["chip"]["is_measured"]
    head = [row for row in saved["ops"] if row["op"].startswith("head") and row["op"] != roofline.TOGETHER]
    assert all(row["measured_ms"] > 0 for row in saved["ops"] if row not in head)
    assert all(row["measured_ms"] is None for row in head)
    assert saved["step_ms"]["eager"] > 0
    assert "measured step, eager" in out
