"""Metrics of a run: rows, samples, FLOPs and MFU."""

import dataclasses
import json
import math

import pytest
import torch

from engine import device
from engine.config import PRESETS
from engine.distributed import Ranks
from engine.run import metrics
from engine.run.metrics import Metrics, read_rows
from engine.step import Numbers
from model.gpt2 import GPT2
from model.presets import PRESETS as MODEL_PRESETS
from model.presets import flops_per_token


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(PRESETS["tiny"], out=str(tmp_path), num_steps=1000, tokens_per_step=1024)


def record(config, start: int = 0, active: bool = True) -> Metrics:
    return Metrics(config, start, active, "byte")


# ---- FLOPs --------------------------------------------------------------------------------------------------------


def test_gpt2_takes_855_megaflops_per_token():
    assert flops_per_token(MODEL_PRESETS["gpt2"], 1024) == pytest.approx(855.4e6, abs=0.1e6)


@pytest.mark.parametrize("name", ["tiny", "gpt2", "gpt2-xl"])
def test_flops_count_the_parameters_that_the_model_has(name):
    config = MODEL_PRESETS[name]
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in GPT2(config).named_parameters()}
    attention = 12 * config.n_layer * config.n_embd * 512
    assert flops_per_token(config, 512) == 6 * (sum(sizes.values()) - sizes["wpe.weight"]) + attention


# Names as torch.cuda.get_device_name gives them, and bf16 peaks in TFLOP/s.
PEAKS = {
    **{"NVIDIA B200": 2250, "NVIDIA GB200": 2500, "NVIDIA GH200 480GB": 989},
    **{"NVIDIA H200": 989, "NVIDIA H200 NVL": 836, "NVIDIA H100 80GB HBM3": 989},
    **{"NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835},
    **{"NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312},
    **{"NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362},
    **{"NVIDIA RTX A6000": 155, "NVIDIA RTX 6000 Ada Generation": 364, "Quadro RTX 6000": None},
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 504,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": None,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": None,
    **{"NVIDIA GeForce RTX 3080": 59.5, "NVIDIA GeForce RTX 3080 Ti": None},
    **{"NVIDIA GeForce RTX 3090": 71, "NVIDIA GeForce RTX 3090 Ti": 80},
    **{"NVIDIA GeForce RTX 4080": 97.5, "NVIDIA GeForce RTX 4080 SUPER": None},
    **{"NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None},
    **{"NVIDIA GeForce RTX 5080": 112.6, "NVIDIA GeForce RTX 5090": 209.5, "NVIDIA GeForce RTX 5090 D": None},
    **{"NVIDIA H100 80GB HBM3 MIG 3g.40gb": None, "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "NVIDIA A10-24Q": None},
    **{"NVIDIA A100X": None, "NVIDIA A16": None, "NVIDIA GeForce RTX 5070": None, "Tesla T4": None},
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_peak_is_given_only_where_it_is_known(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = None if PEAKS[name] is None else 1e12 * PEAKS[name]
    for precision in ("bf16", "fp16"):
        assert device.peak_flops(torch.device("cuda"), precision) == peak
    for precision in ("tf32", "fp32"):
        assert device.peak_flops(torch.device("cuda"), precision) is None
    assert device.peak_flops(torch.device("cpu"), "bf16") is None


NUMBERS = Numbers(2.5, 0.75, *[0.0] * 6)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def step_fields(numbers, config, ranks, precision="fp32", step_ms=500.0) -> dict:
    """Fields of a logged step, without peak_gib, which depends on this process."""
    fields = metrics.measured(numbers, {"step_ms": step_ms, "data_ms": 1.0}, config, precision, ranks)
    assert fields.pop("peak_gib") > 0
    return fields


def test_a_step_s_measurements_are_its_numbers_over_its_time(config):
    assert step_fields(NUMBERS, config, Ranks(0, 0, 2, CPU)) == {
        "loss": 2.5,
        "grad_norm": 0.75,
        "skipped": None,
        "tokens_per_s": 2048.0,  # 1024 in half a second, over both ranks
        "mfu": None,
        "alloc_retries": None,
        "step_ms": 500.0,
        "data_ms": 1.0,
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_left_out_of_a_row_and_skips_are_counted(config, tmp_path, bad):
    for numbers, left in (([bad, 0.75], {"grad_norm": 0.75}), ([2.5, bad], {"loss": 2.5}), ([bad, bad], {})):
        fields = step_fields(Numbers(*numbers, *[0.0] * 4, 3.0, 1.0), config, Ranks(0, 0, 1, CPU))
        run = record(config)
        run.log(7, **fields)
        run.close()
        row = read_rows(tmp_path / "metrics.jsonl")[-1]
        assert {name: row[name] for name in ("loss", "grad_norm") if name in row} == left
        assert row["skipped"] == 3
        json.loads(json.dumps(row, allow_nan=False))
        (tmp_path / "metrics.jsonl").unlink()


def test_mfu_is_the_share_of_the_peak_of_all_devices(config, monkeypatch):
    monkeypatch.setattr(device, "peak_gib", lambda device: 1.0)
    monkeypatch.setattr(device, "alloc_retries", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpt2 = dataclasses.replace(PRESETS["gpt2"], context=1024)  # 524,288 tokens a step, 855.4 million FLOPs each
    for world_size, precision, mfu in ((8, "bf16", 0.11337), (1, "fp16", 0.90694), (1, "tf32", None)):
        fields = step_fields(NUMBERS, gpt2, Ranks(0, 0, world_size, GPU), precision)
        assert fields["mfu"] == (mfu if mfu is None else pytest.approx(mfu, rel=1e-3))
        assert fields["alloc_retries"] == 5
    narrow = dataclasses.replace(gpt2, context=128)
    assert step_fields(NUMBERS, narrow, Ranks(0, 0, 1, GPU), "bf16")["mfu"] < 0.9  # less attention per token


@pytest.mark.parametrize(
    ("start", "tokens_before", "step", "tokens"),
    [
        pytest.param(0, None, 0, 0, id="at first"),
        pytest.param(0, 0, 7, 7168, id="afresh"),
        pytest.param(40, None, 45, 46080, id="all steps alike"),
        pytest.param(40, 10_000, 40, 10_000, id="just gone on"),
        pytest.param(40, 10_000, 45, 15_120, id="gone on from smaller steps"),
    ],
)
def test_tokens_are_counted_on_from_the_checkpoint_s(config, tmp_path, start, tokens_before, step, tokens):
    run = Metrics(config, start, True, "byte", tokens_before)
    assert run.tokens(step) == tokens
    run.log(step, loss=1.0)
    run.close()
    assert [row["tokens"] for row in read_rows(tmp_path / "metrics.jsonl")] == [tokens]
    assert Metrics(config, start, False, "byte", tokens_before).tokens(step) == tokens  # on every rank


# ---- Rows ---------------------------------------------------------------------------------------------------------


def test_a_row_is_one_step_and_begins_with_step_and_tokens(config, tmp_path):
    run = record(config)
    run.log(0, val_loss=5.5)
    run.log(0, loss=5.25, mfu=None, lr=1e-3)
    assert run.rows() == [{"step": 0, "tokens": 0, "val_loss": 5.5, "loss": 5.25, "lr": 1e-3}]
    run.end_step(0)
    for step in range(1, 20):
        if step % 10 == 0:
            run.log(step, loss=4.0)
        run.end_step(step)
    run.log(20, val_loss=3.0)
    run.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line))[:2] for line in lines] == [["step", "tokens"]] * 3
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "tokens": 0, "val_loss": 5.5, "loss": 5.25, "lr": 1e-3},
        {"step": 10, "tokens": 10_240, "loss": 4.0},
        {"step": 20, "tokens": 20_480, "val_loss": 3.0},
    ]


def test_a_row_is_in_the_file_when_its_step_is_over(config, tmp_path):
    """Else a process killed after the checkpoint of step 11 would never write row 10."""
    run = record(config)
    run.log(10, loss=1.0)
    run.end_step(10)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [10]
    run.close()


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param("", id="whole"),
        pytest.param('{"step": 60, "tok', id="cut in a name"),
        pytest.param('{"step": 60, "tokens": 61440, "loss": 1.2', id="cut in a number"),
        pytest.param("\0" * 40, id="zeros, after a power cut"),
    ],
)
def test_resume_drops_what_will_be_made_again(config, tmp_path, tail):
    run = record(config)
    for step in range(0, 60, 10):
        run.log(step, loss=step / 10)
        run.sample(step, f"text of {step}")
        run.end_step(step)
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    resumed = record(config, start=40)
    resumed.log(40, loss=-4.0)
    resumed.sample(40, "again")
    resumed.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0), (10, 1), (20, 2), (30, 3), (40, -4)]
    samples = (tmp_path / "samples.txt").read_text()
    assert samples == "".join(f"=== step {s} ===\ntext of {s}\n\n" for s in (0, 10, 20, 30)) + (
        "=== step 40 ===\nagain\n\n"
    )
    assert metrics.last_sample(tmp_path / "samples.txt") == "again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.txt"]


def test_a_sample_may_hold_any_text(config, tmp_path):
    text = "a b ² c\r\n=== step ===\n=== step x ===\n === step 9 ===\n\x85\u2028\x0c=== step 1 ===\nend"
    run = record(config)
    run.sample(5, text)
    run.close()
    assert metrics.last_sample(tmp_path / "samples.txt").replace("\r\n", "\n") == text.replace("\r\n", "\n")
    record(config, start=6).close()
    assert (tmp_path / "samples.txt").read_bytes() == f"=== step 5 ===\n{text}\n\n".encode()
    record(config, start=5).close()
    assert (tmp_path / "samples.txt").read_bytes() == b""


def test_an_inactive_record_writes_and_prints_nothing(config, tmp_path, capsys):
    run = record(dataclasses.replace(config, tensorboard=True), active=False)
    run.log(0, loss=1.0)
    run.sample(0, "text")
    run.print0("line")
    run.end_step(0)
    run.sync(row_is_complete=False)
    run.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")
