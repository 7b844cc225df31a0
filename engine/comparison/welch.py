"""Welch's t-test: whether the means of two groups of runs differ by more than seeds make them differ.

    t  = (mean_b - mean_a) / se,  se^2 = var_a / n_a + var_b / n_b
    df = se^4 / ((var_a / n_a)^2 / (n_a - 1) + (var_b / n_b)^2 / (n_b - 1))

The variances are the unbiased ones. The groups may differ in size and in variance. Student's t
distribution is integrated numerically, in the angle a = atan(t / sqrt(df)), where its density is
proportional to cos(a)^(df - 1).
Source: Welch 1947, Biometrika 34, 28-35.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


class Difference(NamedTuple):
    """Mean of group b less the mean of group a, and how well it is known."""

    value: float
    error: float  # its standard error
    df: float  # degrees of freedom
    low: float  # of the interval of confidence LEVEL
    high: float
    p: float  # probability of a difference as large if there were none

    @property
    def is_more_than_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def difference(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """Compares two groups. None if one has fewer than two values, or both are of equal values: no noise is known."""
    if min(len(a), len(b)) < 2 or all(min(group) == max(group) for group in (a, b)):
        return None
    value = float(np.mean(b) - np.mean(a))
    parts = [float(np.var(group, ddof=1)) / len(group) for group in (a, b)]
    squared = sum(parts)
    df = squared**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (a, b), strict=True))
    error = math.sqrt(squared)
    half = quantile(0.5 + LEVEL / 2, df) * error
    return Difference(value, error, df, value - half, value + half, 2 * (1 - cdf(abs(value) / error, df)))


def cdf(t: float, df: float) -> float:
    """Probability that a variable of Student's t distribution is at most t. df: at least 1."""
    angle = math.atan(abs(t) / math.sqrt(df))
    integral = float(np.sum(_WEIGHTS * np.cos(angle / 2 * (_NODES + 1)) ** (df - 1))) * angle / 2
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return 0.5 + math.copysign(min(constant * integral, 0.5), t)


def quantile(probability: float, df: float) -> float:
    """The t whose cdf is this probability, 0.5 to 1."""
    low, high = 0.0, 1.0
    while cdf(high, df) < probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, df) < probability else (low, middle)
    return (low + high) / 2
