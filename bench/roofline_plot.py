"""The picture of bench.roofline: a bar per op, as long as its bound, and the measured time around it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.chips import Chip
from bench.roofline_measure import Measured
from bench.roofline_ops import HEAD, Op
from bench.tables import number

COMPUTE_COLOR, MEMORY_COLOR, MEASURED_COLOR = "#4477aa", "#ddaa33", "#222222"
NAMES = {
    HEAD: "head + loss, forward + backward",
    "casts": "casts of the weights",
    "accumulation": "gradient accumulation",
    "buckets": "copy into DDP's buckets",
    "clip": "norm and clip",
    "layer_norm": "LayerNorm + residual add",
}


@dataclass
class Bar:
    """Milliseconds per step of a group of ops."""

    name: str
    compute: float = 0.0  # bounds of ops that FLOP/s limit
    memory: float = 0.0  # and of those that bytes/s do
    measured: float | None = None

    @property
    def bound(self) -> float:
        """The whole bound."""
        return self.compute + self.memory


def bars(ops: Sequence[Op], measured: Measured, chip: Chip, precision: str) -> list[Bar]:
    """One bar for each group and phase; what was not measured stands apart."""
    members: dict[tuple[str, str, bool], list[Op]] = {}
    for op in ops:
        place = (HEAD, "") if op.group == HEAD else (op.group, op.phase)
        is_measured = (op.name, op.phase) in measured or place in measured
        members.setdefault((*place, is_measured), []).append(op)
    found = []
    for (group, phase, is_measured), some in members.items():
        bar = Bar(NAMES.get(group, group))
        for op in some:
            by = op.bound_by(chip, precision)
            setattr(bar, by, getattr(bar, by) + op.bound_ms(chip, precision))
        if is_measured:
            keys = [(HEAD, "")] if group == HEAD else [(op.name, op.phase) for op in some]
            bar.measured = 1e3 * sum(measured[key].value for key in keys)
        if phase in ("forward", "backward") and group != "accumulation":
            bar.name += f", {phase}"
        if not is_measured and (group, phase, True) in members:
            bar.name += ", the rest"
        found.append(bar)
    return found


def draw(path: Path, found: Sequence[Bar], title: str, subtitle: str) -> Path:
    """Writes the PNG and returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = sorted(found, key=lambda bar: bar.bound)
    longest = max(max(bar.bound, bar.measured or 0.0) for bar in found)
    is_measured = any(bar.measured is not None for bar in found)
    figure = Figure(figsize=(12, 2.2 + 0.31 * len(found)), layout="constrained")  # 1,200 pixels wide
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, bar in enumerate(found):
        axes.barh(place, bar.compute, height=0.62, color=COMPUTE_COLOR)
        axes.barh(place, bar.memory, left=bar.compute, height=0.62, color=MEMORY_COLOR)
        text = f"{number(bar.bound)} ms"
        if bar.measured is not None:
            axes.barh(place, bar.measured, height=0.78, fill=False, edgecolor=MEASURED_COLOR, linewidth=1.1)
            text = f"{number(bar.measured)} ms, {bar.measured / bar.bound:.1f}x the bound of {number(bar.bound)}"
        end = max(bar.bound, bar.measured or 0.0) + 0.006 * longest
        axes.text(end, place, text, va="center", fontsize=9, color="#333333")
    axes.set_yticks(range(len(found)), [bar.name for bar in found], fontsize=10)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlim(0, longest * (1.42 if is_measured else 1.1))
    axes.set_xlabel("milliseconds per step")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes.set_title(subtitle, fontsize=10, color="#555555", pad=10)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    keys = [Patch(color=COMPUTE_COLOR, label="bound by matrix FLOP/s"), Patch(color=MEMORY_COLOR, label="by memory")]
    keys += [Patch(facecolor="none", edgecolor=MEASURED_COLOR, label="measured")] * is_measured
    axes.legend(handles=keys, loc="lower right", frameon=False, fontsize=10)
    temporary = path.with_name(f".{path.name}.writing")  # a viewer never opens half a picture
    figure.savefig(temporary, dpi=100, format="png")
    return temporary.replace(path)
