"""Faults planted in kernels and in their PTX: the emulator notices each, by a report or by wrong numbers."""

import re

import pytest
from emulate import emulate  # noqa: F401  (a fixture)
from faults import FAULTS, PTX_FAULTS

COMMON = {
    "forward: a row sees the next key",
    "layer_norm: programs share a row",
    "gelu: an element too many",
    "forward: no barrier after cp.async",
    "forward: a loosened wait for cp.async",
}
RUNS = [
    *(pytest.param("sm_90", name, marks=() if name in COMMON else pytest.mark.slow) for name in FAULTS),
    *(pytest.param("sm_80", name, marks=pytest.mark.slow) for name in PTX_FAULTS),
]


@pytest.mark.parametrize(("target", "name"), RUNS)
def test_the_fault_is_found(emulate, target, name):  # noqa: F811
    fault = FAULTS[name]
    report = emulate(target, case=fault.case, fault=name)
    found = [*report["problems"], report["failure"]]
    assert "Traceback" not in report["failure"], report["failure"]
    assert any(re.search(fault.sign, line) for line in found), found


def test_without_a_fault_nothing_is_found(emulate):  # noqa: F811
    name = "forward: a row sees the next key"
    emulate("sm_90", case=FAULTS[name].case, fault=name)
    report = emulate("sm_90", case=FAULTS[name].case)
    assert (report["problems"], report["failure"]) == ([], "")
