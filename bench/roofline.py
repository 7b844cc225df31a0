"""What a training step must cost at least on a chip, op by op, beside what was measured.

    python -m bench.roofline gpt2 --chip H200 --out roofline.png        bounds from the data sheet
    python -m bench.roofline gpt2 --chip H200 --measured gpu.json       with the kernel times of a record of bench.gpu
    python -m bench.roofline bench --chip this --measure --save         measures every op on this machine

An op's bound is max(FLOPs / peak, bytes / bandwidth); the step's is their sum, since they run one after the other. It
is a bound of the ops as this engine runs them: a compiler that fuses two of them, or an input that is still in a
cache, can go below. Counts are those of bench.roofline_ops, ceilings those of bench.chips. MFU is of the convention of
engine.metrics, 6 (N - wpe) + 12 L C T FLOPs per token, which counts attention without its causal half. Communication is
that of bench.communication over the fastest link, on its own and at best hidden behind the rest.
"""

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import chips, machine
from bench.chips import CHIPS, Chip
from bench.communication import ITEMSIZE, communication
from bench.gpu_tables import significant
from bench.roofline_measure import Measured, measure_ops, measure_step, per_step, read, take_measured
from bench.roofline_ops import HEAD, RECOMPUTE, Op, head_rows, step_ops
from engine.config import TrainConfig, batch_shape
from engine.errors import BAD_INPUT, BadInput, nearest
from engine.metrics import flops_per_token
from model.presets import PRESETS, GPT2Config

MODELS = {**PRESETS, "bench": GPT2Config(4, 4, 256, n_positions=256)}  # the last one is timed on a CPU in seconds
MICRO_BATCH_SIZE = {"bench": 4, "tiny": 4, "mini": 4}  # sequences; 64 for all others
TOGETHER = "head, all its products"


@dataclass
class Roofline:
    """One step of one model on one chip, and what was measured of it."""

    model: str
    config: GPT2Config
    chip: Chip
    precision: str
    B: int  # sequences per micro-batch on one device
    T: int
    micro_batches: int
    world_size: int
    recompute: str
    rows_per_chunk: int  # of the head
    measured: Measured = field(default_factory=dict)
    step_ms: dict[str, float] = field(default_factory=dict)  # whole steps, by how they were run
    measured_on: dict | None = None  # facts of the file that the times come from, if they do

    def __post_init__(self) -> None:
        self.ops: list[Op] = step_ops(
            self.config,
            self.B,
            self.T,
            self.precision,
            self.recompute,
            self.micro_batches,
            self.world_size,
            self.rows_per_chunk,
        )

    @property
    def what(self) -> dict:
        """What measured times must be of to stand beside these bounds."""
        return {
            "model": dataclasses.asdict(self.config),
            "precision": self.precision,
            "micro_batch_size": self.B,
            "context": self.T,
            "micro_batches": self.micro_batches,
            "world_size": self.world_size,
            "recompute": self.recompute,
        }

    def rows(self) -> list[dict]:
        """The table: one row per op, and one for the head as a whole where that was measured."""
        found = []
        for op in self.ops:
            bound, taken = op.bound_ms(self.chip, self.precision), self.measured.get((op.name, op.phase))
            counts = {"calls": op.calls, "flops": op.flops, "bytes": op.bytes}
            bounds = {"bound_ms": bound, "bound_by": op.bound_by(self.chip, self.precision)}
            found.append({"op": op.name, "where": op.phase, **counts, **bounds, "measured_ms": taken})
        if (HEAD, "") in self.measured:
            head = [row for op, row in zip(self.ops, found, strict=True) if op.group == HEAD]
            sums = {name: sum(row[name] for row in head) for name in ("calls", "flops", "bytes", "bound_ms")}
            bound_by = max(head, key=lambda row: row["bound_ms"])["bound_by"]
            whole = {"op": TOGETHER, "where": "both", **sums, "bound_by": bound_by}
            found.append(whole | {"measured_ms": self.measured[HEAD, ""]})
        return found

    def totals(self) -> dict:
        """Bounds of the whole step, and what they allow."""
        compute_ms = sum(op.bound_ms(self.chip, self.precision) for op in self.ops)
        sent = communication(self.config, self.world_size, "ddp", self.precision, micro_batches=self.micro_batches)
        wire_bytes = sum(each.wire_bytes for each in sent)
        link = max(self.chip.links, key=self.chip.links.get, default=None)
        wire_ms = 1e3 * wire_bytes / self.chip.links[link] if link else None
        bound_ms = max(compute_ms, wire_ms or 0.0)
        tokens = self.B * self.T * self.micro_batches  # of one device
        flops = flops_per_token(self.config, self.T)
        return {
            "flops": sum(op.flops for op in self.ops),
            "bytes": sum(op.bytes for op in self.ops),
            **{
                f"{phase}_ms": sum(op.bound_ms(self.chip, self.precision) for op in self.ops if op.phase == phase)
                for phase in ("forward", "backward", "optimizer")
            },
            "ops_ms": compute_ms,
            "wire_bytes": wire_bytes,
            "link": link,
            "wire_ms": wire_ms,
            "bound_ms": bound_ms,
            "tokens_per_s": 1e3 * tokens * self.world_size / bound_ms,
            "flops_per_token": flops,
            "mfu": 1e3 * flops * tokens / bound_ms / self.chip.flops_per_s[self.precision],
        }

    def verdict(self) -> str:
        """The sentence that names the op to work on."""
        rows = self.rows()
        timed = [row for row in rows if row["measured_ms"] is not None]
        if not timed:
            row = max(rows, key=lambda row: row["bound_ms"])
            return (
                f"Nothing is measured here. The op with the largest bound is {row['op']} ({row['where']}): "
                f"{significant(row['bound_ms'])} ms a step, by {row['bound_by']}."
            )
        row = max(timed, key=lambda row: row["measured_ms"] - row["bound_ms"])
        over = row["measured_ms"] - row["bound_ms"]
        if over <= 0:
            return "No measured op takes longer than its bound."
        return (
            f"{row['op']} ({row['where']}) costs the most above its bound: {significant(row['measured_ms'])} ms a "
            f"step, {significant(over)} ms more than the {significant(row['bound_ms'])} ms that {row['bound_by']} "
            f"allows ({row['measured_ms'] / row['bound_ms']:.2f} times)."
        )

    def table(self) -> str:
        """All of it as text."""
        chip, totals = self.chip, self.totals()
        peak = chip.flops_per_s[self.precision]
        tokens = self.B * self.T * self.micro_batches * self.world_size
        lines = [
            f"{self.model}, {self.precision}, recompute {self.recompute}; a step is {tokens:,} tokens = {self.B} "
            f"sequences x {self.T:,} x {self.micro_batches} micro-batches x {self.world_size} devices",
            f"{chip.name} ({chip.kind}: {chip.source}): {peak / 1e12:.4g} TFLOP/s, {chip.bytes_per_s / 1e9:.4g} GB/s",
            "",
            *aligned([HEADS, *(cells(row) for row in self.rows())]),
            "",
            f"lower bound of a step's ops: {totals['ops_ms']:.4g} ms, of which forward {totals['forward_ms']:.4g}, "
            f"backward {totals['backward_ms']:.4g}, optimizer {totals['optimizer_ms']:.4g}; "
            f"{totals['flops'] / 1e12:.4g} TFLOP, {totals['bytes'] / 1e9:.4g} GB",
        ]
        if self.world_size > 1:
            link = "no link is known for this chip"
            if totals["link"]:
                rate = chip.links[totals["link"]] / 1e9
                link = f"{totals['wire_ms']:.4g} ms over {totals['link']} at {rate:.4g} GB/s, at best behind the rest"
            lines.append(f"communication: {totals['wire_bytes'] / 1e9:.4g} GB sent by each device; {link}")
        lines.append(
            f"at that bound: {totals['tokens_per_s']:,.0f} tokens/s, MFU {100 * totals['mfu']:.1f}% "
            f"(6 (N - wpe) + 12 L C T = {totals['flops_per_token'] / 1e9:.4g} GFLOP per token)"
        )
        timed = [row for row in self.rows() if row["measured_ms"] is not None]
        if timed:
            taken, bound = (sum(row[name] for row in timed) for name in ("measured_ms", "bound_ms"))
            lines.append(f"measured ops: {taken:.4g} ms together, their bounds {bound:.4g} ms")
            if below := [f"{row['op']} ({row['where']})" for row in timed if row["measured_ms"] < row["bound_ms"]]:
                lines.append(
                    f"below their bounds, from a cache or since the ceilings were measured too low: {', '.join(below)}"
                )
        for how, ms in self.step_ms.items():
            lines.append(f"measured step, {how}: {ms:.4g} ms, {ms / totals['bound_ms']:.2f} times its bound")
        return "\n".join([*lines, "", self.verdict()])

    def record(self, facts: dict[str, str]) -> dict:
        """All of it for JSON, with the facts about the machine that it ran on."""
        sent = communication(self.config, self.world_size, "ddp", self.precision, micro_batches=self.micro_batches)
        return {
            "roofline": self.model,
            "facts": facts,
            "what": self.what,
            "chip": dataclasses.asdict(self.chip),
            "note": "bounds are computed, not measured",
            "rows_per_chunk": self.rows_per_chunk,
            "ops": self.rows(),
            "measured": [[*key, ms] for key, ms in self.measured.items()],
            "measured_on": self.measured_on,
            "step_ms": self.step_ms,
            "communication": [{**dataclasses.asdict(each), "wire_bytes": each.wire_bytes} for each in sent],
            "totals": self.totals(),
            "verdict": self.verdict(),
        }

    def draw(self, path: Path) -> Path:
        """The picture."""
        from bench import roofline_plot

        totals = self.totals()
        title = f"Lower bounds of a {self.model} training step in {self.precision} on {self.chip.name}"
        computed = "measured ceilings of this machine" if self.chip.is_measured else "the data sheet"
        subtitle = (
            f"Bounds are computed from {computed}: {self.chip.flops_per_s[self.precision] / 1e12:.4g} TFLOP/s, "
            f"{self.chip.bytes_per_s / 1e9:.4g} GB/s\n{self.B * self.T * self.micro_batches:,} tokens per device, "
            f"{self.micro_batches} x {self.B} sequences of {self.T:,}: at least {totals['bound_ms']:.4g} ms, "
            f"MFU at most {100 * totals['mfu']:.0f}%"
        )
        return roofline_plot.draw(path, self.ops, self.measured, self.chip, self.precision, title, subtitle)


HEADS = ("op", "where", "calls", "GFLOP", "GB", "bound ms", "bound by", "measured ms", "ratio")


def cells(row: dict) -> tuple[str, ...]:
    """A row of the table as text."""
    taken = row["measured_ms"]
    return (
        row["op"],
        row["where"],
        f"{row['calls']:,}",
        f"{row['flops'] / 1e9:,.1f}" if row["flops"] else "-",
        f"{row['bytes'] / 1e9:,.3f}",
        f"{row['bound_ms']:.3f}",
        row["bound_by"],
        "-" if taken is None else f"{taken:.3f}",
        "-" if taken is None else f"{taken / row['bound_ms']:.2f}",
    )


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of columns of equal width; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    left = {HEADS.index(name) for name in ("op", "where", "bound by")}
    return [
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(columns))
        for columns in ([*zip(row, widths, strict=True)] for row in rows)
    ]


def chip_of(name: str, found: dict | None, precision: str, device: str) -> Chip:
    """The chip of this name; "this" is what the results were measured on, or else this machine, now."""
    if name in CHIPS:
        return CHIPS[name]
    if name != "this":
        raise BadInput(f"roofline: --chip must be one that is known, got {name!r}{nearest(name, [*CHIPS, 'this'])}")
    if found is None:
        return chips.measure(device, precision)
    if "roofline" in found:
        return Chip(**found["chip"])
    chip = chips.from_rows(found["rows"], found.get("machine", {}).get("gpu", "the GPU of bench.gpu"))
    if chip is None:
        raise BadInput("roofline: --chip this must find ceilings among the measured rows, got none; name the chip")
    return chip


def build(args: argparse.Namespace) -> Roofline:
    """What the command line asks for, measured if it says so. Raises BadInput."""
    if args.model not in MODELS:
        raise BadInput(f"roofline: the model must be one that exists, got {args.model!r}{nearest(args.model, MODELS)}")
    found = None if args.measured is None else read(args.measured)
    device = "cpu"
    if args.measure or (args.chip == "this" and found is None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cpu = args.chip == "this" and device == "cpu" and (found is None or "rows_per_chunk" in found)
    usual = found["what"]["precision"] if found and "roofline" in found else "fp32" if on_cpu else "bf16"
    precision = args.precision or usual
    config = MODELS[args.model]
    changed = {name: getattr(args, name) for name in ("n_layer", "n_embd", "n_head") if getattr(args, name) is not None}
    try:
        config = dataclasses.replace(config, **changed)
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
    if args.measure and found is not None:
        wrong.append("--measure and --measured must not both be given")
    if wrong:
        raise BadInput("roofline: " + "\n  ".join(wrong))
    micro_batches = batch_shape(step, args.gpus)[1]
    chip = chip_of(args.chip, found, precision, device)
    if precision not in chip.flops_per_s:
        known = ", ".join(chip.flops_per_s)
        raise BadInput(f"roofline: --precision must be one that {chip.name} was measured in, {known}, got {precision}")
    rows = found["rows_per_chunk"] if found and "roofline" in found else head_rows(config, not on_cpu)
    name = args.model + ("".join(f", {key} {value}" for key, value in changed.items()))
    roofline = Roofline(name, config, chip, precision, B, T, micro_batches, args.gpus, args.recompute, rows)
    if found is not None:
        take_measured(roofline, found, args.measured)
    if args.measure:
        per_call = measure_ops(config, B, T, precision, device)
        roofline.measured = per_step(roofline.ops, per_call, args.recompute)
        shape = (config, B, T, precision, args.recompute, micro_batches)
        roofline.step_ms = measure_step(*shape, device)
        roofline.chip = chips.faster(chip, chips.measure(device, precision))
    return roofline


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="gpt2", metavar="PRESET", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--chip", default="H200", help=f"one of {', '.join(CHIPS)}, or this: measured")
    parser.add_argument("--micro-batch-size", type=int, help="sequences per forward pass; 64, or 4 for small models")
    parser.add_argument("--context", type=int, help="tokens per sequence; 1,024 or what the model has")
    parser.add_argument("--precision", choices=list(ITEMSIZE), help="bf16; fp32 on a CPU")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none", help="activations made again")
    parser.add_argument(
        "--tokens-per-step", type=int, help="over all GPUs: 524,288, or one micro-batch of small models"
    )
    parser.add_argument("--gpus", type=int, default=1, help="data-parallel replicas (DDP)")
    for name in ("n-layer", "n-embd", "n-head"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--measured", type=Path, metavar="FILE.json", help="gpu.json of bench.gpu, or a roofline.json")
    parser.add_argument("--measure", action="store_true", help="time every op here and now, with --chip this")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture")
    parser.add_argument("--save", action="store_true", help="roofline.json and .png in bench/results, by chip")
    args = parser.parse_args(argv)
    try:
        try:
            roofline = build(args)
        except (KeyError, TypeError) as error:
            if args.measured is None:
                raise
            raise BadInput(f"roofline: {args.measured} must be a whole file of results, got {error!r}") from error
        print(roofline.table())
        for path in write(roofline, args):
            print(f"wrote {path}")
    except BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return 0


def write(roofline: Roofline, args: argparse.Namespace) -> list[Path]:
    """The files that were asked for. Raises BadInput where they cannot be written."""
    written = []
    try:
        if args.out is not None:
            written.append(roofline.draw(args.out))
        if args.save:
            device = "cuda" if args.chip == "this" and torch.cuda.is_available() else "cpu"
            place = machine.slug(device) if args.chip == "this" else f"nvidia-{args.chip.lower().replace(' ', '-')}"
            directory = machine.RESULTS / place
            directory.mkdir(parents=True, exist_ok=True)
            path, text = directory / "roofline.json", json.dumps(roofline.record(machine.facts(device)), indent=1)
            temporary = path.with_name(".roofline.json.writing")
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path)
            written += [path, roofline.draw(path.with_suffix(".png"))]
    except OSError as error:
        raise BadInput(f"roofline: the results must go where files can be written, got {error}") from error
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
