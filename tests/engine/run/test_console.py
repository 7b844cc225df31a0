"""The console of a run: lines in a pipe, and on a terminal a bar of whole figures at any width."""

import dataclasses
import io
import re
import shutil
import sys
from itertools import pairwise

import pytest
import rich.console
from runs import train

from engine import output
from engine.config import PRESETS
from engine.health import stopping
from engine.run import console
from engine.run.console import Bar, Lines
from engine.run.metrics import Metrics
from engine.run.progress import Pace

FIELDS = {"loss": 3.14159, "lr": 4e-3, "tokens_per_s": 12345.6, "mfu": 0.4321, "peak_gib": 0.5, "skipped": 3}
FIGURES = {
    **{"step": "step  1000/19073", "loss": "loss 3.142", "left": "5:01:13 left", "skipped": "3 skipped"},
    **{"tokens_per_s": "12,346 bytes/s", "val_loss": "val loss 2.7183", "lr": "lr 4.00e-03"},
    **{"peak_gib": "0.50 GiB", "mfu": "MFU 43.2%"},
}  # most wanted first


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(PRESETS["tiny"], out=str(tmp_path), num_steps=1000, eval_tokens=3, eval_every=None)


@pytest.fixture
def now(monkeypatch):
    """time.monotonic() of a run, [seconds]."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screen(monkeypatch):
    """What is printed on a terminal, of 150 columns at first."""
    screen, make = io.StringIO(), rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **options: make(file=screen, force_terminal=True, width=150, **options)
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    return screen


@pytest.fixture
def bar(screen, now, config, monkeypatch):
    """A bar after 1,000 of 19,073 steps of one second each, redrawn only when a test says so."""
    config = dataclasses.replace(config, num_steps=19_073)
    pace = Pace(config, 0)
    for step in range(1000):
        now[0] += 1.0
        pace.end_step(step + 1)
    bar = Bar(config.num_steps, "byte", pace)
    bar._live._refresh_thread.stop()
    bar.advance(1000)
    bar._fields = FIELDS | {"val_loss": 2.71828}
    yield bar
    bar.close()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def drawn(bar: Bar, width: int) -> str:
    """The bar's line on a terminal of so many columns."""
    bar._console.width = width
    return plain("".join(segment.text for segment in bar._console.render(bar) if not segment.control))


# ---- Terminal -----------------------------------------------------------------------------------------------------


def test_at_every_width_the_bar_is_one_line_of_whole_figures_the_most_wanted_first(bar):
    for width in range(1, 141):
        line = drawn(bar, width)
        assert len(line) <= width
        assert "\n" not in line
        shown = [text for text in re.sub(r" [━╸╺]+", "", line).split("  ") if text]
        shown = [re.sub("^ ?1000", "step  1000", text) for text in re.sub(r"^step +", "", "  ".join(shown)).split("  ")]
        wanted = list(FIGURES.values())[: len(shown)]
        assert sorted(shown) == sorted(wanted) or (shown == [""] and width < len(FIGURES["step"]))
        if width >= 60:
            assert {FIGURES["step"], FIGURES["loss"], FIGURES["left"]} <= set(shown), width
        if width >= 135:
            assert len(shown) == len(FIGURES)
    assert len(drawn(bar, 140).split("━")) > 5


def test_an_accuracy_says_which_one_it_is():
    figures = {name: console.format_field(name, 0.3333, "byte") for name in console.TASKS}
    assert figures == {"hellaswag_acc_norm": "HellaSwag acc_norm 33.3%", "lambada_acc": "LAMBADA 33.3%"}


def test_a_terminal_that_becomes_narrower_is_cleared_of_all_rows_that_the_line_breaks_into(bar, screen):
    bar._live.refresh()
    long = len(plain(screen.getvalue()).rpartition("\r")[2])
    assert long > 120
    for width, rows in ((50, 2), (50, 0), (20, 2), (60, 0)):  # rows above the last
        screen.truncate(0)
        bar._console.width = width
        bar._live.refresh()
        assert screen.getvalue().count("\x1b[1A") == rows, width


def test_a_terminal_gets_the_lines_of_a_pipe_above_the_bar_as_wide_as_it_is(bar, screen, now):
    now[0] += 10
    bar.update(1000, FIELDS | {"val_loss": 2.71828})
    assert "step  1000/19073  loss 3.142  val loss 2.7183  lr 4.00e-03  12,346 bytes/s  MFU 43.2%" in screen.getvalue()
    screen.truncate(0)
    bar._console.width = 60
    now[0] += 10
    bar.update(1000, FIELDS)
    assert "step  1000/19073  loss 3.142  3 skipped  5:01:12 left\n" in screen.getvalue()
    bar.print_line("[bold]passing over[/bold] :100: " + 80 * "x")
    assert "[bold]passing over[/bold] :100: " + 80 * "x" + "\n" in screen.getvalue()  # neither markup nor wrapped


def test_a_bar_starts_where_a_terminal_moves_its_cursor_and_lines_elsewhere(config, screen, monkeypatch, tmp_path):
    run = Metrics(config, 500, True, "byte")
    assert isinstance(run._console, Bar)
    run.log(600, val_loss=2.71828)
    run.end_step(600)
    assert (
        screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()
    )  # a cursor is left if it is killed
    run.close()
    assert "step  600/1000  val loss 2.7183\n" in plain(screen.getvalue())
    assert plain(screen.getvalue()).endswith("  val loss 2.7183\n")
    assert " 601/1000" in plain(screen.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    assert type(Metrics(config, 500, True, "byte")._console) is Lines
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    monkeypatch.setenv("TERM", "xterm")
    assert type(Metrics(config, 500, True, "byte")._console) is Lines


def test_the_width_of_what_is_no_terminal_is_not_known(tmp_path):
    assert output.columns(io.StringIO()) is None
    with (tmp_path / "file").open("w") as file:
        assert output.columns(file) is None


# ---- Pipe ---------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_lines_now_and_then(config, now, capsys):
    run = Metrics(config, 0, True, "byte")
    for step in range(0, 101):  # an eighth of a second each
        if step == 33:
            run.log(step, val_loss=2.71828)
        run.log(step, loss=3.14159, lr=4e-3, tokens_per_s=12345.6, mfu=None, peak_gib=0.5, grad_norm=1.0)
        run.end_step(step)
        now[0] += 0.125
    run.close()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\r" not in printed
    lines = printed.splitlines()
    # Printed at once, with the time left: the interval of the others begins again.
    assert lines[0] == "step   33/1000  val loss 2.7183  2:00 left"
    assert lines[1].startswith("time: about 2 min to the end (0.12 s a step, ")  # 0.125 s * 959
    assert lines[2] == "step   73/1000  loss 3.142  lr 4.00e-03  12,346 bytes/s  0.50 GiB  1:55 left"  # 0.125 s * 926
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("part", "pieces", "seconds", "wanted"),
    [
        pytest.param("update", 64, 7.0, r"step    0/1000  micro-batch \d+/64  about 5 d 4 h left", id="step"),
        pytest.param("update", 2, 400.0, r"step    0/1000  micro-batch 1/2  about 9 d 6 h left", id="coarse"),
        # of 1,000 tokens; a step has 3,000 and costs three times as much for each
        pytest.param("evaluation", 100, 1.0, r"step    0/1000  evaluating \d+/100  about 10 d 10 h left", id="eval"),
    ],
)
def test_a_long_step_says_within_half_a_minute_how_long_it_all_takes_and_then_rarely(
    config, now, capsys, part, pieces, seconds, wanted
):
    config = dataclasses.replace(config, tokens_per_step=3000, eval_tokens=1000)
    run, began, printed = Metrics(config, 0, True, "byte"), now[0], []
    run.pace._pieces = {part: pieces}
    with run.pace.part(part):
        for _ in range(pieces):
            now[0] += seconds
            run.progress()
            printed += [(now[0] - began, line) for line in capsys.readouterr().out.splitlines()]
    run.close()
    assert printed
    assert printed[0][0] <= max(30.0, seconds)
    assert re.fullmatch(wanted, printed[0][1])
    assert all(later[0] - earlier[0] >= 300 for earlier, later in pairwise(printed))
    assert len(printed) >= (now[0] - began) // 400


def test_a_short_run_says_nothing_of_its_time(config, now, capsys):
    run = Metrics(dataclasses.replace(config, num_steps=50), 0, True, "byte")
    for step in range(50):
        now[0] += 1.0
        run.end_step(step)
    run.close()
    assert capsys.readouterr().out == ""


# ---- Whole run ----------------------------------------------------------------------------------------------------


def test_a_run_says_its_epochs_at_first_and_at_the_end_how_long_it_and_its_launches_took(
    trained, shards, tmp_path, capfd, monkeypatch
):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(stopping, "started_at", lambda process: stopping.now() - 7200)  # when the process did
    assert train(tmp_path / "run", shards, "--num-steps", "3") == 0
    printed, took = capfd.readouterr().out, r"[\w. ]+, [\d,]+ bytes/s in training"
    assert re.search(r"^epochs: under 0\.01, 768 of [\d,]+ training bytes in 3 steps$", printed, re.M)
    wanted = (
        rf"^done: 3 steps, .*\n  this launch: 1 steps in 2 h, [\d,]+ bytes/s in training; all launches: about {took}$"
    )
    assert re.search(wanted, printed, re.M)
