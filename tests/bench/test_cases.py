"""The op list: the work that a hand counts, and that a wrong result is refused."""

import math
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import cases

SIZES = cases.Sizes(B=3, T=10, H=2, D=5, V=7, Vp=8)  # N = 30, C = 10
SMALL = cases.Sizes(B=2, T=5, H=1, D=16, V=61, Vp=64)


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        # B H heads, two products of T T D multiply-adds, half of them: 3 * 2 * 2 * 2 * 10 * 10 * 5 / 2
        ("attention", 6_000, 15_000),
        ("linear_cross_entropy", 2 * 30 * 10 * 8, 2 * 2 * 30 * 10 * 8),
        # two bytes an element; rows of 300, parameters of 10
        ("layer_norm", 2 * (300 + 300 + 10 + 10), 2 * (300 + 300 + 10 + 300 + 10 + 10)),
        ("add_layer_norm", 2 * (300 + 300 + 10 + 10 + 300 + 300), 2 * (300 + 300 + 300 + 10 + 300 + 10 + 10)),
        # rows of 1,200, a bias of 40
        ("gelu", 2 * 2_400, 2 * 3_600),
        ("bias_gelu", 2 * (1_200 + 40 + 1_200), 2 * (1_200 + 1_200 + 40 + 1_200 + 40)),
    ],
)
def test_work_is_what_a_hand_counts(op, forward, backward):
    definition = cases.ops(SIZES, on_gpu=True)[op]
    amounts = [definition.amount(phase, 2)[0] for phase in ("forward", "forward_no_grad", "backward", "both")]
    assert amounts == [forward, forward, backward, forward + backward]


@pytest.mark.parametrize("name", cases.NAMES)
def test_every_implementation_is_right_and_a_wrong_one_is_refused(name):
    definition = cases.ops(SMALL, on_gpu=False, compiler="eager")[name]
    inputs, douts = definition.fresh(torch.float32, torch.device("cpu"))
    exact = definition.exact(inputs, douts)
    assert exact[-1].dtype == torch.float64
    for function in definition.peers.values():
        got = cases.values(function, inputs, douts)
        assert len(got) == len(definition.tensors)
        assert definition.check(got, exact, torch.float32) <= 1e-5
        for phase in definition.phases:
            cases.phase_of(function, inputs, douts, phase)()()
    for broken in (1.001, math.nan, math.inf):
        with pytest.raises(ArithmeticError, match=f"the error of {definition.tensors[-1]} must be at most 1e-05"):
            definition.check([*got[:-1], got[-1] * broken], exact, torch.float32)
