"""Plots of a run, labelled for a reader who did not run it: loss_curve.png and lr_schedule.png."""

import contextlib
import logging
import math
import os
import re
import shlex
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from engine import output, system
from engine.config import TrainConfig
from engine.errors import BadInput
from engine.optim import schedule
from engine.run.curves import SCORES
from engine.run.rows import number

LOSS_CURVE = "loss_curve.png"
LR_SCHEDULE = "lr_schedule.png"
LONGEST_DRAWING = 60.0  # seconds that the end of a run waits for a drawing
LARGEST = 1e30  # of a value in a picture: near the largest float, matplotlib's axes overflow
LONGEST_REASON = 300  # characters
TRAIN_COLOR, VAL_COLOR, SCORE_COLOR = "#4477aa", "#cc3311", "#228833"


def draw(config: TrainConfig, rows: list[dict], unit: str) -> list[Path]:
    """Draws both plots into config.out from rows of metrics.jsonl, or from `Curves.rows` of many.

    Returns their paths. unit: token or byte. Raises BadInput if one cannot be written, after it has
    drawn the other.
    """
    with import_matplotlib().rc_context({"text.usetex": False}):  # a name is no TeX
        try:
            first = _loss_curve(config, rows, unit)
        finally:
            second = _lr_schedule(config, rows, unit)
    return [first, second]


class Painter:
    """Draws a run's plots in a thread, so that no rank waits for them.

    If another drawing is wanted meanwhile, it follows with the newest rows. A plot that cannot be
    drawn is a warning, once for each reason: metrics.jsonl has the numbers, and `gpt2 plot` draws
    them again.
    """

    def __init__(self, config: TrainConfig, unit: str, warn: Callable[[str], None]):
        self._config, self._unit, self._warn = config, unit, warn
        self._lock = threading.Lock()  # of the two below
        self._rows: list[dict] | None = None  # to draw next
        self._thread: threading.Thread | None = None
        self._reasons: set[str] = set()  # that were warned of

    def draw(self, rows: list[dict]) -> None:
        """Has both plots drawn from rows of metrics.jsonl. Waits for nothing."""
        with self._lock:
            self._rows = rows
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="plots", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Waits for the last drawing, at most LONGEST_DRAWING seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(LONGEST_DRAWING)
            if thread.is_alive():
                self._warn(f"plots: still not drawn after {LONGEST_DRAWING:g} s; {self._again()}")

    def _run(self) -> None:
        while True:
            with self._lock:
                rows, self._rows = self._rows, None
                if rows is None:
                    self._thread = None
                    return
            try:
                draw(self._config, rows, self._unit)
            except Exception as error:  # no picture may end the run
                reason = (str(error) if isinstance(error, BadInput) else repr(error))[:LONGEST_REASON]
                if reason not in self._reasons:
                    self._warn(f"plots: not drawn: {reason}; training goes on, and later: {self._again()}")
                self._reasons.add(reason)

    def _again(self) -> str:
        return f"{output.program()} plot --run {shlex.quote(self._config.out)}"


def import_matplotlib():
    """The module, whatever MPLBACKEND says: a name that it does not know would fail its import.

    Silences what it says of fonts, glyphs and its cache. Raises BadInput if it finds no directory
    for that.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=re.escape(__name__))  # it reports missing glyphs as the caller's
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except OSError as error:
        raise BadInput(
            f"plots: matplotlib must have a directory that can be written, got: {error}; set MPLCONFIGDIR to one"
        ) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def new_figure(title: str, subtitle: str, xlabel: str, ylabel: str):
    """(figure, axes) on the Agg backend, which needs no display.

    The rest of the process may use another backend. The subtitle may hold any file name: a dollar
    sign begins no formula, and bytes that are no UTF-8 become question marks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes.set_title(subtitle.encode(errors="replace").decode(), fontsize=9, color="#555555", parse_math=False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def token_axis(most: int, unit: str) -> tuple[float, str]:
    """(divisor, label) of an axis up to `most` tokens, such that its numbers are short."""
    for size, name in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if most >= size:
            return size, f"{name}training {unit}s"
    return 1, f"training {unit}s"


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, bias-corrected: divided by 1 - weight^count."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1.0 - weight) * value
        smoothed.append(mean / (1.0 - weight**count))
    return smoothed


def _points(rows: list[dict], name: str) -> list[tuple[float, float]]:
    """(tokens, value) of each row that has both as numbers: one that is not finite is a loss that diverged."""
    pairs = [(number(row.get("tokens")), number(row.get(name))) for row in rows]
    return [pair for pair in pairs if None not in pair and max(map(abs, pair)) < LARGEST]


def _loss_curve(config: TrainConfig, rows: list[dict], unit: str) -> Path:
    train, val = _points(rows, "loss"), _points(rows, "val_loss")
    uniform = math.log(config.model.vocab_size)
    size, label = token_axis(max([tokens for tokens, _ in train + val], default=1), unit)
    subtitle = (
        f"{config.name}: {config.model.n_layer} layers, width {config.model.n_embd}, context "
        f"{config.sequence_length}; {config.tokens_per_step:,} {unit}s per step"
    )
    figure, axes = new_figure("Loss while training", subtitle, label, f"cross-entropy loss, nats per {unit}")
    axes.axhline(
        uniform, color="#999999", linestyle=":", label=f"uniform guess, ln {config.model.vocab_size} = {uniform:.2f}"
    )
    if train:
        tokens, losses = zip(*train, strict=True)
        tokens = [t / size for t in tokens]
        axes.plot(tokens, losses, color=TRAIN_COLOR, alpha=0.25, linewidth=0.8)
        smoothed = smooth(list(losses), weight=1.0 - 1.0 / max(1.0, min(50.0, len(losses) / 20)))
        axes.plot(
            tokens, smoothed, color=TRAIN_COLOR, linewidth=1.6, label=f"train (smoothed), last {smoothed[-1]:.3f}"
        )
    if val:
        tokens, losses = zip(*val, strict=True)
        tokens = [t / size for t in tokens]
        axes.plot(tokens, losses, color=VAL_COLOR, marker="o", markersize=4, label=f"validation, last {losses[-1]:.3f}")
    lowest = min([loss for _, loss in train + val], default=0.0)
    highest = max([loss for _, loss in train + val], default=uniform)
    axes.set_ylim(max(0.0, lowest - 0.1), max(highest, uniform) * 1.05)
    scored = _scores(axes, rows, size)
    if scored:  # below: a place that the losses leave free may not be free of the scores
        handles = [*axes.get_legend_handles_labels()[0], *scored]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    else:
        axes.legend(frameon=False)
    return save(figure, Path(config.out) / LOSS_CURVE)


def _scores(axes, rows: list[dict], size: float) -> list:
    """Draws HellaSwag's accuracy on an axis of its own, at the right. Returns what the legend shows; [] without any."""
    name = next((name for name in SCORES if _points(rows, name)), None)
    if name is None:
        return []
    tokens, values = zip(*_points(rows, name), strict=True)
    kind, right = "acc_norm" if name.endswith("norm") else "acc", axes.twinx()
    right.set_ylabel(f"HellaSwag {kind}, percent (chance is 25)", color=SCORE_COLOR)
    right.spines[["top", "left"]].set_visible(False)
    at, percent = [t / size for t in tokens], [100 * value for value in values]
    label = f"HellaSwag {kind}, last {percent[-1]:.1f}%"
    line = right.plot(at, percent, color=SCORE_COLOR, marker="s", markersize=3.5, linewidth=1.2, label=label)
    right.set_ylim(min(24.0, *percent) - 1, max(30.0, *percent) + 1)
    return line


def _lr_schedule(config: TrainConfig, rows: list[dict], unit: str) -> Path:
    corners = {max(0, schedule.warmup_steps(config) - 1), min(schedule.decay_begins(config), config.num_steps - 1)}
    points = sorted({round(i * (config.num_steps - 1) / 500) for i in range(501)} | corners)
    size, label = token_axis(config.num_steps * config.tokens_per_step, unit)
    figure, axes = new_figure("Learning rate", schedule.describe(config), label, "learning rate of AdamW")
    planned = [config.tokens_per_step * step / size for step in points]
    rates = [schedule.learning_rate(step, config) for step in points]
    axes.plot(planned, rates, color="#bbbbbb", linewidth=3, label="planned")
    done = [(tokens / size, lr) for tokens, lr in _points(rows, "lr")]
    if done:
        axes.plot(*zip(*done, strict=True), color=TRAIN_COLOR, linewidth=1.4, label=f"done, last {done[-1][1]:.2e}")
    axes.set_ylim(0, config.optim.lr * 1.08)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.legend(frameon=False)
    return save(figure, Path(config.out) / LR_SCHEDULE)


def save(figure, path: Path) -> Path:
    """Writes the PNG under a temporary name and renames it: no viewer opens half a file.

    Raises BadInput if that cannot be done.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")  # gpt2 plot may draw beside the run
    try:
        figure.savefig(temporary, dpi=110, format="png")
        return temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise BadInput(
            f"plots: {path} must be a file that can be written, got {system.reason(error)}; "
            f"{system.advice(error, 'a run directory that can be written')}"
        ) from error
