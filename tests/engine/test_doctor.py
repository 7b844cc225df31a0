"""`gpt2 doctor`: a row per op with the reason."""

from types import SimpleNamespace

import pytest

from engine import cli
from engine.checks import doctor as report
from kernels.dispatch import MODULES


def doctor(capsys, *args: str) -> tuple[int, str, str]:
    """Runs `gpt2 doctor`; returns exit code, stdout and stderr."""
    code = cli.main(["doctor", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prints_the_machine_and_a_row_for_every_op(capsys):
    code, out, _ = doctor(capsys, "--precision", "fp32")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert {"python", "torch", "triton", "processor", "precision", "disk", *MODULES} <= set(rows)
    assert all("torch: " in rows[op] or "triton: " in rows[op] for op in MODULES)
    assert "ops at head_dim 64, fp32" in out


def test_heads_too_narrow_for_triton_are_named(capsys):
    _, out, _ = doctor(capsys, "--head-dim", "12", "--precision", "fp32")  # in the interpreter, or on a GPU
    assert "attention             torch: head_dim 12 < 16" in out
    assert out.count("head_dim 12 < 16") == 1


def test_the_presets_heads_are_judged_unless_a_width_is_given(capsys):
    assert "ops at head_dim 32, fp32" in doctor(capsys, "--preset", "tiny", "--precision", "fp32")[1]
    assert "ops at head_dim 80, fp32" in doctor(capsys, "--head-dim", "80", "--precision", "fp32")[1]


REFUSED = [
    (["--preset", "gpt-2"], "--preset must be a preset, got 'gpt-2'; did you mean \"gpt2\"?"),
    (["--precision", "b16"], "--precision must be one of auto, bf16, fp16, tf32, fp32, got 'b16'"),
    (["--head-dim", "0"], "--head-dim must be at least 1, got 0"),
]


@pytest.mark.parametrize(("args", "sentence"), REFUSED, ids=lambda value: "" if isinstance(value, str) else value[0])
def test_bad_input_is_a_sentence_and_exit_code_2(capsys, args, sentence):
    code, out, err = doctor(capsys, *args)
    assert (code, out, err.strip()) == (2, "", f"doctor: {sentence}")


def test_gpus_are_named_with_architecture_and_memory(monkeypatch):
    import torch

    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert report._gpus() == [("GPU 0", "NVIDIA H200, sm_90, 140 GiB")]
