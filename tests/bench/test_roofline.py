"""What bench.roofline makes of counts, ceilings and measured times, and what its command line says."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import results, roofline
from bench.results import Row, exact
from engine import device
from engine.chips import CHIPS
from model.presets import PRESETS, flops_per_token, num_parameters


def test_a_chip_has_the_peak_by_which_mfu_is_reckoned():
    for name, chip in CHIPS.items():
        assert chip.flops_per_s["bf16"] == 1e12 * device.PEAK_TFLOPS[name]
        assert chip.flops_per_s["bf16"] > chip.flops_per_s["tf32"] > chip.flops_per_s["fp32"]
        assert chip.source


def op(case: str, peer: str = "triton", **seconds: float) -> Row:
    return Row("ops", case, peer, figures={name: exact(value, "s") for name, value in seconds.items()})


ROWS = [
    Row("ceilings", "this GPU", "matmul", figures={"rate": exact(8e14, "FLOP/s")}),
    Row("ceilings", "this GPU", "copy", figures={"rate": exact(8e11, "B/s")}),
    Row("accuracy", "attention bf16", "triton", "checked"),
    op("attention", forward=1.0, backward=2.0, both=3.0),
    op("add_layer_norm", forward=0.5, backward=0.25),
    op("linear_cross_entropy", forward_no_grad=5.0, both=30.0),
    op("attention", "torch", forward=9.0),
    Row("ops", "bias_gelu", "triton", "failed", "none"),
    Row("step", "gpt2 B=64 bf16", "ours compiled", figures={"step": exact(0.2, "s")}),
]


@pytest.fixture
def gpu_json(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(results.dumps({"gpu": "NVIDIA H200"}, ROWS))
    return path


@pytest.fixture
def built(monkeypatch):
    """Builds what a command line asks for."""
    found = []
    build = roofline.build
    monkeypatch.setattr(roofline, "build", lambda args: found.append(build(args)) or found[-1])

    def run(*args: str) -> roofline.Roofline:
        assert roofline.main(list(args)) == 0
        return found[-1]

    return run


def test_kernel_times_of_a_gpu_stand_beside_their_ops_as_often_as_a_step_calls_them(built, gpu_json):
    found = built("--measured", str(gpu_json))
    assert found.shape.micro_batches == 8
    assert {row.case: row.value("measured") for row in found.rows if "measured" in row.figures} == {
        "attention, forward": 8 * 12 * 1.0,
        "attention, backward": 8 * 12 * 2.0,
        "add_layer_norm, forward": 8 * 23 * 0.5,
        "add_layer_norm, backward": 8 * 23 * 0.25,
    }
    row = next(row for row in found.rows if row.case == "attention, forward")
    assert row.value("measured / bound") == pytest.approx(96.0 / row.value("bound"))


def test_totals_follow_from_the_ops(built):
    found = built("--gpus", "8", "--chip", "A100")
    whole, peak = found.whole(), 312e12
    bound_s = sum(each.bound_ms(found.chip, "bf16") for each in found.ops) / 1e3
    assert whole.value("bound") == pytest.approx(bound_s)
    assert sum(whole.value(phase) for phase in ("forward", "backward", "optimizer")) == pytest.approx(bound_s)
    assert whole.value("tokens") == pytest.approx(524_288 / bound_s)
    flops = flops_per_token(PRESETS["gpt2"], 1024)
    assert whole.value("mfu") == pytest.approx(flops * whole.value("tokens") / (8 * peak))
    gradients = 4 * num_parameters(PRESETS["gpt2"])
    assert whole.value("wire bound") == pytest.approx(2 * 7 / 8 * (gradients + 12) / 300e9)
    assert any(each.name == "copy into buckets" for each in found.ops)


# ---- The command line -----------------------------------------------------------------------------------------------


def said(capsys, *args: str) -> tuple[int, str, str]:
    code = roofline.main(list(args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["gpt5"], "the model must be one that is known, got 'gpt5'"),
        (["--chip", "H20"], """the chip must be one that is known, got 'H20'; did you mean "H200"?"""),
        (["--context", "2048"], "--context must be at most the model's 1024 positions"),
        (["--micro-batch-size", "0"], "--micro-batch-size must be at least 1"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--n-head", "7"], "n_embd must be a multiple of n_head"),
        (["--gpus", "3"], "--tokens-per-step must be a multiple"),
        (["--measured", "none.json"], "No such file or directory: 'none.json'"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(capsys, args, sentence):
    code, out, err = said(capsys, *args)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize("other", [["gpt2-medium"], ["--chip", "A100"], ["--precision", "fp16"]])
def test_results_of_another_step_are_refused(capsys, gpu_json, other):
    code, _, err = said(capsys, *other, "--measured", str(gpu_json))
    assert code == 2
    assert "got those of NVIDIA H200, gpt2, 64 sequences of 1,024 in bf16" in err


def test_without_measured_times_it_says_so_and_draws(capsys, tmp_path):
    code, out, _ = said(capsys, "gpt2", "--gpus", "8", "--micro-batch-size", "16", "--out", str(tmp_path / "r.png"))
    assert code == 0
    assert "The op with the largest bound is head " in out
    assert " 871 MB " in out  # on the wire
    picture = (tmp_path / "r.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20], "big") == 1200  # pixels wide
    assert len({len(line) for line in out.split("\n\n")[1].splitlines()}) == 1, "columns must line up"


def test_bars_hold_the_whole_bound(built):
    found = built("gpt2")
    assert sum(sum(bar.values()) for bar in found.bars().values()) == pytest.approx(1e3 * found.bound_s)
