"""What a training step must cost at least on a chip: `python -m bench.roofline gpt2 --chip H200 --out FILE.png`.

An op's bound is max(FLOPs / peak, bytes / bandwidth); the step's is their sum. A compiler that fuses two ops, or an
input that is still in a cache, can go below. MFU counts 6 (N - wpe) + 12 L C T FLOPs per token, attention without its
causal half. Communication goes over the fastest link, at best hidden behind the rest. --measured gpu.json puts what
bench.gpu measured of this engine's kernels beside their bounds.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import results, tables
from bench.results import Row, exact, find, scaled
from engine.chips import CHIPS, Chip
from engine.config import TrainConfig, batch_shape
from engine.errors import BAD_INPUT, BadInput, nearest
from engine.planning.communication import ITEMSIZE, communication
from engine.planning.roofline_ops import ACCUMULATION, HEAD, RECOMPUTE, StepShape, step_ops
from model.presets import PRESETS, flops_per_token

MICRO_BATCH_SIZE = {"tiny": 4, "mini": 4}  # sequences; 64 for all others
GPU_STEP = (PRESETS["gpt2"], 64, 1024, "bf16")  # what bench.gpu's ops are timed at
COLORS = {"compute": "#4477aa", "memory": "#ddaa33"}
LABELS = {"compute": "bound by matrix FLOP/s", "memory": "by memory"}


@dataclass
class Roofline:
    """One step of one model on one chip."""

    model: str
    shape: StepShape
    chip: Chip

    def __post_init__(self) -> None:
        limits, self.ops = (self.chip, self.shape.precision), step_ops(self.shape)
        self.rows = [Row("roofline", f"{op.name}, {op.phase}", "", note=op.bound_by(*limits)) for op in self.ops]
        for op, row in zip(self.ops, self.rows, strict=True):
            row.figures = {
                "calls": exact(op.calls, ""),
                "FLOPs": exact(op.flops, "FLOP"),
                "bytes": exact(op.bytes, "B"),
            }
            row.figures["bound"] = exact(op.bound_ms(*limits) / 1e3, "s")
        self.bound_s = sum(row.value("bound") for row in self.rows)

    def take(self, measured: list[Row]) -> None:
        """Puts rows of bench.gpu beside the bounds of the same ops, as often as a step calls them."""
        for op, row in zip(self.ops, self.rows, strict=True):
            timed = find(measured, "ops", op.name, "triton")
            if timed is not None and op.phase in timed.figures:
                row.figures["measured"] = scaled(timed.figures[op.phase], op.calls, "s")
                row.figures["measured / bound"] = scaled(row.figures["measured"], 1 / row.value("bound"), "x")

    def whole(self) -> Row:
        """Bounds of the whole step, and what they allow."""
        shape, chip, row = self.shape, self.chip, Row("roofline", self.model, "the step")
        of_step = {"precision": shape.precision, "micro_batches": shape.micro_batches}
        sent = communication(shape.config, shape.world_size, **of_step)
        wire_bytes, link = sum(each.wire_bytes for each in sent), max(chip.links.values())
        bound_s = max(self.bound_s, wire_bytes / link)
        tokens = shape.B * shape.T * shape.micro_batches  # of one device
        mfu = flops_per_token(shape.config, shape.T) * tokens / bound_s / chip.flops_per_s[shape.precision]
        for phase in ("forward", "backward", "optimizer"):
            seconds = sum(row.value("bound") for op, row in zip(self.ops, self.rows, strict=True) if op.phase == phase)
            row.figures[phase] = exact(seconds, "s")
        row.figures |= {"bound": exact(bound_s, "s"), "wire bytes": exact(wire_bytes, "B")}
        row.figures |= {"wire bound": exact(wire_bytes / link, "s"), "mfu": exact(mfu, "%")}
        row.figures["tokens"] = exact(tokens * shape.world_size / bound_s, "tokens/s")
        return row

    def title(self) -> tuple[str, str, str]:
        shape, chip, row = self.shape, self.chip, self.whole()
        step = f"{shape.B} sequences x {shape.T:,} x {shape.micro_batches} micro-batches x {shape.world_size} devices"
        top = f"{chip.flops_per_s[shape.precision] / 1e12:.4g} TFLOP/s, {chip.bytes_per_s / 1e9:.4g} GB/s"
        bound, mfu, tokens = (tables.cell(row, name) for name in ("bound", "mfu", "tokens"))
        return (
            f"{self.model}, {shape.precision}, recompute {shape.recompute}; a step is {step}",
            f"{chip.name} (data sheet: {chip.source}): {top}",
            f"at least {bound}, at most {tokens}, MFU {mfu}; bounds are computed, not measured",
        )

    def table(self) -> str:
        """All of it as text."""
        what, source, bound = self.title()
        largest = max(self.rows, key=lambda row: row.value("bound"))
        said = f"The op with the largest bound is {largest.case}: {tables.cell(largest, 'bound')}, by {largest.note}."
        return "\n".join([what, source, "", tables.of(self.rows), "", tables.of([self.whole()]), "", bound, said])

    def bars(self) -> dict[str, dict[str, float]]:
        """Milliseconds of bounds by group and phase, and by what limits them."""
        found: dict[str, dict[str, float]] = {}
        for op, row in zip(self.ops, self.rows, strict=True):
            has_phase = op.phase != "optimizer" and op.group not in (ACCUMULATION, HEAD)
            bar = found.setdefault(op.group + (f", {op.phase}" if has_phase else ""), {"compute": 0.0, "memory": 0.0})
            bar[row.note] += 1e3 * row.value("bound")
        return found


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
        label = f"{tables.number(bound)} ms"
        axes.text(bound + 0.006 * longest, place, label, va="center", fontsize=9, color="#333333")
    axes.set_yticks(range(len(names)), names, fontsize=10)
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


def build(args: argparse.Namespace) -> Roofline:
    """What the command line asks for. Raises BadInput."""
    for name, known in (("model", PRESETS), ("chip", CHIPS)):
        if getattr(args, name) not in known:
            got = f"{getattr(args, name)!r}{nearest(getattr(args, name), known)}"
            raise BadInput(f"roofline: the {name} must be one that is known, got {got}")
    changed = {name: getattr(args, name) for name in ("n_layer", "n_embd", "n_head") if getattr(args, name) is not None}
    try:
        config = dataclasses.replace(PRESETS[args.model], **changed)
        facts, measured = ({}, []) if args.measured is None else results.read(args.measured)
    except (OSError, ValueError) as error:
        raise BadInput(f"roofline: {error}") from error
    T = min(1024, config.n_positions) if args.context is None else args.context
    B = MICRO_BATCH_SIZE.get(args.model, 64) if args.micro_batch_size is None else args.micro_batch_size
    asked = B * T * args.gpus if args.model in MICRO_BATCH_SIZE else 524_288
    asked = asked if args.tokens_per_step is None else args.tokens_per_step
    step = TrainConfig(context=T, micro_batch_size=B, tokens_per_step=asked, model=config)
    wrong = step.problems() + ([f"--gpus must be at least 1, got {args.gpus}"] if args.gpus < 1 else [])
    if measured and (args.chip not in facts.get("gpu", "") or (config, B, T, args.precision) != GPU_STEP):
        timed = f"{facts.get('gpu')}, gpt2, 64 sequences of 1,024 in bf16"
        wrong.append(f"--measured must be of the step and the chip that are asked for, got those of {timed}")
    if wrong:
        raise BadInput("roofline: " + "\n  ".join(wrong))
    shape = StepShape(config, B, T, args.precision, args.recompute, batch_shape(step, args.gpus)[1], args.gpus)
    roofline = Roofline(args.model, shape, CHIPS[args.chip])
    roofline.take(measured)
    return roofline


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="gpt2", metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--chip", default="H200", help=f"one of {', '.join(CHIPS)}")
    parser.add_argument("--micro-batch-size", type=int, help="sequences per forward pass; 64, or 4 for small models")
    parser.add_argument("--context", type=int, help="tokens per sequence; 1,024 or what the model has")
    parser.add_argument("--precision", choices=list(ITEMSIZE), default="bf16")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none", help="activations made again")
    parser.add_argument("--tokens-per-step", type=int, help="of all GPUs: 524,288, or a micro-batch of small models")
    parser.add_argument("--gpus", type=int, default=1, help="data-parallel replicas (DDP)")
    for name in ("n-layer", "n-embd", "n-head"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--measured", type=Path, metavar="FILE.json", help="gpu.json of bench.gpu")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture")
    args = parser.parse_args(arguments)
    try:
        roofline = build(args)
        print(roofline.table())
        if args.out is not None:
            title = f"Lower bounds of a {args.model} training step in {args.precision} on {args.chip}"
            subtitle = "\n".join(roofline.title()[1:])
            print(f"wrote {draw(args.out, roofline.bars(), title, subtitle)}")
    except (BadInput, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
