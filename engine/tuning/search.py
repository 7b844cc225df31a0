"""Search: races between candidates, and a descent over one field at a time.

Knows nothing of PyTorch. A candidate is a function that returns the seconds of one sample.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
ROUNDS, ENOUGH = 9, 3  # most samples of each candidate; fewest with which one may win
LEAST_GAIN = 0.01  # a faster candidate must win by this share at least, however quiet the machine


@dataclass
class Race:
    """Samples of every candidate, the winner, and why each of the others left."""

    winner: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def best(self, name: str) -> float:
        """Shortest time of a candidate, in seconds; infinite without a sample."""
        return min(self.seconds[name], default=float("inf"))


def race(
    candidates: dict[str, Callable[[], float]],
    until: float,
    clock: Callable[[], float] = time.monotonic,
    rounds: int = ROUNDS,
    least: int = 1,
) -> Race:
    """Samples all candidates in turns, every second round in reverse, and drops slow ones early.

    The first candidate is the one in use: another wins only if it is faster by more than the noise.
    After each round from the second on, a candidate whose best time is slower than the fastest's
    by more than the noise of both leaves, and so does one that raises. until: time of the clock
    after which no round begins, except the `least` first. What the candidate in use raises is raised.
    """
    in_use = next(iter(candidates))
    result = Race(in_use, {name: [] for name in candidates})
    racing = list(candidates)
    for number in range(rounds):
        if (number >= least and clock() >= until) or (number and racing == [in_use]):
            break
        for name in racing[:: -1 if number % 2 else 1]:
            try:
                result.seconds[name].append(candidates[name]())
            except Exception as error:  # too large, not supported here, ended: the types vary
                if name == in_use:
                    raise
                result.left[name] = one_line(error)
        racing = [name for name in racing if name not in result.left]
        if number:
            fastest = min(racing, key=result.best)
            for name in [one for one in racing if one not in (in_use, fastest)]:
                noise = max(_spread(result.seconds[name]), _spread(result.seconds[fastest]), LEAST_GAIN)
                if result.best(name) > result.best(fastest) * (1 + noise):
                    result.left[name] = "slower"
            racing = [name for name in racing if name not in result.left]
    gains = {name: gain(result.seconds[name], result.seconds[in_use]) for name in racing if name != in_use}
    won = {name: by for name, (by, noise) in gains.items() if by > noise}
    result.winner = max(won, key=won.get, default=in_use)
    return result


def gain(challenger: list[float], in_use: list[float]) -> tuple[float, float]:
    """(share of the time saved, noise of that share), over samples of the same rounds.

    The median of the rounds, and half of the range from the 20th to the 80th percentile; at least
    LEAST_GAIN. With fewer than ENOUGH rounds the noise is infinite.
    """
    saved = sorted(1 - one / other for one, other in zip(challenger, in_use, strict=False))
    if len(saved) < ENOUGH:
        return 0.0, float("inf")
    low, high = saved[round(0.2 * (len(saved) - 1))], saved[round(0.8 * (len(saved) - 1))]
    return statistics.median(saved), max((high - low) / 2, LEAST_GAIN)


def _spread(seconds: list[float]) -> float:
    return statistics.median(seconds) / min(seconds) - 1


def descend(start: T, moves: Iterable[Callable[[T], list[T]]], contest: Callable[[list[T]], T]) -> T:
    """The best found by changing one field at a time, keeping the best of each before the next.

    moves: for each field, the candidates that differ from the current one in that field. contest:
    chooses from the current one, which is the first, and those.
    """
    for near in moves:
        if others := near(start):
            start = contest([start, *others])
    return start


def one_line(error: BaseException) -> str:
    """An error as one line of at most 100 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:100]
