"""Precision: as asked for, or the faster one here; what the device cannot do is refused."""

import pytest
import torch

from engine import device
from engine.errors import BadInput

CPU = torch.device("cpu")


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("asked", ["bf16", "fp16", "fp32"])
def test_what_was_asked_for_is_taken_without_timing(asked, monkeypatch):
    monkeypatch.setattr(device, "_matmul_seconds", None)
    assert device.choose_precision(asked, CPU) == (asked, "asked for")


def test_tf32_without_tensor_cores_is_refused():
    with pytest.raises(BadInput, match=r"--precision tf32 needs an NVIDIA GPU .*, got cpu; use fp32"):
        device.choose_precision("tf32", CPU)


@pytest.mark.parametrize(
    ("capability", "auto", "refused"),
    [
        pytest.param((9, 0), "bf16", [], id="H200"),
        pytest.param((8, 0), "bf16", [], id="A100"),
        pytest.param((7, 5), "fp32", ["bf16", "tf32"], id="T4"),
    ],
)
def test_a_gpu_takes_bf16_from_sm_80_on(capability, auto, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert device.choose_precision("auto", gpu)[0] == auto
    for asked in ("bf16", "fp16", "tf32", "fp32"):
        if asked in refused:
            with pytest.raises(BadInput, match=f"--precision {asked} needs an NVIDIA GPU from 2020 on"):
                device.choose_precision(asked, gpu)
        else:
            assert device.choose_precision(asked, gpu)[0] == asked


@pytest.mark.parametrize(
    ("bf16_seconds", "taken"),
    [
        pytest.param(0.5, "bf16", id="twice as fast"),
        pytest.param(0.9, "fp32", id="hardly faster"),
        pytest.param(8.0, "fp32", id="emulated"),
    ],
)
def test_a_cpu_takes_bf16_only_where_it_is_measurably_faster(bf16_seconds, taken, monkeypatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
    monkeypatch.setattr(device, "_matmul_seconds", seconds.__getitem__)
    chosen, why = device.choose_precision("auto", CPU)
    assert chosen == taken
    assert f"ran at {1 / bf16_seconds:.2g}x the speed of fp32" in why


def test_the_measurement_itself_takes_no_time_to_speak_of():
    assert 0 < device._matmul_seconds(torch.float32) < 1


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize(
    ("name", "dtype", "products"),
    [
        ("bf16", torch.bfloat16, "high"),
        ("fp16", torch.float16, "high"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ],
)
def test_only_fp32_keeps_all_bits_of_float32_products(name, dtype, products):
    torch.set_float32_matmul_precision("medium")
    assert device.apply_precision(name) is dtype
    assert torch.get_float32_matmul_precision() == products
