"""Training of a whole GPT-2 in bf16 on compiled kernels, on the emulator."""

import pytest
from emulate import emulate  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    ("target", "case", "updates"),
    [
        ("sm_90", "training", 3),
        pytest.param("sm_90", "long training", 5, marks=pytest.mark.slow),
        pytest.param("sm_80", "long training", 5, marks=pytest.mark.slow),
    ],
)
def test_updates_have_losses_and_gradients_as_accurate_as_those_of_pytorch(emulate, target, case, updates):  # noqa: F811
    report = emulate(target, case=case)
    assert report["problems"] == []
    assert report["failure"] == ""
    assert len(report["launches"]) >= updates * 2 * 6  # updates, layers, and three kernels forward and backward
    assert len(report["errors"]) == 1 + 2 * 12 + 4  # the losses, and each parameter's gradient
