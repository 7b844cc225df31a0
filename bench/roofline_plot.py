"""The picture of bench.roofline: a bar per group of ops, as long as its bound."""

from pathlib import Path

from bench.roofline_ops import HEAD
from bench.tables import number

COLORS = {"compute": "#4477aa", "memory": "#ddaa33"}
LABELS = {"compute": "bound by matrix FLOP/s", "memory": "by memory"}
NAMES = {
    HEAD: "head + loss, forward + backward",
    "casts": "casts of the weights",
    "accumulation": "gradient accumulation",
    "buckets": "copy into DDP's buckets",
    "clip": "norm and clip",
    "layer_norm": "LayerNorm + residual add",
}


def draw(path: Path, bars: dict[str, dict[str, float]], title: str, subtitle: str) -> Path:
    """Writes the PNG and returns its path. bars: milliseconds of "compute" and "memory" by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = sorted(bars, key=lambda name: sum(bars[name].values()))
    longest = sum(bars[names[-1]].values())
    figure = Figure(figsize=(12, 2.2 + 0.31 * len(bars)), layout="constrained")  # 1,200 pixels wide
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        bar, bound = bars[name], sum(bars[name].values())
        axes.barh(place, bar["compute"], height=0.62, color=COLORS["compute"])
        axes.barh(place, bar["memory"], left=bar["compute"], height=0.62, color=COLORS["memory"])
        axes.text(bound + 0.006 * longest, place, f"{number(bound)} ms", va="center", fontsize=9, color="#333333")
    labels = [NAMES.get(name.split(",")[0], name.split(",")[0]) + name[len(name.split(",")[0]) :] for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=10)
    axes.set(ylim=(-0.6, len(bars) - 0.4), xlim=(0, longest * 1.1))
    axes.set_xlabel("milliseconds per step")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes.set_title(subtitle, fontsize=10, color="#555555", pad=10)
    keys = [Patch(color=COLORS[name], label=LABELS[name]) for name in COLORS]
    axes.legend(handles=keys, loc="lower right", frameon=False, fontsize=10)
    temporary = path.with_name(f".{path.name}.writing")  # a viewer never opens half a picture
    figure.savefig(temporary, dpi=100, format="png")
    return temporary.replace(path)
