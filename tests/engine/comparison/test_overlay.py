"""gpt2 plot of several runs: one picture, its axes, and the curves of others."""

import csv

import pytest
from made_runs import make, row, rows
from runs import run

from engine.comparison import overlay, records, references
from engine.run import plots


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Axes of the pictures that are drawn, which are not saved."""
    found = []
    monkeypatch.setattr(plots, "save", lambda figure, path: found.append(figure.axes[0]) or path)
    return found


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture
def pair(tmp_path) -> list[str]:
    """A run of 100 steps, and one of 40 with a name that is a formula."""
    return [str(make(tmp_path / "a", rows(100))), str(make(tmp_path / "$\\frac$", rows(40, loss=1.0, ms=200.0)))]


@pytest.mark.parametrize(
    ("x", "label", "ends"),
    [
        ("tokens", "thousand training bytes", [100, 40]),
        ("steps", "optimizer steps", [100, 40]),
        ("hours", "training time, seconds (without evaluations and checkpoints)", [10, 8]),
    ],
)
def test_runs_of_unequal_lengths_share_an_axis(pair, drawn, x, label, ends):
    assert run("plot", *pair, "--x", x) == 0
    assert drawn[0].get_xlabel() == label
    assert legend(drawn[0]) == ["a: validation, last 2.110", "$\\frac$: validation, last 1.124"]
    lines = drawn[0].get_lines()
    assert [line.get_xdata()[-1] for line in lines if line.get_marker() == "o"] == pytest.approx(ends)
    assert len(lines) == 2 * 3  # raw, smoothed, validation


def test_smooth_is_the_number_of_rows_and_the_raw_loss_is_drawn_thin_behind(pair, drawn):
    assert run("plot", pair[0], "--smooth", "4") == 0
    raw, smoothed, _ = drawn[0].get_lines()
    assert list(smoothed.get_ydata()) == pytest.approx(plots.smooth(list(raw.get_ydata()), 0.75))
    assert raw.get_linewidth() < smoothed.get_linewidth()
    assert raw.get_alpha() < 0.5


def test_the_picture_is_written_where_it_says(pair, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run("plot", *pair) == 0
    assert capfd.readouterr().out == "comparison.png\n"
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for command in ("plot", "report"):
        for out, said in (
            ("", "got ''; name a file"),
            (".", "got the directory .; name a file"),
            (
                "nowhere/x",
                "got nowhere/x, where nowhere is no directory; make the directory nowhere, or choose another",
            ),
        ):
            assert run(command, *pair, "--out", out) == 2
            error = capfd.readouterr().err
            assert f"{command}: --out must be a file that can be written, {said}" in error
            assert "Traceback" not in error
    assert [path.name for path in tmp_path.glob("*.*")] == ["comparison.png"]


def test_references_are_labelled_with_source_and_validation_set(tmp_path, drawn):
    path = str(make(tmp_path / "run", rows(100, loss=3.0), tokenizer="gpt2"))
    assert run("plot", path, "--reference", "gpt2-124m", "llm.c", "first-run") == 0
    axes = drawn[0]
    assert "not comparable" in axes.get_title()
    level, curve, first = [line for line in axes.get_lines() if line.get_color() == "#444444"]
    assert set(level.get_ydata()) == {3.292}
    assert "FineWeb-Edu (build-nanogpt, play.ipynb)" in level.get_label()
    assert "FineWeb (" in curve.get_label()
    assert "FineWeb-Edu, its own split (its log)" in first.get_label()
    assert len(legend(axes)) == 4


def test_the_first_run_s_curve_is_its_log_thinned():
    with references.FIRST_RUN.open() as file:
        found = list(csv.reader(line for line in file if not line.startswith("#")))
    assert found[0] == ["steps", "tokens", "val_loss"]
    points = references.load("first-run", "plot").over("tokens")
    assert points[0] == (65_536_000, 7.12092)
    assert points[-1] == (35_654_336_512, 2.99919)
    assert [at for at, _ in points] == sorted(at for at, _ in points)
    assert references.FIRST_RUN.stat().st_size < 5000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reference", "llm.c"], "--reference must go with runs of GPT-2's tokens, got"),
        (["--reference", "lm.c"], 'did you mean "llm.c"?'),
        (["--smooth", "0"], "--smooth must be 1 to 1,000,000 rows, got 0"),
    ],
)
def test_flags_that_do_not_fit_are_sentences(pair, flags, said, capfd):
    assert run("plot", *pair, *flags) == 2
    assert said in capfd.readouterr().err
    if flags[0] == "--reference":
        assert run("report", *pair, *flags) == 2
        assert (error := capfd.readouterr().err).startswith("report: --reference must")
        assert said in error


def test_runs_that_do_not_fit_the_axis_are_sentences(pair, tmp_path, capfd):
    untimed = make(tmp_path / "untimed", [row(0, loss=5.0), row(1, loss=4.0, val_loss=4.0)])
    tokens = make(tmp_path / "tokens", rows(10), tokenizer="gpt2")
    for flags, said in (
        ([pair[0], str(untimed), "--x", "hours"], "--x hours must have step_ms in the rows of metrics.jsonl, got none"),
        ([pair[0], str(make(tmp_path / "empty", []))], "empty must have rows with a loss, got none yet"),
        ([pair[0], str(tokens)], "runs must have one tokenizer, got bytes in"),
        ([str(tokens), "--reference", "llm.c", "--x", "hours"], "its source has no training times"),
        ([str(tokens), "--reference", "first-run", "--x", "hours"], "its source has no training times"),
    ):
        assert run("plot", *flags) == 2
        assert said in capfd.readouterr().err


def test_a_loss_of_null_or_beyond_every_picture_is_left_out(tmp_path, drawn):
    lines = [row(0, loss=5.0, val_loss=5.0), row(1, loss=None), row(2, loss=1e300), row(3, loss=4.0)]
    record = records.read(str(make(tmp_path / "run", lines)), "run", "plot")
    overlay.draw([record], [], "steps", 1, tmp_path / "x.png")
    assert list(drawn[0].get_lines()[0].get_ydata()) == [5.0, 4.0]
