"""One training step, as engine.step makes it: by preset, backend and precision, eager and compiled.

First the losses of three steps on one batch, the later two of which need every gradient, are checked against the plain
reference in float64. extra_info of the eager step in float32 has bench.counts.
"""

import contextlib
import functools
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from bench.counts import counts
from bench.steps import PeerStep, Setup, build, build_model, initial_weights
from bench.suites.conftest import DEVICE, ON_GPU, QUICK, SEQUENCES, case, require_triton
from engine.device import COMPUTE_DTYPES, choose_precision
from model.presets import PRESETS, GPT2Config

PRECISIONS = ("bf16", "fp32", "tf32", "fp16") if ON_GPU else ("fp32", "bf16")
HOW = ("torch-eager", "torch-compiled", "triton-eager", "triton-compiled")
PRESET_NAMES = [name for name in SEQUENCES if ON_GPU or name != "gpt2"]
STEPS = 3
# Relative, of a loss and of its fall since the first step.
TOLERANCE = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 2e-2), "fp16": (1e-3, 2e-2), "bf16": (5e-3, 5e-2)}
REFERENCE_TOKENS = 4096  # of the float64 model at a time, whose logits are whole


def cases() -> list:
    return [
        case(preset, precision, how, is_quick=preset == QUICK and (precision == PRECISIONS[0] or "eager" in how))
        for preset, precision, how in product(PRESET_NAMES, PRECISIONS, HOW)
    ]


@functools.cache
def start(preset: str) -> tuple[GPT2Config, dict[str, Tensor], Tensor, Tensor]:
    """Configuration, weights, tokens and targets: with `fan_in` weights every part of the model bears on the loss."""
    config = replace(PRESETS[preset], init="fan_in")
    weights = initial_weights(config)
    rows = torch.randint(config.vocab_size, (SEQUENCES[preset], config.n_positions + 1)).to(DEVICE)
    return config, weights, rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@functools.cache
def exact_losses(preset: str) -> list[float]:
    """The reference's, in float64."""
    config, weights, tokens, targets = start(preset)
    model = build_model("reference", config, weights).to(DEVICE, torch.float64)
    step = PeerStep(model, model, torch.amp.GradScaler(DEVICE.type, enabled=False), contextlib.nullcontext())
    rows = max(1, REFERENCE_TOKENS // config.n_positions)
    batch = [*zip(tokens.split(rows), targets.split(rows), strict=True)]
    return [step(batch).item() for _ in range(STEPS)]


@pytest.mark.parametrize(("preset", "precision", "how"), cases())
def test_step(preset: str, precision: str, how: str, measure):
    backend, mode = how.split("-")
    if backend == "triton":
        require_triton(COMPUTE_DTYPES[precision], PRESETS[preset].head_dim)
    if precision == "bf16" and (chosen := choose_precision("auto", DEVICE))[0] != "bf16":
        pytest.skip("training takes fp32 here" if chosen[0] == "fp32" else chosen[1])
    config, weights, tokens, targets = start(preset)
    setup = Setup(is_compiled=mode == "compiled", precision=precision, backend=backend)
    step, batch = build(setup, config, weights, DEVICE), [(tokens, targets)]

    def check(loss: Tensor) -> None:
        losses, exact = [loss.item(), *(step(batch).item() for _ in range(STEPS - 1))], exact_losses(preset)
        of_loss, of_fall = TOLERANCE[precision]
        for got, truth in zip(losses, exact, strict=True):
            allowed = of_loss * exact[0] + of_fall * abs(exact[0] - truth)
            assert abs(got - truth) <= allowed, f"the loss must be {truth:.6f} to {allowed:.2g}, got {got:.6f}"

    measure.benchmark.group = f"a step of {preset}"
    last = measure(lambda: step(batch), check, work=(tokens.numel(), "tokens/s"))
    assert last.isfinite(), f"the loss must stay finite, got {last.item()}"
    if precision == "fp32" and how == "torch-eager":
        measure.info["counts"] = counts(lambda: step(batch))
