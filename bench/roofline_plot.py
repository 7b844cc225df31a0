"""The picture of bench.roofline: a bar per group of ops, as long as its bound, and the measured time around it."""

from collections.abc import Sequence
from pathlib import Path

from bench.roofline_ops import HEAD
from bench.tables import number

COLORS = {"compute": "#4477aa", "memory": "#ddaa33", "measured": "#222222"}
LABELS = {"compute": "bound by matrix FLOP/s", "memory": "by memory", "measured": "measured"}
NAMES = {
    HEAD: "head + loss, forward + backward",
    "casts": "casts of the weights",
    "accumulation": "gradient accumulation",
    "buckets": "copy into DDP's buckets",
    "clip": "norm and clip",
    "layer_norm": "LayerNorm + residual add",
}


def draw(path: Path, bars: dict[str, dict[str, float]], title: str, subtitle: str) -> Path:
    """Writes the PNG and returns its path. bars: milliseconds of "compute", "memory" and perhaps "measured" by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    def ends(bar: dict[str, float]) -> tuple[float, float]:
        return bar["compute"] + bar["memory"], bar.get("measured", 0.0)

    names: Sequence[str] = sorted(bars, key=lambda name: ends(bars[name])[0])
    longest = max(max(ends(bar)) for bar in bars.values())
    is_measured = any("measured" in bar for bar in bars.values())
    figure = Figure(figsize=(12, 2.2 + 0.31 * len(bars)), layout="constrained")  # 1,200 pixels wide
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        bar, (bound, measured) = bars[name], ends(bars[name])
        axes.barh(place, bar["compute"], height=0.62, color=COLORS["compute"])
        axes.barh(place, bar["memory"], left=bar["compute"], height=0.62, color=COLORS["memory"])
        text = f"{number(bound)} ms"
        if measured:
            axes.barh(place, measured, height=0.78, fill=False, edgecolor=COLORS["measured"], linewidth=1.1)
            text = f"{number(measured)} ms, {measured / bound:.1f}x the bound of {number(bound)}"
        axes.text(max(bound, measured) + 0.006 * longest, place, text, va="center", fontsize=9, color="#333333")
    axes.set_yticks(
        range(len(names)), [NAMES.get(n.split(",")[0], n.split(",")[0]) + n[len(n.split(",")[0]) :] for n in names]
    )
    axes.set(ylim=(-0.6, len(bars) - 0.4), xlim=(0, longest * (1.42 if is_measured else 1.1)))
    axes.set_xlabel("milliseconds per step")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes.set_title(subtitle, fontsize=10, color="#555555", pad=10)
    keys = [Patch(color=COLORS[name], label=LABELS[name]) for name in ("compute", "memory")]
    keys += [Patch(facecolor="none", edgecolor=COLORS["measured"], label=LABELS["measured"])] * is_measured
    axes.legend(handles=keys, loc="lower right", frameon=False, fontsize=10)
    temporary = path.with_name(f".{path.name}.writing")  # a viewer never opens half a picture
    figure.savefig(temporary, dpi=100, format="png")
    return temporary.replace(path)
