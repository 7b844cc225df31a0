"""Races and the descent, with a fake clock and candidates whose times are made up."""

import itertools

import pytest

from engine.tuning.search import ENOUGH, ROUNDS, descend, race


class Clock:
    """A clock that only candidates move, and the candidates."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float):
        """A candidate that takes these times in turn, again and again."""
        times = itertools.cycle(seconds)

        def sample() -> float:
            spent = next(times)
            self.now += spent
            self.order.append(name)
            return spent

        return sample

    def race(self, until: float = 1e9, **candidates: float | tuple[float, ...]):
        samplers = {
            name: self.takes(name, *(seconds if isinstance(seconds, tuple) else (seconds,)))
            for name, seconds in candidates.items()
        }
        return race(samplers, until, self)


def test_what_is_faster_by_more_than_the_noise_replaces_what_is_in_use():
    assert Clock().race(shipped=1.0, new=0.9).winner == "new"
    assert Clock().race(shipped=(1.0, 1.1), new=(0.80, 0.88)).winner == "new"  # noisy, and faster in every round


def test_a_tie_and_a_gain_within_the_noise_keep_what_is_in_use():
    assert Clock().race(shipped=1.0, new=1.0).winner == "shipped"
    assert Clock().race(shipped=1.0, new=0.995).winner == "shipped"
    assert Clock().race(shipped=(1.0, 1.3, 1.0), new=(1.2, 0.9, 1.0)).winner == "shipped"
    assert Clock().race(shipped=(1.0, 1.5), new=(1.45, 0.98)).winner == "shipped"  # its best is better


def test_the_fastest_of_several_wins():
    assert Clock().race(shipped=1.0, good=0.9, better=0.895, best=0.8).winner == "best"


def test_a_slow_candidate_leaves_after_two_rounds_and_the_one_in_use_never():
    clock = Clock()
    found = clock.race(shipped=2.0, slow=3.0, fast=1.0)
    assert found.left == {"slow": "slower"}
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == {
        "shipped": ROUNDS,
        "slow": 2,
        "fast": ROUNDS,
    }


def test_a_race_ends_when_only_the_one_in_use_is_left():
    assert len(Clock().race(shipped=1.0, slow=2.0).seconds["shipped"]) == 2


def test_every_second_round_goes_in_reverse():
    clock = Clock()
    clock.race(shipped=1.0, new=1.0)
    assert clock.order[:4] == ["shipped", "new", "new", "shipped"]


def test_a_candidate_that_raises_leaves_with_the_reason_in_one_line():
    def broken() -> float:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    found = race({"shipped": lambda: 1.0, "broken": broken}, 1e9)
    assert (found.winner, found.left) == ("shipped", {"broken": "out of resource: shared memory"})
    with pytest.raises(RuntimeError, match="out of resource"):
        race({"broken": broken, "new": lambda: 1.0}, 1e9)


def test_no_round_begins_after_the_time_and_too_few_rounds_prove_nothing():
    clock = Clock()
    found = clock.race(shipped=10.0, new=1.0, until=20.0)
    assert clock.now == 22.0
    assert len(found.seconds["new"]) < ENOUGH
    assert found.winner == "shipped"
    assert Clock().race(shipped=10.0, new=1.0, until=30.0).winner == "new"


def test_the_least_rounds_are_made_even_without_time():
    assert len(Clock().race(shipped=1.0, new=0.5, until=-1.0).seconds["new"]) == 1
    found = race({"shipped": lambda: 1.0, "new": lambda: 0.5}, 0.0, lambda: 1.0, least=ENOUGH)
    assert (found.winner, len(found.seconds["new"])) == ("new", ENOUGH)


def test_a_descent_tries_one_field_at_a_time_and_goes_on_from_the_best():
    tried = []

    def contest(candidates: list[tuple[int, int]]) -> tuple[int, int]:
        tried.extend(candidates[1:])
        return min(candidates, key=lambda pair: abs(pair[0] - 64) + abs(pair[1] - 8))

    moves = [lambda pair: [(pair[0] * 2, pair[1]), (pair[0] // 2, pair[1])], lambda pair: [(pair[0], pair[1] * 2)]]
    assert descend((32, 4), moves, contest) == (64, 8)
    assert tried == [(64, 4), (16, 4), (64, 8)]  # not all of the product
