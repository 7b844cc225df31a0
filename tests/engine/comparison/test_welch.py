"""Welch's t-test: Student's t distribution against closed forms and tables, and how often its interval is right."""

import math

import numpy as np
import pytest

from engine.comparison import welch


@pytest.mark.parametrize("t", [-3.0, -0.1, 0.0, 0.7, 2.0, 50.0])
def test_the_distribution_is_the_closed_form_at_1_2_and_3_degrees_of_freedom(t):
    u = t / math.sqrt(3)
    assert welch.cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
    assert welch.cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
    assert welch.cdf(t, 3) == pytest.approx(0.5 + (u / (1 + u * u) + math.atan(u)) / math.pi, abs=1e-12)


# Fisher's table of t at 0.975; the last is the normal distribution's.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 120: 1.9799, 1e6: 1.9600}


@pytest.mark.parametrize(("df", "t"), TABLE.items())
def test_quantiles_are_those_of_the_table(df, t):
    assert welch.quantile(0.975, df) == pytest.approx(t, abs=6e-5)
    assert welch.cdf(welch.quantile(0.9, df), df) == pytest.approx(0.9, abs=1e-12)


def test_a_difference_worked_by_hand():
    found = welch.difference([1.0, 2.0, 3.0], [4.0, 8.0])  # means 2 and 6, variances 1 and 8
    assert found.value == pytest.approx(4.0)
    assert found.error == pytest.approx(math.sqrt(1 / 3 + 4))
    assert found.df == pytest.approx((1 / 3 + 4) ** 2 / ((1 / 3) ** 2 / 2 + 4**2 / 1))
    half = welch.quantile(0.975, found.df) * found.error
    assert (found.low, found.high) == pytest.approx((4 - half, 4 + half))
    assert not found.is_more_than_noise
    assert found.p > 0.05
    back = welch.difference([4.0, 8.0], [1.0, 2.0, 3.0])
    assert (back.value, back.low, back.p) == pytest.approx((-4.0, -found.high, found.p))


def test_the_interval_holds_the_true_difference_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    held = [
        found.low <= 0.5 <= found.high
        for _ in range(400)
        if (found := welch.difference(rng.normal(0, 1, 3), rng.normal(0.5, 3, 5)))
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)


def test_one_run_and_groups_of_equal_values_say_nothing_of_noise():
    assert welch.difference([1.0], [2.0, 3.0]) is None
    assert welch.difference([0.1, 0.1, 0.1], [0.7, 0.7, 0.7]) is None  # whose variances are not 0 after rounding
    assert welch.difference([1.0, 1.0], [2.0, 3.0]) is not None
