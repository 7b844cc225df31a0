"""What is a hang: the watching thread's loop on a made-up clock, with reports of another rank."""

import time
from collections.abc import Callable

import pytest
import torch
from conftest import SMALL

from engine import config
from engine.distributed import Ranks
from engine.health.heartbeat import Heartbeat, Silence


def watched(heartbeat: Heartbeat, seconds: float, others: Callable[[float], dict], asleep: float = 0.0) -> float | None:
    """Runs the watching thread's loop on a made-up clock. Returns when it finds a hang or a loss, None if it does not.

    others: reports of the other ranks at a time. asleep: seconds of suspension after each tick.
    """
    now, left = 0.0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        patch.setattr(time, "time", lambda: 1e9 + 3600 * now)  # a clock that is set forward all the time
        patch.setattr(heartbeat, "_beat", lambda *_: None)
        for ending in ("_leave", "_lose"):
            patch.setattr(heartbeat, ending, lambda _: left.append(now))

        def wait(timeout: float) -> bool:
            nonlocal now
            now += timeout + asleep
            heartbeat._heard = others(now)
            return bool(left) or now >= seconds

        patch.setattr(heartbeat._ended, "wait", wait)
        heartbeat._silence, heartbeat._stillness = Silence(2.0), Silence(2.0)
        heartbeat._run()
    return left[0] if left else None


def pair(phase: str = "update") -> Heartbeat:
    """Heartbeat of rank 0 of two in its third step, without threads or a store."""
    heartbeat = Heartbeat(
        config.parse([*SMALL, "--timeout-minutes", "10"], "test"), Ranks(0, 0, 1, torch.device("cpu"))
    )
    heartbeat.ranks = Ranks(0, 0, 2, torch.device("cpu"))
    heartbeat.at(3, phase)
    return heartbeat


def test_a_rank_that_waits_for_one_that_works_is_no_hang():
    """Rank 1 evaluates for 40 minutes and reports progress every 9."""
    assert watched(pair(), 2400, lambda now: {1: (3, "evaluation", now // 540, now)}) is None
    assert watched(pair(), 2400, lambda now: {1: (3, "evaluation", 5, now)}) == pytest.approx(602, abs=3)


def test_ranks_that_are_not_ready_in_time_hang_too():
    assert watched(pair("starting"), 2400, lambda now: {1: (0, "starting", 0, now)}) == pytest.approx(602, abs=3)


def test_progress_within_a_phase_is_no_hang():
    heartbeat = pair()

    def others(now: float) -> dict:
        if now % 60 == 0 and now < 1800:
            heartbeat.progress()  # a micro-batch a minute
        return {1: (3, "update", 0, now)}

    assert watched(heartbeat, 3600, others) == pytest.approx(1740 + 602, abs=3)


@pytest.mark.parametrize("phase", ["compiling", "checkpoint"])
@pytest.mark.parametrize("is_own", [True, False])
def test_a_compile_or_a_save_on_any_rank_has_an_hour(phase, is_own):
    mine, other = (phase, "update") if is_own else ("update", phase)
    assert watched(pair(mine), 7200, lambda now: {1: (3, other, 0, now)}) == pytest.approx(3602, abs=3)


def test_a_suspended_machine_and_a_clock_that_is_set_are_no_hang_and_no_loss():
    silent = {1: (3, "update", 0, 0)}  # the other rank was suspended too
    assert watched(pair(), 25 * 3601, lambda now: silent, asleep=3600) is None
    assert watched(pair(), 1000, lambda now: silent) == pytest.approx(61, abs=2)  # but here it is lost
    assert watched(pair(), 250 * 3601, lambda now: {1: (3, "update", 0, now)}, asleep=3600) is None
