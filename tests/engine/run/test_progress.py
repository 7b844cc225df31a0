"""Pace and header: the time that is left and was taken, epochs, and what a CPU would take."""

import dataclasses
import re

import pytest
import torch

from engine.config import PRESETS
from engine.distributed import Ranks
from engine.health import stopping
from engine.run import header, progress
from engine.run.header import Corpus
from engine.run.metrics import Metrics
from engine.run.progress import Pace, Past, clock, words

CPU = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def now(monkeypatch):
    """time.monotonic() of a run, [seconds]."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def preset(**fields):
    return dataclasses.replace(PRESETS["tiny"], **{"num_steps": 100, "eval_every": 30, "save_every": 50} | fields)


def corpus(train: int = 10_000_000) -> Corpus:
    return Corpus("byte", train, 2_000_000, 65_536, 16, 4)


@pytest.mark.parametrize(
    ("seconds", "shown", "said"),
    [
        (0.00001, "0:00", "under 0.001 s"),
        (0.004, "0:00", "0.004 s"),
        (8.21, "0:08", "8.2 s"),
        (59.97, "0:59", "1 min"),
        (115.9, "1:55", "1 min 56 s"),
        (3599.9, "59:59", "1 h"),
        (7384, "2:03:04", "2 h 3 min"),
        (86_399, "23:59:59", "1 d"),
        (273_700, "3 d 4 h", "3 d 4 h"),
        (1e7, "115 d", "115 d"),
        (8.5e7, "2.7 years", "2.7 years"),
        (1e13, "316,881 years", "316,881 years"),
    ],
)
def test_a_duration_is_short_on_a_bar_and_has_units_in_a_sentence(seconds, shown, said):
    assert (clock(seconds), words(seconds)) == (shown, said)


# ---- Pace ---------------------------------------------------------------------------------------------------------


def run(pace: Pace, now: list[float], steps: range, first: float = 1.0) -> None:
    """Steps of one second, after evaluations of 20 s and saves of 5 s; the very first step takes `first`."""
    for step in steps:
        if step % 30 == 0:
            with pace.part("evaluation"):
                now[0] += 20
        if step % 50 == 0 and step:
            with pace.part("checkpoint"):
                now[0] += 5
        with pace.part("data"):
            now[0] += 0.25
        with pace.part("update"):
            now[0] += 0.75 + (first - 1 if step == 0 else 0)
        pace.end_step(step + 1)


def test_the_time_left_counts_steps_evaluations_and_saves_to_come_and_not_the_compile(now):
    pace = Pace(preset(), 0)
    assert pace.left() is None
    run(pace, now, range(0, 1), first=90.0)
    assert not pace.left().is_measured  # the first step may have compiled
    run(pace, now, range(1, 60))
    assert pace.left().is_measured
    assert pace.left().seconds == pytest.approx(40 + 2 * 20 + 5)  # evaluations at 90 and 100, a save at 100
    with pace.part("evaluation"):
        now[0] += 8
        assert pace.left().seconds == pytest.approx(40 + 2 * 20 + 5 + 12)
        now[0] += 12
    run(pace, now, range(61, 76))
    assert pace.left().seconds == pytest.approx(24 + 2 * 20 + 5)
    now[0] += 0.5  # of a step
    assert str(pace.left()) == "1:08 left"


def test_compiling_counts_neither_as_step_nor_as_speed(now):
    pace = Pace(preset(eval_every=None, save_every=None, eval_tokens=3), 0)
    with pace.part("update"):
        now[0] += 300
        pace.compiled()
        now[0] += 2
    # The loss is printed here, between the update and the end of its step.
    assert (pace.step_seconds(), pace.left().is_measured) == (2, False)
    assert pace.left().seconds == pytest.approx(99 * 2, rel=0.01)
    pace.end_step(1)
    assert pace.train_seconds == 2
    assert pace.left().seconds == pytest.approx(99 * 2, rel=0.01)


def test_the_first_loss_has_the_time_left_of_the_update_just_made_and_not_of_an_evaluation_with_its_sample(now):
    pace = Pace(preset(num_steps=40, eval_every=None, save_every=None, tokens_per_step=2**20), 0)
    pace.sized(50.0, 64, 2, 1)  # 4,096 tokens, in one batch: 256 times less than a step's
    with pace.part("evaluation"):
        now[0] += 1
        pace.tick()
        for _ in range(30):  # tokens of a sample
            now[0] += 1
            pace.tick()
    assert pace.step_seconds() == 1 * 3 * 256
    brief = Pace(pace.config, 0)
    brief.sized(50.0, 64, 2, 1)
    with brief.part("evaluation"):
        now[0] += 0.5
        brief.tick()  # warms up, mostly
    assert brief.left() is None
    with pace.part("update"):
        for _ in range(2):
            now[0] += 10
            pace.tick()
    assert pace.step_seconds() == 20
    assert pace.left().seconds == pytest.approx(39 * 20 + 31)  # the last evaluation samples too


def test_the_batches_of_an_evaluation_end_when_a_gpu_has_done_them(now):
    rank = Metrics(preset(), 0, False, "byte")
    pace = rank.pace
    pace.sized(50.0, 1024, 4, 2)  # four batches on this rank
    with pace.part("evaluation"):
        for _ in range(4):  # given to the GPU at once
            now[0] += 0.001
            pace.tick()
        now[0] += 48
        rank.log(0, val_loss=1.0)
        now[0] += 30  # a sample
        assert pace.step_seconds() == pytest.approx(3, rel=0.01)


def test_a_stall_hardly_changes_the_time_left_and_is_not_called_training(now):
    config = preset(num_steps=1000, eval_every=None, save_every=None, eval_tokens=3)
    pace = Pace(config, 0)
    for step in range(100):
        now[0] += 0.16 + (60 if step == 90 else 0)
        pace.end_step(step + 1)
        assert step < 1 or pace.step_seconds() == pytest.approx(0.16, rel=0.03)
    assert pace.left().seconds == pytest.approx(900 * 0.16, rel=0.03)
    assert pace.train_seconds == pytest.approx(100 * 0.16)
    said = "took 1 min 16 s, 6,400 bytes/s in training without 1 min of standing still"
    assert pace.report("byte", Past(), 0) == said
    for part in ("evaluation", "checkpoint") * 3:
        with pace.part(part):
            now[0] += 1
    with pace.part("evaluation"):
        now[0] += 600
    assert pace.evaluation_seconds() == 1
    early = Pace(config, 0)
    for step in range(3):
        now[0] += 0.16 + (60 if step == 2 else 0)
        early.end_step(step + 1)
    assert early.step_seconds() < 0.32


def test_the_time_left_ends_with_max_minutes(now, monkeypatch):
    monkeypatch.setattr(stopping, "now", lambda: now[0])
    monkeypatch.setattr(stopping, "launched_at", lambda: 70.0)  # half a minute before
    pace = Pace(preset(num_steps=10_000, max_minutes=5.0), 0)
    run(pace, now, range(5))
    assert str(pace.left()) == "4:05 left"
    assert pace.expected().startswith("time: about 4 min 5 s to --max-minutes (1.0 s a step, 20.0 s an evaluation)")
    monkeypatch.setattr(pace, "_limit", 1e9)
    assert pace.expected().startswith("time: about 4 h 38 min to the end (")


def test_a_launch_begins_with_its_process(now, monkeypatch):
    monkeypatch.setattr(stopping, "now", lambda: 5000.0)
    monkeypatch.setattr(stopping, "started_at", lambda process: 4991.0)
    assert progress.launched() == 91.0


def test_a_step_in_progress_is_estimated_without_its_first_micro_batch(now):
    pace = Pace(preset(eval_tokens=3), 0)
    pace.sized(50.0, 0, 4, 1)
    with pace.part("update"):
        now[0] += 30
        pace.tick()
        assert (pace.doing(), pace.step_seconds()) == ("micro-batch 1/4", 120)
        for _ in range(2):
            now[0] += 2
            pace.tick()
        assert (pace.doing(), pace.step_seconds()) == ("micro-batch 3/4", 8)


def test_an_evaluation_in_progress_tells_of_steps_and_its_sample_of_nothing(now):
    pace = Pace(preset(), 0)
    pace.sized(50.0, 1024, 4, 2)  # 65,536 tokens, in 8 batches on two ranks: 64 times a step's
    with pace.part("evaluation"):
        for _ in range(4):
            now[0] += 16
            pace.tick()
        assert (pace.doing(), pace.evaluation_seconds()) == ("sampling", 64)
        assert pace.step_seconds() == pytest.approx(3)
        for _ in range(9):
            now[0] += 100
            pace.tick()
        assert pace.evaluation_seconds() == 64


def test_a_run_says_how_long_it_took_and_one_that_went_on_what_all_launches_took(now):
    pace = Pace(preset(), 0)
    assert pace.report("byte", Past(), 0) == "this launch took 0 s"
    pace.sized(40.0, 1, 1, 1)  # launched a minute before the first step
    run(pace, now, range(100))
    assert pace.report("byte", Past(), 0) == "took 4 min 5 s, 1,024 bytes/s in training"  # 60 + 100 + 4 * 20 + 5 s
    past, resumed = Past(), Pace(preset(), 80)
    for row in ({"step": 0, "step_ms": 4000.0, "eval_ms": 20_000.0}, {"step": 10, "step_ms": 2e3}, {"step": 70}):
        past.add(row)
    for odd in ({"step": None, "step_ms": 1.0}, {"step": 90, "step_ms": "1"}, {"step": 5, "step_ms": 1e9}, {}):
        past.add(odd)
    run(resumed, now, range(80, 100))
    assert resumed.report("byte", past, 80 * 512) == (
        "this launch: 20 steps in 40.0 s, 1,024 bytes/s in training; "  # with the evaluation at 90
        "all launches: about 3 min 55 s, 316 bytes/s in training"  # 80 steps of (4 + 10 * 2) / 11 s, 20 s, 40 s
    )
    assert "all launches" not in resumed.report("byte", Past(), 0)  # a record without times


# ---- Header -------------------------------------------------------------------------------------------------------


def shown(config, sizes: Corpus, capsys, speed: float = 1e11, past: tuple[int, int] = (0, 0)) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(header, "matmul_flops", lambda dtype: speed)
        patch.setattr(header, "load", lambda: (0.5, 2))
        header.show(config, CPU, sizes, past, torch.float32, "precision: fp32")
    return capsys.readouterr()


def test_the_header_says_epochs_and_loudly_so_if_a_small_corpus_is_read_very_often(capsys):
    out, err = shown(preset(), corpus(), capsys)
    assert "\nepochs: 0.01, 102,400 of 10,000,000 training bytes in 100 steps\nprecision: fp32\n" in out
    assert err == ""
    out, err = shown(preset(), corpus(4096), capsys, past=(50, 10_000))  # of smaller steps
    assert "\nepochs: 15, 61,200 of 4,096 training bytes in 100 steps\n" in out
    assert err == ""
    _, err = shown(preset(), corpus(4096), capsys)
    assert re.fullmatch(
        "train: THE CORPUS IS READ 25 TIMES: .*give more than these 4,096 bytes, .* --num-steps to about 64\n", err
    )
    _, err = shown(preset(), corpus(4096), capsys, past=(90, 61_440))  # four steps are left of 16 epochs
    assert "lower --num-steps to about 94\n" in err
    _, err = shown(preset(), corpus(4096), capsys, past=(99, 70_000))
    assert err.endswith("give more than these 4,096 bytes\n")


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [(99_600, "100"), (99_400, "99"), (9960, "10"), (1500, "1.5"), (999, "1.0"), (12, "0.01"), (0.064, "under 0.01")],
)
def test_epochs_are_plain_numbers(tokens, wanted):
    assert header.epochs(preset(), corpus(1000), tokens).startswith(f"epochs: {wanted}, ")


def test_a_gpu_preset_on_a_cpu_says_loudly_what_it_would_take_and_what_to_do_instead(capsys):
    gpt2 = dataclasses.replace(PRESETS["gpt2"], eval_every=None, eval_tokens=1024)
    sizes = Corpus("token", 10**10, 10**8, 1024, 1, 512)
    out, err = shown(gpt2, sizes, capsys)
    assert "time:" not in out
    # 855 million FLOPs for each of ten billion tokens
    assert err.startswith("train: THIS RUN IS TOO LONG FOR A CPU: about 2.7 years on this CPU, an estimate: 8.6e+18 ")
    assert "at the 100 GFLOP/s of a matrix product here, 1 h 15 min a step; it starts all the same" in err
    assert "tiny (bytes), mini (bytes)" in err
    assert "--num-steps 9 takes about 11 h 13 min" in err
    _, err = shown(gpt2, sizes, capsys, past=(1000, 10**9))
    assert "--num-steps 1009 takes about 11 h 13 min" in err
    _, err = shown(dataclasses.replace(gpt2, eval_every=1), sizes._replace(evaluated=10**7), capsys)
    assert "; an evaluation takes about 7 h 55 min, raise --eval-every or lower --eval-tokens; or train" in err
    assert "--num-steps" not in err
    out, err = shown(dataclasses.replace(gpt2, max_minutes=90.0), sizes, capsys)
    assert "1 h 15 min a step; it stops after 90 minutes (--max-minutes)\n" in out
    assert err == ""
    _, err = shown(gpt2, sizes, capsys, speed=1e9)
    assert "lower --tokens-per-step too" in err  # a step takes days
    out, err = shown(dataclasses.replace(gpt2, num_steps=3), sizes, capsys)
    assert "time: about 3 h 44 min on this CPU, an estimate: " in out
    assert err == ""
    sizes = sizes._replace(evaluated=10**9)
    out, err = shown(gpt2, sizes, capsys, past=(gpt2.num_steps, 10**10))  # only the last evaluation is left
    assert "time:" not in out
    assert err == ""


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_a_preset_for_a_cpu_is_not_called_too_long(name, capsys):
    out, err = shown(PRESETS[name], corpus(), capsys)
    assert ("time:" in out, err) == (name == "mini", "")


def test_the_speed_of_a_matrix_product_is_measured_in_less_than_a_second():
    began = progress.time.perf_counter()
    assert 1e7 < header.matmul_flops(torch.float32) < 1e14
    assert progress.time.perf_counter() - began < 1
