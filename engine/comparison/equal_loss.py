"""Steps that one recipe needs to the loss of another, with an interval, from runs of several seeds and lengths.

The target is the reference's mean loss at its full length. Between two lengths of a recipe its mean
loss is taken as linear in the logarithm of the steps. The interval is the middle LEVEL of the
ratios of DRAWS draws of every recipe's seeds, with replacement (Efron 1979, the bootstrap). Such
draws vary too little where there are few seeds, so the logarithms are widened: by sqrt(n / (n - 1)),
and from the normal's quantile to Student's, of the fewest seeds n.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.comparison import welch
from engine.comparison.welch import LEVEL

DRAWS = 4000
ENDS, NORMAL = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2), 1.959964  # of LEVEL, and the normal distribution's quantile there
MOST = 100.0  # logarithm of the most steps
Losses = dict[int, np.ndarray]  # final losses of a recipe: by steps, one of each seed


class Estimate(NamedTuple):
    """A number, and the interval of confidence LEVEL around it."""

    value: float
    low: float
    high: float


def mean(losses: np.ndarray) -> Estimate:
    """The mean of the seeds' losses, with Student's interval. At least two of them."""
    half = welch.quantile(0.5 + LEVEL / 2, len(losses) - 1) * losses.std(ddof=1) / math.sqrt(len(losses))
    return Estimate(float(losses.mean()), float(losses.mean() - half), float(losses.mean() + half))


def slope(losses: Losses) -> float:
    """Change of the mean loss with the logarithm of the steps, between the shortest and the longest runs."""
    first, last = min(losses), max(losses)
    return (losses[last].mean() - losses[first].mean()) / math.log(last / first)


def steps_to(target: float, losses: Losses, like: Losses) -> float:
    """Steps at which a recipe's mean loss is the target; beyond its lengths along the nearest two.

    like: a recipe of several lengths, whose slope one of a single length borrows. Infinity where the
    loss does not fall with the steps.
    """
    lengths = sorted(losses)
    means = [losses[steps].mean() for steps in lengths]
    right = min(max(1, sum(mean > target for mean in means)), len(lengths) - 1)
    near = like if right == 0 else {steps: losses[steps] for steps in lengths[right - 1 : right + 1]}
    if (fall := slope(near)) >= 0:
        return math.inf
    first = max(0, right - 1)
    return lengths[first] * float(np.exp(np.minimum((target - means[first]) / fall, MOST)))


def ratio(recipe: Losses, like: Losses, reference: Losses) -> Estimate:
    """The recipe's steps to the reference's loss at its full length, over that length."""
    full, random = max(reference), np.random.default_rng(1)

    def drawn(losses: Losses) -> Losses:
        return {steps: random.choice(each, len(each)) for steps, each in losses.items()}

    found = [steps_to(drawn(reference)[full].mean(), drawn(recipe), drawn(like)) / full for _ in range(DRAWS)]
    value = steps_to(reference[full].mean(), recipe, like) / full
    if math.isinf(value):
        return Estimate(value, 0.0, value)
    fewest = min(len(each) for losses in (recipe, like, reference) for each in losses.values())
    wider = math.sqrt(fewest / (fewest - 1)) * welch.quantile(0.5 + LEVEL / 2, fewest - 1) / NORMAL
    low, high = (value * (end / value) ** wider for end in np.quantile(found, ENDS, method="nearest"))
    return Estimate(value, float(low), float(high))


def in_time(steps: Estimate, ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The ratio of steps times that of their times: of samples taken in turns, the median of each turn's ratio.

    The interval has the noise of both: the squares of the logarithms' widths are added.
    """
    ratios = np.divide(ours, theirs)
    draws = np.median(np.random.default_rng(1).choice(ratios, (DRAWS, len(ratios))), axis=1)
    cost = float(np.median(ratios))
    if math.isinf(steps.value):
        return steps
    low, high = (
        steps.value * cost * math.exp(sign * math.hypot(math.log(end / steps.value), math.log(drawn / cost)))
        for sign, end, drawn in zip((-1, 1), steps[1:], np.quantile(draws, ENDS), strict=True)
    )
    return Estimate(steps.value * cost, low, high)
