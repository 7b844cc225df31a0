"""Losses of several runs on one axis, with reference curves: one picture."""

from pathlib import Path

import numpy as np

from engine.comparison.records import Record, check_tokenizers
from engine.comparison.references import NOTE, Reference
from engine.errors import BadInput
from engine.run import plots

COLORS = ("#4477aa", "#cc3311", "#228833", "#aa3377", "#ee7733", "#009988", "#666666", "#bbaa33")
TIMES = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def check(records: list[Record], x: str) -> None:
    """Raises BadInput unless the runs have rows, one unit, and what the axis needs."""
    for record in records:
        if not any(len(record.points(name).x) for name in ("loss", "val_loss")):
            raise BadInput(
                f"plot: {record.run} must have rows with a loss, got none yet; plot it after its first steps"
            )
        if x == "hours" and not record.has_time:
            raise BadInput(
                f"plot: --x hours must have step_ms in the rows of metrics.jsonl, got none in {record.run}; use --x "
                "tokens or --x steps"
            )
    check_tokenizers(records, "plot")


def draw(records: list[Record], references: list[Reference], x: str, smooth: int | None, out: Path) -> Path:
    """Draws training and validation losses into the file `out`, a PNG. Returns its path.

    smooth: rows that the mean of the training loss is over; None: a twentieth of them, at most 50.
    Raises BadInput if it cannot be written.
    """
    with plots.import_matplotlib().rc_context({"text.usetex": False}):
        size, label = _axis(records, x)
        subtitle = "dots: validation; thin: training, smoothed" + (f"; {NOTE}" if references else "")
        figure, axes = plots.new_figure("Loss while training", subtitle, label, f"nats per {records[0].unit}")
        shown = []
        for number, record in enumerate(records):
            shown.append(_run(axes, record, x, size, smooth, COLORS[number % len(COLORS)]))
        for number, reference in enumerate(references):
            text = f"{reference.label}: {reference.validation_set} ({reference.source})"
            style = {"color": "#444444", "linewidth": 1.1, "linestyle": ("--", ":", "-.")[number % 3], "label": text}
            if reference.level is not None:
                axes.axhline(reference.level, **style)
            else:
                points = reference.over(x)
                axes.plot([at / size for at, _ in points], [loss for _, loss in points], **style)
        _frame(axes, shown, references)
        legend = axes.legend(frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return plots.save(figure, out)


def _axis(records: list[Record], x: str) -> tuple[float, str]:
    """(divisor, label) of an axis that all records fit on."""
    most = max(float(np.nanmax(record.columns[x], initial=0.0)) for record in records)
    if x == "hours":
        seconds, name = next((one for one in TIMES if 3600 * most >= 2 * one[0]), TIMES[-1])
        return seconds / 3600, f"training time, {name} (without evaluations and checkpoints)"
    return plots.token_axis(most, records[0].unit) if x == "tokens" else (1.0, "optimizer steps")


def _run(axes, record: Record, x: str, size: float, smooth: int | None, color: str) -> np.ndarray:
    """Draws one run; returns the values by which the axis is framed."""
    train, val = record.points("loss", x), record.points("val_loss", x)
    label = record.label.encode(errors="replace").decode()
    smoothed = np.empty(0)
    if len(train.x):
        window = smooth or max(1, min(50, len(train.x) // 20))
        smoothed = np.asarray(plots.smooth(list(train.y), 1.0 - 1.0 / window))
        if window > 1:
            axes.plot(train.x / size, train.y, color=color, alpha=0.2, linewidth=0.6)
        text = f"{label}: train, last {smoothed[-1]:.3f}" if not len(val.x) else None
        axes.plot(train.x / size, smoothed, color=color, alpha=0.75, linewidth=1.0, label=text)
    if len(val.x):
        text = f"{label}: validation, last {val.y[-1]:.3f}"
        axes.plot(val.x / size, val.y, color=color, marker="o", markersize=3.5, linewidth=1.6, label=text)
    return np.concatenate([smoothed, val.y])


def _frame(axes, shown: list[np.ndarray], references: list[Reference]) -> None:
    """Frames all curves: a raw loss that leaps out of the smoothed ones sets no limit."""
    values = np.concatenate([*shown, [loss for reference in references for *_, loss in reference.points]])
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) + 0.01
    axes.set_ylim(max(0.0, low - margin), high + margin)
