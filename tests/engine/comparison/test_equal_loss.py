"""Steps to an equal loss: known curves, equal recipes, and how often the interval holds the truth."""

import numpy as np
import pytest

from engine.comparison import equal_loss

NOISE = 0.01


def curve(steps: float, speed: float = 1.0) -> float:
    """A loss that falls with the logarithm of the steps; `speed` times as fast a recipe has it earlier."""
    return 4.0 - 0.4 * np.log(speed * steps)


def runs(lengths: tuple[int, ...], speed: float, seeds: int, random: np.random.Generator) -> equal_loss.Losses:
    return {steps: curve(steps, speed) + random.normal(0, NOISE, seeds) for steps in lengths}


def exact(lengths: tuple[int, ...], speed: float) -> equal_loss.Losses:
    return {steps: np.full(3, curve(steps, speed)) for steps in lengths}


@pytest.mark.parametrize(
    "lengths", [(300, 400, 500), (300, 350), (450, 500, 600)], ids=["between", "longer", "shorter"]
)
def test_the_steps_of_a_recipe_twice_as_fast_are_half(lengths):
    twice, reference = exact(lengths, 2.0), exact((800,), 1.0)
    assert equal_loss.ratio(twice, twice, reference) == pytest.approx((0.5, 0.5, 0.5))


def test_a_recipe_of_one_length_borrows_the_slope():
    twice, reference = exact((300, 500), 2.0), exact((800,), 1.0)
    assert equal_loss.ratio(exact((400,), 1.6), twice, reference) == pytest.approx((0.625, 0.625, 0.625))


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    """Equal recipes come out equal: 1 is in at least 80% of the intervals. Eight seeds make them a little narrow."""
    monkeypatch.setattr(equal_loss, "DRAWS", 200)
    random, held = np.random.default_rng(0), 0
    for _ in range(100):
        reference, again, like = (runs(n, 1.0, 8, random) for n in ((800,), (800,), (400, 800)))
        low, high = equal_loss.ratio(again, like, reference)[1:]
        held += low <= 1.0 <= high
    assert 80 <= held <= 99


def test_the_mean_s_interval_is_student_s():
    estimate = equal_loss.mean(np.array([1.0, 2.0, 3.0]))
    assert estimate == pytest.approx((2.0, 2.0 - 4.302653 / 3**0.5, 2.0 + 4.302653 / 3**0.5))  # t of 2 degrees
