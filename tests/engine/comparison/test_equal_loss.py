"""Steps to an equal loss: known curves, equal recipes, and how often the interval holds the truth."""

import numpy as np
import pytest

from engine.comparison import equal_loss

NOISE = 0.01


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(equal_loss, "DRAWS", 100)


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


@pytest.mark.parametrize("seeds", [8, 3])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(seeds):
    """Equal recipes come out equal: 1 is in about 95% of the intervals, and in more where there are few seeds."""
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        reference, like = runs((800,), 1.0, 8, random), runs((400, 800), 1.0, 8, random)
        low, high = equal_loss.ratio(runs((800,), 1.0, seeds, random), like, reference)[1:]
        held += low <= 1.0 <= high
    assert 0.92 * 200 <= held <= (0.99 * 200 if seeds == 8 else 200)


def test_a_recipe_that_does_not_learn_with_more_steps_reaches_nothing():
    flat = {300: np.array([1.9, 1.7, 1.8]), 380: np.array([1.7, 1.8, 1.9])}
    assert equal_loss.ratio(flat, flat, exact((800,), 1.0)) == (np.inf, 0.0, np.inf)


def test_time_has_the_cost_of_a_step_in_it_and_the_noise_of_both():
    steps = equal_loss.Estimate(0.5, 0.45, 0.55)
    theirs = np.array([1.0, 2.0, 4.0, 1.0, 3.0])  # as slow as the machine is in each turn
    assert equal_loss.in_time(steps, 1.2 * theirs, theirs) == pytest.approx((0.6, 0.54, 0.66))
    noisy = equal_loss.in_time(steps, [1.0, 1.1, 1.2, 1.3, 1.4], np.ones(5))
    assert noisy.value == pytest.approx(0.6)
    assert noisy.low < 0.53
    assert noisy.high > 0.67
    assert equal_loss.in_time(equal_loss.Estimate(np.inf, 0.0, np.inf), theirs, theirs) == (np.inf, 0.0, np.inf)


def test_the_mean_s_interval_is_student_s():
    estimate = equal_loss.mean(np.array([1.0, 2.0, 3.0]))
    assert estimate == pytest.approx((2.0, 2.0 - 4.302653 / 3**0.5, 2.0 + 4.302653 / 3**0.5))  # t of 2 degrees


def test_draws_whose_slope_is_lost_in_the_noise_widen_the_interval_and_do_not_fail():
    loud = {300: np.array([1.9, 1.6, 1.8]), 380: np.array([1.7, 1.8, 1.7])}
    value, low, high = equal_loss.ratio(loud, loud, {760: np.array([1.6, 1.62, 1.61])})
    assert low < value < high == np.inf
