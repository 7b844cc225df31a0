"""This engine on one CUDA GPU, whole and in parts, against its peers: `python -m bench.gpu --out DIR [--minutes 9]`.

    --resume: measure what an earlier call left out    --only step,attention: some sections of the plan
    --dry-run: run every case on a CPU at a tiny size and keep no times

The parts of PLAN run in order of priority, as far as the minutes go; what did not fit is listed. DIR/gpu.json and
DIR/gpu.md (the tables) are rewritten after every result, so a kill leaves what was measured. This process asks others
to do the work (bench.worker); each may die or hang without taking the rest along. Needs torch, triton and, for it to be
a peer, transformers. Exit codes: 0 done, 1 something failed (see the table), 2 bad input or no CUDA device.
"""

import argparse
import contextlib
import json
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import machine, results, tables
from bench.measure import within
from bench.peers import Comparison, Peer, Trial
from bench.processes import Failed, Worker
from bench.results import Figure, Row, exact, rate, spread
from engine.durable import write
from kernels.dispatch import MODULES
from model.presets import PRESETS


class Part(NamedTuple):
    """One line of the plan."""

    section: str
    name: str
    seconds: float  # it is not begun with less left: compilation included, generous

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"


WORDS = {  # of each section
    "self-check": "What `gpt2 train gpt2` does before it uses a Triton op.",
    "step": "Forward, backward, clipping and fused AdamW, the same for all; B sequences of T = 1,024 tokens. MFU "
    "counts 6 (N - wpe) + 12 L C T FLOPs per token, over the data sheet's dense bf16 peak. Memory: PyTorch's.",
    "ceilings": "",
    "ops": "Of ceiling: of the matrix product's FLOP/s or the copy's B/s. Peak memory: above the inputs.",
    "accuracy": "||out - ref|| / ||ref||, ref in float64.",
}
LONG = ("attention", "linear_cross_entropy")  # ops with more implementations
PRECISIONS = ("bf16", "fp16", "fp32", "tf32")
COMPILED = tuple(Peer(who, "compiled") for who in ("ours", "reference", "transformers"))
EAGER = tuple(Peer(who, "eager") for who in ("ours", "reference", "transformers", "ours on torch"))
STEPS = {
    "bf16 compiled": ("bf16", COMPILED),
    "bf16 eager": ("bf16", EAGER),
    "bf16 torch compiled": ("bf16", (Peer("ours on torch", "compiled"),)),
    "fp16 compiled": ("fp16", COMPILED[:1]),
    "tf32 compiled": ("tf32", COMPILED[:1]),
}
CHOICES = ((64, "none"), (32, "none"), (16, "none"))  # B and what is recomputed: the next where one does not fit
SIZES = {
    "gpt2-medium": ((64, "none"), (64, "block"), (32, "block")),
    "gpt2-large": ((32, "none"), (32, "block"), (16, "block")),
    "gpt2-xl": ((16, "none"), (16, "block"), (8, "block")),
}
# In order of priority: what no longer fits is left out, and the next part is tried.
PLAN = (
    Part("self-check", "bf16", 30),
    Part("ceilings", "matmul and copy", 20),
    *(Part("accuracy", op, 25 if op == "attention" else 9) for op in MODULES),
    Part("step", "bf16 compiled", 220),
    *(Part(MODULES[op].__name__.rpartition(".")[2], op, 50 if op in LONG else 25) for op in MODULES),
    Part("step", "bf16 eager", 80),
    *(Part("step", name, 80) for name in [*STEPS][2:]),
    Part("accuracy", "attention_documents", 25),
    Part("attention", "attention_documents", 50),
    Part("sizes", "gpt2-medium", 120),
    Part("sizes", "gpt2-large", 160),
    Part("sizes", "gpt2-xl", 210),
)
SECTIONS = tuple(dict.fromkeys(part.section for part in PLAN))
SAME = ("commit", "torch", "triton")  # facts in which a resumed run must agree with what is there
TIMING_S = 30.0  # of an op's implementations, or of a step's peers, in turns
GRACE_S = 10.0  # that a request may run over the deadline


@dataclass
class Record:
    """The results under one directory. `save` replaces both files whole: a kill at any moment leaves the last."""

    out: Path
    facts: dict[str, str]
    is_dry: bool = False
    rows: list[Row] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, out: Path) -> "Record":
        """The record as it was last saved. Raises OSError or ValueError."""
        facts, rows = results.read(out / "gpu.json")
        more = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
        return cls(out, facts, more["dry_run"], rows, more["done"], more["reasons"])

    def save(self) -> None:
        """Replaces gpu.json and gpu.md, each in one step."""
        more = {"dry_run": self.is_dry, "done": self.done, "reasons": self.reasons}
        write(self.out / "gpu.json", results.dumps(self.facts, self.rows, **more))
        write(self.out / "gpu.md", self.table() + "\n")

    def put(self, row: Row) -> Row:
        """Adds or replaces a row, and returns it as it is kept: a dry run keeps no figures."""
        if self.is_dry:
            status = "checked" if row.status == "measured" else row.status
            row = Row(*row.key, status, row.reason)
        place = next((i for i, other in enumerate(self.rows) if other.key == row.key), len(self.rows))
        self.rows[place : place + 1] = [row]
        self.save()
        return row

    def note(self, part: Part, reason: str | None) -> None:
        """Notes why a part of the plan is not done, or, without a reason, that it is."""
        self.done += [] if reason else [str(part)]
        self.reasons = {name: said for name, said in self.reasons.items() if name != str(part)}
        self.reasons |= {str(part): reason} if reason else {}
        self.save()

    def table(self) -> str:
        """The whole record in Markdown."""
        lines = ["# GPU benchmark", ""]
        if self.is_dry:
            lines += ["A dry run on small sizes: every case was built and checked, no time is kept.", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        for section, words in WORDS.items():
            if rows := [row for row in self.rows if row.section == section]:
                lines += ["", f"## {section.capitalize()}", "", words, "", tables.of(rows)]
        failures = [f"{', '.join(row.key)}: {row.reason}" for row in self.rows if row.status == "failed"]
        left = [f"{name}: {self.reasons.get(name, 'not begun')}" for name in map(str, PLAN) if name not in self.done]
        for title, items in (("Failed", failures), ("Left out", left)):
            if items:
                lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(lines)


class OutOfTime(Exception):
    """The deadline passed while something ran."""


class Run:
    """One call of bench.gpu: the record, the processes and the time."""

    def __init__(self, record: Record, deadline: float):
        self.record, self.deadline, self.began = record, deadline, time.time()
        flags, environment = (("--dry-run",), {"CUDA_VISIBLE_DEVICES": ""}) if record.is_dry else ((), {})
        log = record.out / "workers.log"
        self.worker, *self.peers = (Worker(*flags, environment=environment, log=log) for _ in range(1 + len(EAGER)))
        self.comparison = Comparison(
            lambda: within(0, 1, 1) if record.is_dry else within(self.seconds(), 2, 10),
            say=self.say,
            put=record.put,
            workers=self.peers,
            setup={"backend": "triton"} if record.is_dry else {},
            deadline=deadline + GRACE_S,
        )

    def seconds(self) -> float:
        """What peers may be timed for, in turns."""
        return min(TIMING_S, self.deadline - time.time() - 2.0)

    def say(self, line: str) -> None:
        print(f"[{time.time() - self.began:5.0f} s] {line}", flush=True)

    def all(self, parts: list[Part]) -> None:
        """Measures each of these parts that fits the time left."""
        kinds = {"self-check": self.self_check, "ceilings": self.ceilings, "accuracy": self.accuracy}
        kinds |= dict.fromkeys(("step", "sizes"), self.steps)
        try:
            for part in parts:
                left, needed = self.deadline - time.time(), 0.0 if self.record.is_dry else part.seconds
                if left <= needed:
                    self.say(f"{part}: left out")
                    self.record.note(part, f"needs up to {needed:.0f} s, {max(0.0, left):.0f} s were left")
                    continue
                self.record.note(part, "begun, not finished")
                with contextlib.suppress(OutOfTime):
                    kinds.get(part.section, self.ops)(part)
                    self.record.note(part, None)
                for worker in (self.worker, *self.peers):
                    with contextlib.suppress(Failed):
                        _ = worker.process and worker.ask("release", 60.0)
        finally:
            for worker in (self.worker, *self.peers):
                worker.stop()

    def ask(self, part: Part, row: Row, do: str, **what):
        """The worker's answer, or None, with a failed row, if there is none. Raises OutOfTime."""
        seconds = min(2.0 * part.seconds + 30.0, self.deadline + GRACE_S - time.time())
        try:
            return self.worker.ask(do, max(1.0, seconds), **what)
        except Failed as error:
            if time.time() > self.deadline:
                raise OutOfTime from error
            row.status, row.reason = "failed", str(error)
            self.put(row)
            return None

    def put(self, row: Row) -> None:
        """Records a row and says so."""
        row = self.record.put(row)
        self.say(f"{row.section}: {row.case}, {row.peer}: {row.status} {row.reason}".rstrip())

    def self_check(self, part: Part) -> None:
        """The engine's own check of the Triton ops; the other parts run whatever it finds."""
        found = self.ask(part, Row("self-check", "every op on Triton", part.name), "self_check", precision=part.name)
        for op, why in (found or {}).items():
            self.put(Row("self-check", op, "triton", "failed" if why else "checked", why))

    def ceilings(self, part: Part) -> None:
        """What this machine reaches at most."""
        for kind in ("matmul", "copy"):
            row = Row("ceilings", "this GPU", kind)
            precision, unit = "fp32" if self.record.is_dry else "bf16", "FLOP/s" if kind == "matmul" else "B/s"
            samples = [self.ask(part, row, "ceiling", kind=kind, precision=precision) for _ in range(8)]
            if None not in samples:
                row.figures["rate"] = spread(samples[1:], unit)
                self.put(row)

    def accuracy(self, part: Part) -> None:
        """Ours, twice the same bits, and PyTorch's against float64."""
        for precision in ("fp32",) if self.record.is_dry else PRECISIONS:
            row = Row("accuracy", f"{part.name} {precision}", "triton")
            found = self.ask(part, row, "accuracy", op=part.name, precision=precision)
            for name, (ours, theirs) in (found or {}).items():
                row.figures |= {f"{name}, ours": exact(ours, ""), f"{name}, PyTorch": exact(theirs, "")}
            if found is not None:
                self.put(row)

    def ops(self, part: Part) -> None:
        """Checks every implementation of an op, then times those that are right, in turns."""
        turns = Row("ops", part.name, "in turns")
        right = {}
        for peer in self.ask(part, turns, "peers", op=part.name) or ():
            row = Row("ops", part.name, peer, "checked")
            found = self.ask(part, row, "check", op=part.name, peer=peer)
            if found is not None:
                row.figures = {"error": exact(found["error"], ""), "peak memory": exact(found["peak"], "B")}
                self.put(row)
                right[peer] = row
        ceilings = {row.peer: row.value("rate") for row in self.record.rows if row.section == "ceilings"}
        what = {"op": part.name, "peers": [*right], "seconds": self.seconds()}
        times = self.ask(part, turns, "time", **what) if right else None
        for peer, phases in (times or {}).items():
            right[peer].status = "measured"
            for phase, (figure, amount, unit) in phases.items():
                seconds, ceiling = Figure(*figure), ceilings.get("matmul" if unit == "FLOP/s" else "copy")
                right[peer].figures |= {phase: seconds, f"{phase} rate": rate(seconds, amount, unit)}
                if ceiling:
                    right[peer].figures[f"{phase} of ceiling"] = rate(seconds, amount / ceiling, "%")
            self.put(right[peer])

    def steps(self, part: Part) -> None:
        """Whole training steps; of a larger preset ours alone."""
        preset, choices = (part.name, SIZES[part.name]) if part.section == "sizes" else ("gpt2", CHOICES)
        precision, peers = ("bf16", COMPILED[:1]) if part.section == "sizes" else STEPS[part.name]
        config = PRESETS[preset]
        case = (config.n_layer, config.n_embd, config.n_positions, choices[0][0])
        trial = Trial.of(case, precision, on_gpu=True, choices=choices)
        self.comparison.limit_s = 2.0 * part.seconds + 30.0
        self.comparison.run(trial.dry() if self.record.is_dry else trial, peers)
        if time.time() > self.deadline:
            raise OutOfTime


def main(arguments: list[str] | None = None) -> int:
    """Runs the plan and prints the table; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json, gpu.md and the log")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything; what does not fit is left out")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--resume", action="store_true", help="keep what is in --out, measure what it left out")
    parser.add_argument("--commit", default=machine.commit(), help="recorded instead of what git says here")
    parser.add_argument("--dry-run", action="store_true", help="check every case on a CPU and keep no times")
    args, began = parser.parse_args(arguments), time.time()
    if wrong := {*args.only.split(",")} - {*SECTIONS}:
        parser.error(f"--only must name some of {','.join(SECTIONS)}, got {','.join(wrong)}")
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error("a CUDA device must be here, there is none; add --dry-run to check on a CPU")
    facts = machine.facts("cpu" if args.dry_run else "cuda")
    facts |= {"command": shlex.join(["python", "-m", "bench.gpu", *arguments]), "commit": args.commit}
    try:
        record = open_record(args, facts)
    except ValueError as error:
        parser.error(str(error))
    left = [part for part in PLAN if str(part) not in record.done]
    chosen = [part for part in left if part.section in args.only.split(",")]
    record.reasons = {str(part): "not among --only" for part in left if part not in chosen}
    record.save()
    Run(record, began + 60.0 * args.minutes).all(chosen)
    print("\n" + record.table(), flush=True)
    return int(any(row.status == "failed" for row in record.rows))


def open_record(args: argparse.Namespace, facts: dict[str, str]) -> Record:
    """The record to go on with, or a new one. Raises ValueError if --resume cannot go on with what is there."""
    out = args.out.resolve()
    if not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        (out / "workers.log").unlink(missing_ok=True)
        return Record(out, facts, args.dry_run)
    try:
        record = Record.load(out)
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume goes on with a gpu.json, {args.out} holds none; leave --resume away") from error
    for name in (*SAME, *(() if args.dry_run else ("gpu",))):
        if record.facts.get(name) != facts[name]:
            theirs = f"{record.facts.get(name)}, got {facts[name]}"
            raise ValueError(f"--resume needs the {name} of the results in {args.out}, {theirs}")
    if record.is_dry != args.dry_run:
        raise ValueError(f"--resume needs --dry-run exactly if the results in {args.out} are of a dry run")
    record.facts["command"] += f"; {facts['command']}"
    return record


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit like any other: what was started is stopped
    sys.exit(main())
