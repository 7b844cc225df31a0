"""What a training step must cost at least on a chip, op by op, beside what was measured.

    python -m bench.roofline gpt2 --chip H200 --out roofline.png        bounds from the data sheet
    python -m bench.roofline gpt2 --chip H200 --measured gpu.json       with the kernel times of a record of bench.gpu
    python -m bench.roofline bench --chip this --measure --save         measures every op on this machine

An op's bound is max(FLOPs / peak, bytes / bandwidth); the step's is their sum, since they run one after the other. It
is a bound of the ops as this engine runs them: a compiler that fuses two of them, or an input that is still in a
cache, can go below. Counts are those of bench.roofline_ops, ceilings those of bench.chips. MFU counts
6 (N - wpe) + 12 L C T FLOPs per token (model.presets), attention without its causal half. Communication is that of
bench.communication over the fastest link, on its own and at best hidden behind the rest.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import chips, machine, results, roofline_plot, tables
from bench.chips import CHIPS, Chip
from bench.communication import ITEMSIZE, communication
from bench.results import Figure, Row, exact
from bench.roofline_measure import Measured, from_gpu_rows, measure_ops, measure_step, per_step
from bench.roofline_ops import HEAD, RECOMPUTE, Op, StepShape, head_rows, step_ops
from engine.config import TrainConfig, batch_shape
from engine.errors import BAD_INPUT, BadInput, nearest
from model.presets import PRESETS, GPT2Config, flops_per_token

MODELS = {**PRESETS, "bench": GPT2Config(4, 4, 256, n_positions=256)}  # the last one is timed on a CPU in seconds
MICRO_BATCH_SIZE = {"bench": 4, "tiny": 4, "mini": 4}  # sequences; 64 for all others
GPU_STEP = (PRESETS["gpt2"], 64, 1024, "bf16")  # what bench.gpu's ops are timed at
WHOLE_HEAD = "head, all its products"
HEADS = ("op", "where", "calls", "GFLOP", "GB", "bound ms", "bound by", "measured ms", "ratio")


@dataclass
class Roofline:
    """One step of one model on one chip, and what was measured of it."""

    model: str
    shape: StepShape
    chip: Chip
    measured: Measured = field(default_factory=dict)  # seconds per step
    step: dict[str, Figure] = field(default_factory=dict)  # seconds of whole steps, by how they were run

    def __post_init__(self) -> None:
        self.ops: list[Op] = step_ops(self.shape)

    def bound_ms(self, phase: str | None = None) -> float:
        """The bound of all ops, or of one phase's."""
        some = [op for op in self.ops if phase in (None, op.phase)]
        return sum(op.bound_ms(self.chip, self.shape.precision) for op in some)

    def rows(self) -> list[Row]:
        """One row per op, one for the head as a whole where that was measured, and one for the step."""
        found = []
        for op in self.ops:
            bound, by = op.bound_ms(self.chip, self.shape.precision), op.bound_by(self.chip, self.shape.precision)
            found.append(self._row(op.name, op.phase, [op.calls, op.flops, op.bytes, bound], by))
        if (HEAD, "") in self.measured:
            head = [row for op, row in zip(self.ops, found, strict=True) if op.group == HEAD]
            sums = [sum(row.value(name) for row in head) for name in ("calls", "FLOPs", "bytes", "bound")]
            by = max(head, key=lambda row: row.value("bound")).note
            found.append(self._row(HEAD, "", [*sums[:3], 1e3 * sums[3]], by))
        return found

    def _row(self, op: str, phase: str, numbers: list[float], bound_by: str) -> Row:
        peer = f"{op}, {phase}" if phase else f"{WHOLE_HEAD}, both"
        calls, flops, num_bytes, bound_ms = numbers
        row = Row("roofline", self.model, peer, "checked", note=bound_by)
        row.figures = {"calls": exact(calls, ""), "FLOPs": exact(flops, "FLOP"), "bytes": exact(num_bytes, "B")}
        row.figures["bound"] = exact(bound_ms / 1e3, "s")
        if (op, phase) in self.measured:
            row.status, row.figures["measured"] = "measured", self.measured[op, phase]
        return row

    def step_row(self) -> Row:
        """Bounds of the whole step, and what they allow."""
        shape, chip = self.shape, self.chip
        sent = communication(shape.config, shape.world_size, "ddp", shape.precision, micro_batches=shape.micro_batches)
        wire_bytes, link = sum(each.wire_bytes for each in sent), max(chip.links.values(), default=None)
        wire_s = wire_bytes / link if link else 0.0
        bound_s = max(self.bound_ms() / 1e3, wire_s)
        tokens = shape.B * shape.T * shape.micro_batches  # of one device
        flops = flops_per_token(shape.config, shape.T)
        facts = {name: getattr(shape, name) for name in ("B", "T", "precision", "recompute", "micro_batches")}
        row = Row("roofline", self.model, "the step", "measured" if self.step else "checked")
        row.facts = facts | {"devices": shape.world_size, "chip": dataclasses.asdict(chip)}
        row.figures = {
            "FLOPs": exact(sum(op.flops for op in self.ops), "FLOP"),
            "bytes": exact(sum(op.bytes for op in self.ops), "B"),
            **{f"{p} bound": exact(self.bound_ms(p) / 1e3, "s") for p in ("forward", "backward", "optimizer")},
            "wire bytes": exact(wire_bytes, "B"),
            "wire bound": exact(wire_s, "s"),
            "bound": exact(bound_s, "s"),
            "tokens": exact(tokens * shape.world_size / bound_s, "tokens/s"),
            "mfu": exact(flops * tokens / bound_s / chip.flops_per_s[shape.precision], "%"),
            **{f"step, {how}": figure for how, figure in self.step.items()},
        }
        return row

    def verdict(self) -> str:
        """The sentence that names the op to work on."""
        rows = self.rows()
        timed = [row for row in rows if "measured" in row.figures]
        if not timed:
            row = max(rows, key=lambda row: row.value("bound"))
            bound = tables.amount(row.value("bound"), "s")
            return (
                f"Nothing is measured here. The op with the largest bound is {row.peer}: {bound} a step, by {row.note}."
            )
        row = max(timed, key=lambda row: row.value("measured") - row.value("bound"))
        measured, bound = row.value("measured"), row.value("bound")
        if measured <= bound:
            return "No measured op takes longer than its bound."
        words = [tables.amount(value, "s") for value in (measured, measured - bound, bound)]
        return (
            f"{row.peer} costs the most above its bound: {words[0]} a step, {words[1]} more than the {words[2]} that "
            f"{row.note} allows ({measured / bound:.2f} times)."
        )

    def table(self) -> str:
        """All of it as text."""
        shape, chip, step = self.shape, self.chip, self.step_row()
        tokens = shape.B * shape.T * shape.micro_batches * shape.world_size

        def said(name: str) -> str:
            return tables.cell(step, name)

        lines = [
            f"{self.model}, {shape.precision}, recompute {shape.recompute}; a step is {tokens:,} tokens = {shape.B} "
            f"sequences x {shape.T:,} x {shape.micro_batches} micro-batches x {shape.world_size} devices",
            f"{chip.name} ({chip.kind}: {chip.source}): {chip.flops_per_s[shape.precision] / 1e12:.4g} TFLOP/s, "
            f"{chip.bytes_per_s / 1e9:.4g} GB/s",
            "",
            tables.aligned([HEADS, *(cells(row) for row in self.rows())], left=(0, 1, 6)),
            "",
            f"lower bound of a step's ops: {self.bound_ms():.4g} ms, of which forward {said('forward bound')}, backward "
            f"{said('backward bound')}, optimizer {said('optimizer bound')}; {said('FLOPs')}, {said('bytes')}",
        ]
        if shape.world_size > 1:
            link = max(chip.links, key=chip.links.get, default=None)
            at = f"{said('wire bound')} over {link}, at best behind the rest" if link else "no link is known"
            lines.append(f"communication: {said('wire bytes')} sent by each device; {at}")
        lines.append(f"at that bound: {said('tokens')}, MFU {said('mfu')}")
        timed = [row for row in self.rows() if "measured" in row.figures]
        if below := [row.peer for row in timed if row.value("measured") < row.value("bound")]:
            lines.append(f"below their bounds, from a cache or since the ceilings are too low: {'; '.join(below)}")
        for how, figure in self.step.items():
            ratio = figure.value / step.value("bound")
            lines.append(f"measured step, {how}: {tables.amount(figure.value, 's')}, {ratio:.2f} times its bound")
        return "\n".join([*lines, "", self.verdict()])

    def draw(self, path: Path) -> Path:
        """The picture."""
        shape, chip, step = self.shape, self.chip, self.step_row()
        computed = "measured ceilings of this machine" if chip.is_measured else "the data sheet"
        subtitle = (
            f"Bounds are computed from {computed}: {chip.flops_per_s[shape.precision] / 1e12:.4g} TFLOP/s, "
            f"{chip.bytes_per_s / 1e9:.4g} GB/s\n{shape.B * shape.T * shape.micro_batches:,} tokens per device, "
            f"{shape.micro_batches} x {shape.B} sequences of {shape.T:,}: at least {tables.cell(step, 'bound')}, MFU at "
            f"most {tables.cell(step, 'mfu')}"
        )
        title = f"Lower bounds of a {self.model} training step in {shape.precision} on {chip.name}"
        bars = roofline_plot.bars(self.ops, self.measured, chip, shape.precision)
        return roofline_plot.draw(path, bars, title, subtitle)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text."""
    op, where = row.peer.rsplit(", ", 1)
    bound, measured = row.value("bound"), row.value("measured")
    taken = ("-", "-") if measured is None else (f"{1e3 * measured:.3f}", f"{measured / bound:.2f}")
    flops = f"{row.value('FLOPs') / 1e9:,.1f}" if row.value("FLOPs") else "-"
    counts = f"{row.value('calls'):,}", flops, f"{row.value('bytes') / 1e9:,.3f}"
    return op, where, *counts, f"{1e3 * bound:.3f}", row.note, *taken


def chip_of(name: str, found: tuple[dict, list[Row]] | None, precision: str, device: torch.device) -> Chip:
    """The chip of this name; "this" is what the results were measured on, or else this machine, now."""
    if name in CHIPS:
        return CHIPS[name]
    if name != "this":
        raise BadInput(f"roofline: --chip must be one that is known, got {name!r}{nearest(name, [*CHIPS, 'this'])}")
    if found is None:
        return chips.measure(device, precision)
    chip = chips.from_rows(found[1], found[0].get("gpu", "the GPU of bench.gpu"))
    if chip is None:
        raise BadInput("roofline: --chip this must find ceilings among the measured rows, got none; name the chip")
    return chip


def shape_of(args: argparse.Namespace, precision: str, on_cpu: bool) -> StepShape:
    """The step that the command line asks for. Raises BadInput."""
    if args.model not in MODELS:
        raise BadInput(f"roofline: the model must be one that exists, got {args.model!r}{nearest(args.model, MODELS)}")
    changed = {name: getattr(args, name) for name in ("n_layer", "n_embd", "n_head") if getattr(args, name) is not None}
    try:
        config = dataclasses.replace(MODELS[args.model], **changed)
    except ValueError as error:
        raise BadInput(f"roofline: {error}") from error
    T = min(1024, config.n_positions) if args.context is None else args.context
    B = MICRO_BATCH_SIZE.get(args.model, 64) if args.micro_batch_size is None else args.micro_batch_size
    asked = B * T * args.gpus if args.model in MICRO_BATCH_SIZE else 524_288
    asked = asked if args.tokens_per_step is None else args.tokens_per_step
    step = TrainConfig(context=T, micro_batch_size=B, tokens_per_step=asked, model=config)
    wrong = step.problems() + ([f"--gpus must be at least 1, got {args.gpus}"] if args.gpus < 1 else [])
    if args.measure and args.chip != "this":
        wrong.append(f"--chip must be this with --measure, which times this machine, got {args.chip}")
    if args.measure and args.measured is not None:
        wrong.append("--measure and --measured must not both be given")
    if wrong:
        raise BadInput("roofline: " + "\n  ".join(wrong))
    micro_batches = batch_shape(step, args.gpus)[1]
    rows = head_rows(config, not on_cpu)
    return StepShape(config, B, T, precision, args.recompute, micro_batches, args.gpus, rows)


def build(args: argparse.Namespace) -> Roofline:
    """What the command line asks for, measured if it says so. Raises BadInput."""
    found = None
    if args.measured is not None:
        try:
            found = results.read(args.measured)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"roofline: --measured must be gpu.json of bench.gpu, got {args.measured}: {error}"
            ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = args.chip == "this" and device.type == "cpu" and found is None
    precision = args.precision or ("fp32" if on_cpu else "bf16")
    shape = shape_of(args, precision, on_cpu)
    chip = chip_of(args.chip, found, precision, device)
    if precision not in chip.flops_per_s:
        known = ", ".join(chip.flops_per_s)
        raise BadInput(f"roofline: --precision must be one that {chip.name} was measured in, {known}, got {precision}")
    roofline = Roofline(args.model, shape, chip)
    if found is not None:
        take_measured(roofline, *found, args.measured)
    if args.measure:
        roofline.measured = per_step(roofline.ops, measure_ops(shape, device), args.recompute)
        roofline.step = {"eager": measure_step(shape, device)}
    return roofline


def take_measured(roofline: Roofline, facts: dict[str, str], rows: list[Row], path: Path) -> None:
    """Fills in the times of bench.gpu. Raises BadInput if they are of other sizes, or of another chip."""
    timed_on = facts.get("gpu", "")
    if timed_on and roofline.chip.name not in timed_on:
        raise BadInput(f"roofline: --chip must be what {path} was measured on, {timed_on}, got {roofline.chip.name}")
    shape, (_, B, T, precision) = roofline.shape, GPU_STEP
    if (shape.config, shape.B, shape.T, shape.precision) != GPU_STEP:
        raise BadInput(
            f"roofline: {path} holds kernels at the sizes of gpt2, {B} sequences of {T:,} in {precision}, and the step "
            f"must have them too, got {roofline.model}, {shape.B} of {shape.T:,} in {shape.precision}"
        )
    roofline.measured = per_step(roofline.ops, from_gpu_rows(rows, roofline.ops), shape.recompute)
    if not roofline.measured:
        raise BadInput(f"roofline: {path} must hold measured times of this project's kernels, got none")
    if shape.micro_batches == 1:
        timed = [row for row in rows if row.section == "step" and row.case == f"gpt2 B={B} {precision}"]
        roofline.step = {row.peer: row.figures["step"] for row in timed if "step" in row.figures}


def write(roofline: Roofline, args: argparse.Namespace) -> list[Path]:
    """The files that were asked for. Raises BadInput where they cannot be written."""
    try:
        written = [] if args.out is None else [roofline.draw(args.out)]
        if args.save:
            device = "cuda" if args.chip == "this" and torch.cuda.is_available() else "cpu"
            place = machine.slug(device) if args.chip == "this" else f"nvidia-{args.chip.lower().replace(' ', '-')}"
            rows = [*roofline.rows(), roofline.step_row()]
            rows[-1].note = roofline.verdict()
            path = results.save("roofline", machine.facts(device), rows, place)
            written += [path, roofline.draw(path.with_suffix(".png"))]
    except OSError as error:
        raise BadInput(f"roofline: the results must go where files can be written, got {error}") from error
    return written


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="gpt2", metavar="PRESET", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--chip", default="H200", help=f"one of {', '.join(CHIPS)}, or this: measured")
    parser.add_argument("--micro-batch-size", type=int, help="sequences per forward pass; 64, or 4 for small models")
    parser.add_argument("--context", type=int, help="tokens per sequence; 1,024 or what the model has")
    parser.add_argument("--precision", choices=list(ITEMSIZE), help="bf16; fp32 on a CPU")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none", help="activations made again")
    parser.add_argument("--tokens-per-step", type=int, help="of all GPUs: 524,288, or a micro-batch of small models")
    parser.add_argument("--gpus", type=int, default=1, help="data-parallel replicas (DDP)")
    for name in ("n-layer", "n-embd", "n-head"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--measured", type=Path, metavar="FILE.json", help="gpu.json of bench.gpu")
    parser.add_argument("--measure", action="store_true", help="time every op here and now, with --chip this")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture")
    parser.add_argument("--save", action="store_true", help="roofline.json and .png in bench/results, by chip")
    try:
        roofline = build(args := parser.parse_args(arguments))
        print(roofline.table())
        for path in write(roofline, args):
            print(f"wrote {path}")
    except BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
