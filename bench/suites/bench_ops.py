"""Each of the six ops, forward and backward, by every implementation of bench.cases, at the shapes of presets."""

from itertools import product

import pytest
import torch
from torch import Tensor

from bench import cases
from bench.suites.conftest import DEVICE, ON_GPU, QUICK, SEQUENCES, case, require_triton
from kernels.dispatch import MODULES
from model.presets import PRESETS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32} if ON_GPU else {"fp32": torch.float32}
HOW = ("torch", "compile", "triton")
OTHERS = {"linear_cross_entropy": ("plain",), "attention": tuple(cases.SDPA) if ON_GPU else ()}
# Whole logits of 8,192 rows are 1.65 GB; a CPU's presets have few rows.
HEAD = "8192-rows"


def all_cases() -> list:
    quick = {QUICK: (*HOW, "plain", *cases.SDPA), "mini": ("torch",)}
    found = [
        case(op, preset, precision, how, is_quick=how in quick.get(preset, ()))
        for op, preset, precision in product(MODULES, SEQUENCES, DTYPES)
        for how in (*HOW, *OTHERS.get(op, ()))
    ]
    return found + [case("linear_cross_entropy", HEAD, "fp32", how, is_quick=False) for how in ("torch", "plain")]


def sizes(preset: str) -> cases.Sizes:
    if preset == HEAD:
        return cases.Sizes.of(PRESETS["gpt2"], B=8)
    return cases.Sizes.of(PRESETS[preset], SEQUENCES[preset])


@pytest.mark.parametrize(("op", "preset", "precision", "how"), all_cases())
def test_op(op: str, preset: str, precision: str, how: str, measure):
    at, dtype = sizes(preset), DTYPES[precision]
    if how == "triton":
        require_triton(dtype, at.D)
    definition = cases.ops(at, ON_GPU)[op]
    function = definition.peers[how]
    torch.manual_seed(0)
    inputs, douts = definition.fresh(dtype, DEVICE)

    def check(got: list[Tensor]) -> None:
        definition.check(got, definition.exact(inputs, douts), dtype)

    measure.benchmark.group = op
    measure(lambda: cases.values(function, inputs, douts), check, work=definition.amount("both", dtype.itemsize))
