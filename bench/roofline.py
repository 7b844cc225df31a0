"""What a training step must cost at least on a chip, op by op, beside what was measured.

    python -m bench.roofline gpt2 --chip H200 --out roofline.png        bounds from the data sheet
    python -m bench.roofline gpt2 --chip H200 --measured gpu.json       with the kernel times of bench.gpu

An op's bound is max(FLOPs / peak, bytes / bandwidth); the step's is their sum. A compiler that fuses two ops, or an
input that is still in a cache, can go below. MFU counts 6 (N - wpe) + 12 L C T FLOPs per token, attention without its
causal half. Communication goes over the fastest link, at best hidden behind the rest.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench import chips, results, roofline_plot, tables
from bench.chips import CHIPS, Chip
from bench.communication import ITEMSIZE, communication
from bench.results import Figure, Row, exact
from bench.roofline_ops import HEAD, RECOMPUTE, Measured, StepShape, from_gpu_rows, per_step, step_ops
from engine.config import TrainConfig, batch_shape
from engine.errors import BAD_INPUT, BadInput, nearest
from model.presets import PRESETS, flops_per_token

MICRO_BATCH_SIZE = {"tiny": 4, "mini": 4}  # sequences; 64 for all others
GPU_STEP = (PRESETS["gpt2"], 64, 1024, "bf16")  # what bench.gpu's ops are timed at
WHOLE_HEAD = "head, all its products"


@dataclass
class Roofline:
    """One step of one model on one chip, and what was measured of it."""

    model: str
    shape: StepShape
    chip: Chip
    measured: Measured = field(default_factory=dict)  # seconds per step
    step: dict[str, Figure] = field(default_factory=dict)  # seconds of whole steps, by how they were run

    def __post_init__(self) -> None:
        limits, self.ops = (self.chip, self.shape.precision), step_ops(self.shape)
        self.rows = [
            Row("roofline", self.model, f"{op.name}, {op.phase}", note=op.bound_by(*limits)) for op in self.ops
        ]
        for op, row in zip(self.ops, self.rows, strict=True):
            row.figures = {
                "calls": exact(op.calls, ""),
                "FLOPs": exact(op.flops, "FLOP"),
                "bytes": exact(op.bytes, "B"),
            }
            row.figures["bound"] = exact(op.bound_ms(*limits) / 1e3, "s")
        self.bound_s = sum(row.value("bound") for row in self.rows)

    def take(self, measured: Measured) -> None:
        """Puts measured seconds of a step into the rows; the head, measured as one, gets a row of its own."""
        self.measured = measured
        for op, row in zip(self.ops, self.rows, strict=True):
            if (op.name, op.phase) in measured:
                row.figures["measured"] = measured[op.name, op.phase]
        if (HEAD, "") in measured:
            head = [row for op, row in zip(self.ops, self.rows, strict=True) if op.group == HEAD]
            whole = Row("roofline", self.model, f"{WHOLE_HEAD}, both")
            whole.note = max(head, key=lambda row: row.value("bound")).note
            for name in head[0].figures:
                whole.figures[name] = exact(sum(row.value(name) for row in head), head[0].figures[name].unit)
            whole.figures["measured"] = measured[HEAD, ""]
            self.rows.append(whole)

    def whole(self) -> Row:
        """Bounds of the whole step, and what they allow."""
        shape, chip, parts = self.shape, self.chip, self.rows[: len(self.ops)]
        sent = communication(
            shape.config, shape.world_size, precision=shape.precision, micro_batches=shape.micro_batches
        )
        wire_bytes, link = sum(each.wire_bytes for each in sent), max(chip.links.values(), default=None)
        bound_s = max(self.bound_s, wire_bytes / link if link else 0.0)
        tokens = shape.B * shape.T * shape.micro_batches  # of one device
        flops = flops_per_token(shape.config, shape.T) * tokens
        row = Row("roofline", self.model, "the step", note=self.verdict(), facts={"chip": dataclasses.asdict(chip)})
        for phase in ("forward", "backward", "optimizer"):
            seconds = sum(part.value("bound") for op, part in zip(self.ops, parts, strict=True) if op.phase == phase)
            row.figures[f"{phase} bound"] = exact(seconds, "s")
        row.figures |= {
            "FLOPs": exact(sum(part.value("FLOPs") for part in parts), "FLOP"),
            "bytes": exact(sum(part.value("bytes") for part in parts), "B"),
            "wire bytes": exact(wire_bytes, "B"),
            "wire bound": exact(wire_bytes / link if link else 0.0, "s"),
            "bound": exact(bound_s, "s"),
            "tokens": exact(tokens * shape.world_size / bound_s, "tokens/s"),
            "mfu": exact(flops / bound_s / chip.flops_per_s[shape.precision], "%"),
            **{f"step, {how}": figure for how, figure in self.step.items()},
        }
        return row

    def verdict(self) -> str:
        """The sentence that names the op to work on."""
        timed = [row for row in self.rows if "measured" in row.figures]
        row = max(
            timed or self.rows,
            key=lambda row: row.value("measured" if timed else "bound") - bool(timed) * row.value("bound"),
        )
        bound, measured = tables.cell(row, "bound"), tables.cell(row, "measured")
        if not timed:
            return f"Nothing is measured. The op with the largest bound is {row.peer}: {bound} a step, by {row.note}."
        ratio = row.value("measured") / row.value("bound")
        return f"{row.peer} costs the most above its bound: {measured} a step, {ratio:.2f} times {bound} by {row.note}."

    def title(self) -> tuple[str, str]:
        """What is bounded, and by what."""
        shape, chip = self.shape, self.chip
        step = f"{shape.B} sequences x {shape.T:,} x {shape.micro_batches} micro-batches x {shape.world_size} devices"
        tokens = shape.B * shape.T * shape.micro_batches * shape.world_size
        top = f"{chip.flops_per_s[shape.precision] / 1e12:.4g} TFLOP/s, {chip.bytes_per_s / 1e9:.4g} GB/s"
        what = f"{self.model}, {shape.precision}, recompute {shape.recompute}; a step is {tokens:,} tokens = {step}"
        return what, f"{chip.name} ({chip.kind}: {chip.source}): {top}"

    def table(self) -> str:
        """All of it as text."""
        row = self.whole()
        said = {name: tables.cell(row, name) for name in row.figures}
        lines = [*self.title(), "", tables.of(self.rows), ""]
        parts = ", ".join(f"{phase} {said[f'{phase} bound']}" for phase in ("forward", "backward", "optimizer"))
        lines.append(f"bound of a step's ops: {1e3 * self.bound_s:.4g} ms: {parts}; {said['FLOPs']}, {said['bytes']}")
        if self.shape.world_size > 1:
            link = max(self.chip.links, key=self.chip.links.get, default="an unknown link")
            lines.append(f"communication: {said['wire bytes']} sent by each device; {said['wire bound']} over {link}")
        lines.append(f"at that bound: {said['tokens']}, MFU {said['mfu']}")
        for how, figure in self.step.items():
            lines.append(
                f"measured step, {how}: {said[f'step, {how}']}, {figure.value / row.value('bound'):.2f} times it"
            )
        return "\n".join([*lines, "", row.note])

    def bars(self) -> dict[str, dict[str, float]]:
        """Milliseconds by group and phase: bounds by what limits them, and measured; the rest stands apart."""
        found: dict[str, dict[str, float]] = {}
        for op, row in zip(self.ops, self.rows, strict=False):
            is_head = op.group == HEAD
            has_phase = not is_head and op.phase != "optimizer" and op.group != "accumulation"
            name = op.group + (f", {op.phase}" if has_phase else "")
            if self.measured and not is_head and "measured" not in row.figures:
                name += ", the rest"
            bar = found.setdefault(name, {"compute": 0.0, "memory": 0.0})
            bar[row.note] += 1e3 * row.value("bound")
            if "measured" in row.figures:
                bar["measured"] = bar.get("measured", 0.0) + 1e3 * row.value("measured")
        if (HEAD, "") in self.measured:
            found[HEAD]["measured"] = 1e3 * self.measured[HEAD, ""].value
        return found

    def draw(self, path: Path) -> Path:
        """The picture."""
        row, (_, source) = self.whole(), self.title()
        title = f"Lower bounds of a {self.model} training step in {self.shape.precision} on {self.chip.name}"
        most = f"at least {tables.cell(row, 'bound')}, MFU at most {tables.cell(row, 'mfu')}; bounds are computed"
        return roofline_plot.draw(path, self.bars(), title, f"{source}\n{most}")


def shape_of(args: argparse.Namespace) -> StepShape:
    """The step that the command line asks for. Raises BadInput."""
    if args.model not in PRESETS:
        raise BadInput(f"roofline: the model must be one that exists, got {args.model!r}{nearest(args.model, PRESETS)}")
    changed = {name: getattr(args, name) for name in ("n_layer", "n_embd", "n_head") if getattr(args, name) is not None}
    try:
        config = dataclasses.replace(PRESETS[args.model], **changed)
    except ValueError as error:
        raise BadInput(f"roofline: {error}") from error
    T = min(1024, config.n_positions) if args.context is None else args.context
    B = MICRO_BATCH_SIZE.get(args.model, 64) if args.micro_batch_size is None else args.micro_batch_size
    asked = B * T * args.gpus if args.model in MICRO_BATCH_SIZE else 524_288
    asked = asked if args.tokens_per_step is None else args.tokens_per_step
    step = TrainConfig(context=T, micro_batch_size=B, tokens_per_step=asked, model=config)
    wrong = step.problems() + ([f"--gpus must be at least 1, got {args.gpus}"] if args.gpus < 1 else [])
    if args.chip == "this" and args.measured is None:
        wrong.append("--chip this must come with --measured, whose ceilings it takes")
    if wrong:
        raise BadInput("roofline: " + "\n  ".join(wrong))
    return StepShape(config, B, T, args.precision, args.recompute, batch_shape(step, args.gpus)[1], args.gpus)


def build(args: argparse.Namespace) -> Roofline:
    """What the command line asks for, measured if it says so. Raises BadInput."""
    found = None
    try:
        found = None if args.measured is None else results.read(args.measured)
    except (OSError, ValueError) as error:
        raise BadInput(f"roofline: --measured must be gpu.json of bench.gpu, got {args.measured}: {error}") from error
    shape = shape_of(args)
    if args.chip not in (*CHIPS, "this"):
        known = nearest(args.chip, [*CHIPS, "this"])
        raise BadInput(f"roofline: --chip must be one that is known, got {args.chip!r}{known}")
    chip = CHIPS.get(args.chip) or chips.from_rows(*found)
    if chip is None or args.precision not in chip.flops_per_s:
        raise BadInput(f"roofline: {args.measured} must have ceilings in {args.precision}, got none")
    roofline = Roofline(args.model, shape, chip)
    if found is not None:
        take_measured(roofline, *found, args.measured)
    return roofline


def take_measured(roofline: Roofline, facts: dict[str, str], rows: list[Row], path: Path) -> None:
    """Fills in the times of bench.gpu. Raises BadInput if they are of other sizes, or of another chip."""
    timed_on, shape = facts.get("gpu", ""), roofline.shape
    if timed_on and roofline.chip.name not in timed_on:
        raise BadInput(f"roofline: --chip must be what {path} was measured on, {timed_on}, got {roofline.chip.name}")
    if (shape.config, shape.B, shape.T, shape.precision) != GPU_STEP:
        got = f"{roofline.model}, {shape.B} of {shape.T:,} in {shape.precision}"
        raise BadInput(
            f"roofline: {path} is of gpt2, 64 sequences of 1,024 in bf16, and the step must be too, got {got}"
        )
    roofline.take(per_step(roofline.ops, from_gpu_rows(rows)))
    if not roofline.measured:
        raise BadInput(f"roofline: {path} must hold measured times of this project's kernels, got none")
    if shape.micro_batches == 1:
        timed = [row for row in rows if row.section == "step" and row.case == "gpt2 B=64 bf16"]
        roofline.step = {row.peer: row.figures["step"] for row in timed if "step" in row.figures}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="gpt2", metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--chip", default="H200", help=f"one of {', '.join(CHIPS)}, or this: that of --measured")
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
            print(f"wrote {roofline.draw(args.out)}")
    except (BadInput, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
