"""The picture of bench.roofline: a bar per op, as long as its bound, and the measured time around it."""

from pathlib import Path

from bench.chips import Chip
from bench.gpu_tables import significant
from bench.roofline_ops import HEAD, Op

COMPUTE_COLOR, MEMORY_COLOR, MEASURED_COLOR = "#4477aa", "#ddaa33", "#222222"
NAMES = {
    HEAD: "head + loss, forward + backward",
    "casts": "casts of the weights",
    "accumulation": "gradient accumulation",
    "buckets": "copy into DDP's buckets",
    "clip": "norm and clip",
    "layer_norm": "LayerNorm + residual add",
}


def draw(
    path: Path,
    ops: list[Op],
    measured: dict[tuple[str, str], float],
    chip: Chip,
    precision: str,
    title: str,
    subtitle: str,
) -> Path:
    """Writes the PNG and returns its path. measured: milliseconds per step by (name, phase), with the head's as one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = sorted(groups(ops, measured, chip, precision), key=lambda bar: bar["compute"] + bar["memory"])
    longest = max(max(bar["compute"] + bar["memory"], bar["measured"] or 0.0) for bar in bars)
    figure = Figure(figsize=(12, 2.2 + 0.31 * len(bars)), layout="constrained")  # 1,200 pixels wide
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, bar in enumerate(bars):
        bound, took = bar["compute"] + bar["memory"], bar["measured"]
        axes.barh(place, bar["compute"], height=0.62, color=COMPUTE_COLOR)
        axes.barh(place, bar["memory"], left=bar["compute"], height=0.62, color=MEMORY_COLOR)
        text = f"{significant(bound)} ms"
        if took is not None:
            axes.barh(place, took, height=0.78, fill=False, edgecolor=MEASURED_COLOR, linewidth=1.1)
            text = f"{significant(took)} ms, {took / bound:.1f}x the bound of {significant(bound)}"
        axes.text(max(bound, took or 0.0) + 0.006 * longest, place, text, va="center", fontsize=9, color="#333333")
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars], fontsize=10)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlim(0, longest * (1.42 if measured else 1.1))
    axes.set_xlabel("milliseconds per step")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes.set_title(subtitle, fontsize=10, color="#555555", pad=10)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    keys = [Patch(color=COMPUTE_COLOR, label="bound by matrix FLOP/s"), Patch(color=MEMORY_COLOR, label="by memory")]
    if any(bar["measured"] is not None for bar in bars):
        keys.append(Patch(facecolor="none", edgecolor=MEASURED_COLOR, label="measured"))
    axes.legend(handles=keys, loc="lower right", frameon=False, fontsize=10)
    temporary = path.with_name(f".{path.name}.writing")  # a viewer never opens half a picture
    figure.savefig(temporary, dpi=100, format="png")
    return temporary.replace(path)


def groups(ops: list[Op], measured: dict[tuple[str, str], float], chip: Chip, precision: str) -> list[dict]:
    """One bar each: {"name", "compute", "memory", "measured"}, in milliseconds; what was not measured stands apart."""
    members: dict[tuple[str, str, bool], list[Op]] = {}
    for op in ops:
        place = (HEAD, "") if op.group == HEAD else (op.group, op.phase)
        is_measured = (op.name, op.phase) in measured or place in measured
        members.setdefault((*place, is_measured), []).append(op)
    bars = []
    for (group, phase, is_measured), some in members.items():
        bound = {"compute": 0.0, "memory": 0.0}
        for op in some:
            bound[op.bound_by(chip, precision)] += op.bound_ms(chip, precision)
        taken = None
        if is_measured:
            taken = measured[HEAD, ""] if group == HEAD else sum(measured[op.name, op.phase] for op in some)
        name = NAMES.get(group, group)
        if phase in ("forward", "backward") and group != "accumulation":
            name += f", {phase}"
        if not is_measured and (group, phase, True) in members:
            name += ", the rest"
        bars.append({"name": name, **bound, "measured": taken})
    return bars
