"""Precision: as asked for, or the faster one here; what the device cannot do is refused."""

import contextlib

import pytest
import torch

from engine import device, speed
from engine.config import PRESETS
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.tuning import choices
from model.gpt2 import GPT2
from model.presets import GPT2Config

CPU = torch.device("cpu")


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("asked", ["bf16", "fp16", "fp32"])
def test_what_was_asked_for_is_taken_without_timing(asked, monkeypatch):
    monkeypatch.setattr(speed, "matmul_seconds", None)
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
    ("product", "step", "taken", "why"),
    [
        pytest.param(4.0, 1.4, "bf16", "a bf16 training step ran at 1.4x", id="both faster"),
        pytest.param(4.0, 1.04, "fp32", "a bf16 training step ran at 1.04x", id="a step hardly faster"),
        pytest.param(4.0, 1.0996, "fp32", "a bf16 training step ran at 1.1x", id="a step almost fast enough"),
        pytest.param(4.0, 0.9, "fp32", "a bf16 training step ran at 0.9x", id="a step slower"),
        pytest.param(1.3, 1.2, "bf16", "a bf16 training step ran at 1.2x", id="a step faster, a product a little"),
        pytest.param(0.02, None, "fp32", "a bf16 matrix product ran at 0.02x", id="emulated: no step is made"),
    ],
)
def test_a_cpu_takes_the_precision_in_which_a_step_is_faster(product, step, taken, why, monkeypatch):
    seconds = {torch.float32: product, torch.bfloat16: 1.0}
    monkeypatch.setattr(speed, "matmul_seconds", seconds.__getitem__)
    order = []
    monkeypatch.setattr(device, "tune_malloc", lambda: order.append("malloc"))
    monkeypatch.setattr(speed, "step_speedup", lambda model: order.append(model) or step)
    advice = "; auto takes bf16 from 1.1x on" if step in (1.04, 1.0996) else ""
    said = (taken, f"{why} the speed of fp32 on this CPU{advice}")
    assert device.choose_precision("auto", CPU, model=GPT2Config(3, 2, 96, n_positions=128)) == said
    wanted = GPT2Config(1, 2, 96, n_positions=128, vocab_size=4096)
    assert order == (["malloc", wanted] if step else [])  # in a run malloc is tuned too


@pytest.fixture
def passes(monkeypatch):
    """Replaces the clock: a pass takes the seconds set here for its dtype. Returns those and the whole passes."""
    now, made, seconds, cold = [0.0], [], {}, [2.0]

    def one_pass(model, tokens, dtype):
        is_whole = tokens.numel() == speed.TOKENS
        made.extend([dtype] * is_whole)
        taken = seconds[dtype] * is_whole + (cold.pop() if cold else 0.0)  # the first of all imports modules
        now[0] += taken
        return taken

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "_pass_seconds", one_pass)
    speed.step_speedup.cache_clear()
    yield seconds, made
    speed.step_speedup.cache_clear()


def test_a_step_s_speedup_is_that_of_the_best_passes_made_in_turns(passes):
    seconds, made = passes
    seconds |= {torch.float32: 0.06, torch.bfloat16: 0.04}
    assert speed.step_speedup() == pytest.approx(1.5)
    assert made == [torch.float32, torch.bfloat16] * speed.ROUNDS
    assert speed.step_speedup() == pytest.approx(1.5)  # remembered
    assert len(made) == 2 * speed.ROUNDS


def test_on_a_slow_cpu_each_precision_is_timed_once_and_imports_are_not(passes):
    seconds, made = passes
    seconds |= {torch.float32: 0.5, torch.bfloat16: 1.0}
    assert speed.step_speedup() == pytest.approx(0.5)
    assert made == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_is_a_step_in_that_precision_and_draws_no_random_number(dtype, monkeypatch):
    models, state, timed = [], torch.get_rng_state(), speed._pass_seconds

    def record(model, tokens, asked):
        models.append(model)
        return timed(model, tokens, dtype)

    monkeypatch.setattr(speed, "_pass_seconds", record)
    speed.step_speedup.__wrapped__(GPT2Config(1, 1, 16, n_positions=4, vocab_size=61))
    assert torch.equal(torch.get_rng_state(), state)
    assert models[0].compute_dtype is dtype
    assert all(parameter.grad.isfinite().all() for parameter in models[0].parameters())


def test_one_rank_alone_times_the_cpu(monkeypatch):
    class Second(Ranks):
        def fail_together(self):
            return contextlib.nullcontext()

        def broadcast_object(self, mine):
            return None, ("fp32", "of rank 0")

    monkeypatch.setattr(device, "choose_precision", None)
    chosen = choices.precision_and_tuning(PRESETS["tiny"], Second(1, 1, 2, CPU))
    assert chosen == (None, ("fp32", "of rank 0"))


def test_the_time_of_a_pass_has_its_backward_pass_in_it(monkeypatch):
    now, backward = [0.0], torch.Tensor.backward
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def slow(loss, **kwargs):
        now[0] += 3.0
        backward(loss, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", slow)
    model = GPT2(GPT2Config(1, 1, 16, n_positions=4, vocab_size=61))
    assert speed._pass_seconds(model, torch.arange(4).view(1, 4), torch.float32) == 3.0


@pytest.mark.parametrize(
    ("model", "small"),
    [
        (GPT2Config(12, 12, 768), GPT2Config(1, 12, 768, n_positions=512, vocab_size=4096)),
        (GPT2Config(96, 96, 12288), GPT2Config(1, 16, 1024, n_positions=512, vocab_size=4096)),
        (GPT2Config(4, 4, 128, 64, 257, 0.1), GPT2Config(1, 4, 128, n_positions=64, vocab_size=257)),
    ],
)
def test_the_small_step_is_of_the_model_s_width(model, small):
    assert speed.small_like(model) == small


def test_a_product_takes_no_time_to_speak_of():
    assert 0 < speed.matmul_seconds(torch.float32) < 1


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
