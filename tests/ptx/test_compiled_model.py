"""Training of a whole GPT-2 in bf16 on compiled kernels, on the emulator."""

import pytest
from emulate import emulate  # noqa: F401  (a fixture)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_five_updates_have_losses_and_gradients_as_accurate_as_those_of_pytorch(emulate, target):  # noqa: F811
    report = emulate(target, case="training")
    assert report["problems"] == []
    assert report["failure"] == ""
    assert len(report["launches"]) >= 5 * 2 * 6  # updates, layers, and three kernels forward and backward
    assert len(report["errors"]) == 1 + 2 * 12 + 4  # the losses, and each parameter's gradient
