"""Guard and Mailbox: bad updates are skipped to the bit and counted, and reach the host a step later."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from engine import optim
from engine.config import OptimConfig
from engine.errors import Diverged
from engine.step import OUT_OF_TIME, SIGNAL, WINDOW, Guard, Mailbox, News, Numbers, news
from model.gpt2 import GPT2, GPT2Config

NAN, INF = math.nan, math.inf
TINY = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=100)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def guard_of(max_skipped: int = 20, skip_z_score: float | None = None, device: str = "cpu") -> Guard:
    return Guard(torch.device(device), max_skipped, skip_z_score)


def judged(guard: Guard, loss: float, grad_norm: float = 1.0) -> float:
    device = guard.state.device
    verdict = guard.judge(torch.tensor(loss, device=device), torch.tensor(grad_norm, device=device))
    assert (verdict.dtype, verdict.shape, verdict.device) == (torch.float32, (), device)  # as the fused optimizer needs
    return verdict.item()


def usual(count: int) -> list[float]:
    """Losses around 3 with a deviation of 0.1, exact in float32."""
    return (3 + 0.1 * np.random.default_rng(0).standard_normal(count)).astype(np.float32).tolist()


# ---- Which updates are made ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("skip_z_score", [None, 3.0])
def test_an_update_is_skipped_if_and_only_if_loss_or_norm_is_not_finite(skip_z_score, device):
    guard = guard_of(skip_z_score=skip_z_score, device=device)
    for loss in (2.5, 1e38, NAN, INF, -INF):
        for grad_norm in (0.0, 3e38, NAN, INF):
            wanted = not (math.isfinite(loss) and math.isfinite(grad_norm))
            assert judged(guard, loss, grad_norm) == float(wanted), (loss, grad_norm)


def test_a_spike_is_one_only_after_enough_updates():
    losses = usual(WINDOW)
    for made in (0, 1, WINDOW - 1):
        guard = guard_of(skip_z_score=3.0)
        assert [judged(guard, loss) for loss in losses[:made]] == [0.0] * made
        assert judged(guard, 50.0) == 0.0, made
    guard = guard_of(skip_z_score=3.0)
    assert [judged(guard, loss) for loss in losses] == [0.0] * WINDOW
    assert judged(guard, 50.0) == 1.0


def test_skipped_losses_do_not_count_towards_enough_updates():
    guard = guard_of(skip_z_score=3.0)
    for loss in usual(WINDOW - 1):
        judged(guard, loss)
        judged(guard, NAN)
    assert judged(guard, 50.0) == 0.0


def test_a_spike_is_z_deviations_above_the_mean_and_not_below():
    losses = usual(WINDOW)
    mean, deviation = np.mean(losses), np.std(losses)
    for deviations, wanted in ((2.99, 0.0), (3.01, 1.0), (-2.99, 0.0), (-3.01, 0.0), (-25.0, 0.0)):
        guard = guard_of(skip_z_score=3.0)
        for loss in losses:
            judged(guard, loss)
        assert judged(guard, mean + deviations * deviation) == wanted, deviations


def test_without_a_z_score_no_finite_loss_is_a_spike():
    guard = guard_of()
    for loss in usual(WINDOW):
        judged(guard, loss)
    assert judged(guard, 1e30) == 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("made", [1, 2, 57, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_mean_and_variance_are_numpy_s_and_later_weigh_by_age(made, device):
    """Up to WINDOW updates all losses weigh the same; later each new one weighs 1 / WINDOW."""
    losses = usual(made)
    guard = guard_of(device=device)
    for loss in losses:
        judged(guard, loss)
    weights = np.full(min(made, WINDOW), 1 / min(made, WINDOW))
    for _ in range(made - WINDOW):
        weights = np.append(weights * (1 - 1 / WINDOW), 1 / WINDOW)
    mean = np.average(losses, weights=weights)
    variance = np.average((np.float64(losses) - mean) ** 2, weights=weights)
    assert guard.state_dict() == pytest.approx([mean, variance, made, 0, 0], rel=1e-11, abs=1e-15)


def test_skipped_losses_move_neither_mean_nor_variance():
    guard, undisturbed = (guard_of(skip_z_score=3.0) for _ in range(2))
    for step, loss in enumerate(usual(WINDOW + 20)):
        judged(guard, loss)
        judged(undisturbed, loss)
        for bad in (NAN, INF) if step <= WINDOW else (NAN, 50.0, 1e38):
            assert judged(guard, bad) == 1.0
        assert judged(guard, 3.0, INF) == 1.0
    assert guard.state_dict()[:3] == undisturbed.state_dict()[:3]  # to the bit
    assert guard.counts()[0] > undisturbed.counts()[0] == 0


# ---- Counting and stopping ----------------------------------------------------------------------------------------


def test_a_made_update_ends_the_streak_but_not_the_total():
    guard, seen = guard_of(), []
    for loss in (1.0, NAN, NAN, 2.0, INF, 3.0, 3.0, NAN, NAN, NAN):
        judged(guard, loss)
        seen.append(tuple(guard.counts().tolist()))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0), (3, 0), (4, 1), (5, 2), (6, 3)]


def numbers(signals: float = 0.0, time_outs: float = 0.0, skipped: float = 0.0, streak: float = 0.0) -> Numbers:
    return Numbers(2.5, 1.0, signals, time_outs, 0.0, 0.0, skipped, streak)


def test_enough_skipped_updates_in_a_row_end_the_run_and_as_many_in_all_do_not():
    guard = guard_of(max_skipped=3)
    assert guard.verdict(numbers(skipped=99, streak=2), 10) is None
    for streak in (3, 4):
        with pytest.raises(
            Diverged, match=rf"got {streak} updates in a row that were not.* up to step 10;.*--optim.lr"
        ):
            guard.verdict(numbers(skipped=99, streak=streak, signals=1.0), 10)


@pytest.mark.parametrize(
    ("signals", "time_outs", "why"),
    [(0, 0, None), (1, 0, SIGNAL), (0, 1, OUT_OF_TIME), (1, 8, SIGNAL), (8, 8, SIGNAL), (0, 8, OUT_OF_TIME)],
)
def test_a_signal_is_named_before_the_time(signals, time_outs, why):
    assert guard_of().verdict(numbers(signals, time_outs, skipped=5, streak=19), 10) == why


def test_a_resumed_guard_judges_as_the_one_that_never_stopped():
    guard = guard_of(skip_z_score=2.0)
    for loss in [*usual(WINDOW + 7), NAN, NAN]:
        judged(guard, loss)
    state = guard.state_dict()
    again = guard_of(skip_z_score=2.0)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert [x.hex() for x in again.state_dict()] == [x.hex() for x in state]
    assert again.counts().tolist() == state[3:]
    for loss in (3.1, 3.2, 3.3, NAN, 2.0, 50.0, 3.0):
        assert judged(again, loss) == judged(guard, loss)
    assert again.state_dict() == guard.state_dict()


def test_a_checkpoint_s_numbers_are_not_changed_by_judging_on():
    guard = guard_of()
    judged(guard, 2.0)
    counts, state = guard.counts(), guard.state_dict()
    judged(guard, NAN)
    assert counts.tolist() == [0, 0]  # the copy to the host may still be under way
    assert state == [2.0, 0.0, 1.0, 0.0, 0.0]


def test_an_abandoned_update_is_skipped_and_leaves_no_trace_in_the_guard():
    guard = guard_of()
    for loss in (2.0, NAN):
        judged(guard, loss)
    before = guard.state_dict()
    for is_abandoned, skips in ((True, 1.0), (False, 0.0)):
        skip = guard.judge(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(is_abandoned))
        assert skip.item() == skips
        assert (guard.state_dict() == before) == is_abandoned


# ---- Optimizers that get a verdict --------------------------------------------------------------------------------


def training(name: str, device: str = "cpu") -> tuple[GPT2, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = GPT2(TINY).to(device)
    return model, optim.build(model, OptimConfig(name, lr=1e-2, muon_rows=True))


def set_gradients(model: nn.Module, seed: int, spoil: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        if spoil is not None:
            p.grad.view(-1)[0] = spoil


def copied_tensors(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all weights, moments and step counts."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"{name}.{key}": value.clone() for key, value in optimizer.state[p].items()}
    return tensors


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("spoil", [NAN, INF, -INF])
def test_a_skipped_update_leaves_weights_moments_and_step_counts_to_the_bit(name, spoil, device):
    model, optimizer = training(name, device)
    guard = guard_of(device=device)
    one, bad = torch.tensor(1.0, device=device), torch.tensor(spoil, device=device)
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.found_inf = guard.judge(one, one)
        optimizer.step()
    before = copied_tensors(model, optimizer)
    assert {key.rpartition(".")[2] for key in before} >= {"step", "exp_avg", "exp_avg_sq"}
    assert any(key.endswith(".momentum") for key in before) == (name == "muon")
    for loss, grad_norm in ((bad, one), (one, bad)):
        set_gradients(model, 9, spoil)
        optimizer.found_inf = guard.judge(loss, grad_norm)
        optimizer.step()
        assert_same(copied_tensors(model, optimizer), before)
    assert guard.counts().tolist() == [2, 2]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_very_first_update_can_be_skipped(name):
    model, optimizer = training(name)
    weights = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 0, NAN)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, weights, model.parameters()))
    assert all((value == 0).all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_that_skipped_goes_on_as_if_the_bad_batch_had_not_been(name, device):
    """A verdict of 0.0 makes the same update as no verdict, to the bit."""
    runs = []
    for is_disturbed in (True, False):
        model, optimizer = training(name, device)
        guard = guard_of(device=device)
        for seed in range(4):
            if is_disturbed:
                set_gradients(model, 100 + seed, INF)
                optimizer.found_inf = guard.judge(torch.tensor(NAN, device=device), torch.tensor(1.0, device=device))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                verdict = guard.judge(torch.tensor(2.0, device=device), torch.tensor(1.0, device=device))
                assert verdict.item() == 0.0
                optimizer.found_inf = verdict
            set_gradients(model, seed)
            optimizer.step()
        assert hasattr(optimizer, "found_inf") == is_disturbed
        runs.append(copied_tensors(model, optimizer))
    assert_same(*runs)


# ---- Mailbox ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_reads_the_numbers_of_the_step_before(device):
    mailbox = Mailbox()
    rows = [Numbers(loss, norm, 0.0, 1.0, 0.0, 0.0, 2.0, 3.0) for loss, norm in ((1.5, NAN), (2.5, 1e300), (0.1, -INF))]
    read = [mailbox.exchange(torch.tensor(row, dtype=torch.float64, device=device)) for row in rows]
    assert read[0] is None
    assert repr(read[1:]) == repr(rows[:2])


def sent(**fields: float) -> torch.Tensor:
    """Numbers of an update, on the device, with these fields set."""
    zeros = Numbers(2.5, 1.0, *[0.0] * 6)
    return torch.tensor(zeros._replace(**fields), dtype=torch.float64)


def test_news_comes_a_step_later_or_at_once_where_it_is_needed():
    mailbox, guard = Mailbox(), guard_of()
    assert news(4, sent(save_due=1.0), mailbox, guard, at_once=False) == News(5, None, False)
    assert news(5, sent(), mailbox, guard, at_once=False) == News(6, None, True)  # asked for in step 4: once
    assert news(6, sent(), mailbox, guard, at_once=False) == News(7, None, False)
    assert news(7, sent(signalled=1.0), mailbox, guard, at_once=True) == News(8, SIGNAL, False)
    assert news(8, sent(), mailbox, guard, at_once=False) == News(9, None, False)


@pytest.mark.parametrize("asks", ["signalled", "out_of_time", "save_due"])
def test_weights_are_never_saved_as_of_an_update_that_another_rank_abandoned(asks):
    """A save follows what the update before asked for; the last update may have been abandoned."""
    mailbox, guard = Mailbox(), guard_of()
    news(4, sent(**{asks: 1.0}), mailbox, guard, at_once=False)
    assert news(5, sent(abandoned=1.0), mailbox, guard, at_once=False) == News(5, SIGNAL, asks == "save_due")
    mailbox = Mailbox()
    news(4, sent(abandoned=1.0), mailbox, guard, at_once=False)
    assert news(5, sent(abandoned=1.0), mailbox, guard, at_once=False).step == 4
