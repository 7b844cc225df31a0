"""Loss curve and schedule: complete files, with titles and labels; matplotlib's settings stay."""

import dataclasses
import math
import os
import shlex
import sys
import threading

import matplotlib
import pytest
from runs import refuse, run, train

from engine import optim
from engine.config import OptimConfig, TrainConfig
from engine.run import directory, plots
from model.presets import GPT2Config

ROWS = [{"step": s, "tokens": 1024 * s, "loss": 5.0 - s / 250, "lr": 1e-3} for s in range(0, 1000, 10)]
ROWS[0]["val_loss"], ROWS[50]["val_loss"] = 5.5, 3.25


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        out=str(tmp_path / "my run"),
        num_steps=1000,
        tokens_per_step=1024,
        model=GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=128, vocab_size=257),
        optim=OptimConfig(lr=4e-3, warmup_tokens=100 * 1024),
    )


def drawn(config, rows, unit, monkeypatch) -> dict[str, "matplotlib.axes.Axes"]:
    """Draws without saving; returns the axes of each picture by file name."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.setdefault(path.name, figure.axes[0]))
    plots.draw(config, rows, unit)
    return figures


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        pytest.param(ROWS, {}, id="a run"),
        pytest.param([], {}, id="no row"),
        pytest.param(ROWS[:1], {}, id="one row"),
        pytest.param([{"step": 0, "tokens": 0, "val_loss": 5.5}], {}, id="only a validation"),
        pytest.param([{"step": 0, "tokens": 0, "loss": math.nan, "val_loss": math.inf}], {}, id="only what diverged"),
        pytest.param([*ROWS, {"step": 1000, "tokens": 1024000, "loss": math.nan}], {}, id="diverged at the end"),
        pytest.param([], {"num_steps": 1}, id="one step"),
        pytest.param([], {"optim": OptimConfig(warmup_tokens=0)}, id="no warm-up"),
    ],
)
def test_both_pictures_are_whole_and_nothing_else_is_left(config, tmp_path, rows, changes):
    (tmp_path / "my run").mkdir()
    config = dataclasses.replace(config, **changes)
    paths = plots.draw(config, rows, "byte")
    assert [path.name for path in paths] == ["loss_curve.png", "lr_schedule.png"]
    assert sorted(path.name for path in (tmp_path / "my run").iterdir()) == ["loss_curve.png", "lr_schedule.png"]
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert content.endswith(b"IEND\xaeB`\x82")
        assert len(content) > 10_000


def test_the_loss_curve_says_what_it_shows(config, monkeypatch):
    axes = drawn(config, ROWS, "byte", monkeypatch)["loss_curve.png"]
    assert axes.figure.get_suptitle() == "Loss while training"
    assert axes.get_title() == "my run: 4 layers, width 128, context 128; 1,024 bytes per step"
    assert axes.get_xlabel() == "million training bytes"
    assert axes.get_ylabel() == "cross-entropy loss, nats per byte"
    uniform, train, val = legend(axes)
    assert uniform == "uniform guess, ln 257 = 5.55"
    assert train.startswith("train (smoothed), last 1.")
    assert val == "validation, last 3.250"
    raw, smoothed, validation = axes.get_lines()[1:]
    assert raw.get_xdata()[-1] == smoothed.get_xdata()[-1] == pytest.approx(990 * 1024 / 1e6)
    assert list(validation.get_ydata()) == [5.5, 3.25]
    low, high = axes.get_ylim()
    assert low < 1.04
    assert high > 5.55


def test_hellaswag_has_an_axis_of_its_own_if_rows_have_it(config, monkeypatch):
    rows = [*ROWS, {"tokens": 2048, "hellaswag_acc_norm": 0.25, "hellaswag_acc": 0.26}, {"tokens": 4096}]
    axes = drawn(config, [*rows, {"tokens": 8192, "hellaswag_acc_norm": 0.305}], "byte", monkeypatch)["loss_curve.png"]
    (below,) = axes.figure.legends  # where no curve can lie
    assert below.get_texts()[-1].get_text() == "HellaSwag acc_norm, last 30.5%"
    (line,) = axes.figure.axes[1].get_lines()
    assert list(line.get_ydata()) == pytest.approx([25.0, 30.5])
    assert list(line.get_xdata()) == pytest.approx([0.002048, 0.008192])
    plain = drawn(config, ROWS, "byte", monkeypatch)["loss_curve.png"]
    assert len(plain.figure.axes) == 1
    assert plain.figure.legends == []


def test_the_schedule_shows_the_plan_and_what_was_done(config, monkeypatch):
    axes = drawn(config, ROWS, "token", monkeypatch)["lr_schedule.png"]
    assert axes.figure.get_suptitle() == "Learning rate"
    assert axes.get_title() == "linear warm-up over 100 steps, cosine to 10% at step 1,000"
    assert axes.get_xlabel() == "million training tokens"
    assert legend(axes) == ["planned", "done, last 1.00e-03"]
    planned, done = axes.get_lines()
    assert max(planned.get_ydata()) == config.optim.lr == optim.learning_rate(99, config)
    assert len(done.get_xdata()) == len(ROWS)


@pytest.mark.parametrize(
    ("most", "label"),
    [
        (0, "training tokens"),
        (999, "training tokens"),
        (1000, "thousand training tokens"),
        (10**6, "million training tokens"),
        (10**10, "billion training tokens"),
    ],
)
def test_the_token_axis_keeps_its_numbers_short(most, label):
    size, text = plots.token_axis(most, "token")
    assert text == label
    assert most / size <= 1000


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert plots.smooth([2.0] * 10, 0.9) == pytest.approx([2.0] * 10)
    assert plots.smooth([3.0, 1.0], 0.5) == pytest.approx([3.0, 5 / 3])  # (0.25 * 3 + 0.5 * 1) / 0.75
    assert plots.smooth([3.0, 1.0], 0.0) == [3.0, 1.0]


def test_drawing_leaves_pyplot_and_its_settings_alone(config, tmp_path, monkeypatch):
    (tmp_path / "my run").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    before = matplotlib.rcParams.copy()
    plots.draw(config, ROWS, "byte")
    assert matplotlib.rcParams.copy() == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$\\frac$ 100%_#", os.fsdecode(b"\xff$"), "学习", "two\nlines"])
def test_any_name_of_a_run_can_be_drawn(config, tmp_path, name):
    config = dataclasses.replace(config, out=str(tmp_path / name))
    (tmp_path / name).mkdir()
    with matplotlib.rc_context({"text.usetex": True}):  # as a matplotlibrc may say
        assert all(path.stat().st_size > 10_000 for path in plots.draw(config, ROWS, "byte"))


def test_a_directory_in_a_picture_s_place_is_a_sentence_and_the_other_is_drawn(config, tmp_path, capfd):
    (tmp_path / "my run" / "loss_curve.png").mkdir(parents=True)
    warnings = []
    painter = plots.Painter(config, "byte", warnings.append)
    for count in (1, 2):
        painter.draw(ROWS[:count])
        painter.close()
    assert len(warnings) == 1
    assert "loss_curve.png must be a file that can be written, got Is a directory; move away" in warnings[0]
    names = {path.name for path in (tmp_path / "my run").iterdir()}
    assert names == {"loss_curve.png", "lr_schedule.png"}
    directory.write_config(config, "bytes", {})
    assert run("plot", "--run", config.out) == 2
    assert "must be a file that can be written, got Is a directory" in capfd.readouterr().err


# ---- Drawing while training goes on -------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch) -> tuple[threading.Event, list[list[dict]]]:
    """An event that every drawing waits for, and the rows of each that began."""
    opens, begun, draw = threading.Event(), [], plots.draw

    def slow(config, rows, unit):
        begun.append(rows)
        assert opens.wait(20)
        return draw(config, rows, unit)

    monkeypatch.setattr(plots, "draw", slow)
    return opens, begun


def test_no_step_waits_for_a_drawing_and_the_newest_rows_are_drawn_in_the_end(config, tmp_path, gate):
    (tmp_path / "my run").mkdir()
    opens, begun = gate
    painter = plots.Painter(config, "byte", refuse)
    for count in (1, 2, 3, len(ROWS)):
        painter.draw(ROWS[:count])
    assert not list((tmp_path / "my run").iterdir())
    opens.set()
    painter.close()
    assert begun[-1] == ROWS
    assert len(begun) <= 2
    assert sorted(path.name for path in (tmp_path / "my run").iterdir()) == ["loss_curve.png", "lr_schedule.png"]
    painter.draw(ROWS)  # a thread that has ended is followed by another
    painter.close()
    assert begun[-1] == ROWS
    assert len(begun) <= 3


def test_a_drawing_that_never_ends_does_not_keep_the_run(config, gate, monkeypatch):
    monkeypatch.setattr(plots, "LONGEST_DRAWING", 0.05)
    warnings = []
    painter = plots.Painter(config, "byte", warnings.append)
    painter.draw(ROWS)
    painter.close()
    assert [
        f"still not drawn after 0.05 s; gpt2 plot --run {shlex.quote(config.out)}" in line for line in warnings
    ] == [True]
    warnings.clear()
    gate[0].set()  # the directory is missing, so that it then fails
    painter.close()


def test_a_run_does_not_wait_for_a_drawing_and_does_not_end_with_one(shards, tmp_path, gate, monkeypatch):
    opens, begun = gate
    close = plots.Painter.close
    monkeypatch.setattr(plots.Painter, "close", lambda self: (opens.set(), close(self)))  # not before the last step
    assert train(tmp_path / "run", shards, "--num-steps", "3", "--eval-every", "1") == 0
    assert {"loss_curve.png", "lr_schedule.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert begun[-1][-1]["step"] == 3


def test_an_error_while_drawing_is_a_warning(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plots, "draw", lambda *_: 1 / 0)
    assert train(tmp_path / "run", shards, "--num-steps", "1", "--eval-every", "None") == 0
    assert "plots: not drawn: ZeroDivisionError('division by zero'); training goes on" in capfd.readouterr().out
