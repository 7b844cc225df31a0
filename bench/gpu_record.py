"""What bench.gpu has found so far: gpu.json, gpu.md (the tables), and the parts of the plan that are left.

gpu.json is in the form of bench.results, with "dry_run", "started", "minutes", "plan", "done" (names of parts),
"reasons" (of those left out) and "goals". Rows are in section

- ceilings: peer "matmul" or "copy", figure "rate"
- accuracy: case "<op> <precision>", figures "<tensor>, ours" and "<tensor>, PyTorch"
- ops: case the op, figures "forward" (or "forward_no_grad"), "backward", "both", each with "... rate" and "... of
  ceiling", and "error" and "peak memory", above the inputs
- step: as bench.peers has them
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import goals, results, tables
from bench.results import Row


class Part(NamedTuple):
    """One line of the plan."""

    section: str
    name: str
    seconds: float  # it is not begun with less left: compilation included, generous

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"


WORDS = {
    "Training step": "A step is forward, backward, clipping to a norm of 1 and fused AdamW, the same for all; B sequences "
    "of T = 1,024 tokens. Times are medians (20th to 80th percentile). MFU: tokens/s times 6 (N - wpe) + 12 L C T FLOPs, "
    "over the data sheet's dense bf16 peak. Peak memory: the most that PyTorch had allocated: weights, gradients, "
    "AdamW's state, activations. The losses of the first updates are held against the reference's in float32.",
    "Ops": "Share of the ceiling: of the matrix product's FLOP/s or the copy's bytes/s above. Peak memory: above inputs.",
    "Accuracy": "||out - ref|| / ||ref||, ours / PyTorch's, ref in float64.",
}
STEP_HEADS = ("model", "peer", "step", "tokens/s", "MFU", "peak memory", "time / ours", "loss differs by", "note")
OP_HEADS = ("op", "peer", "forward", "backward", "forward + backward", "largest error", "peak memory")


@dataclass
class Record:
    """The results under one directory. `save` replaces both files whole: a kill at any moment leaves the last."""

    out: Path
    facts: dict[str, str]
    plan: list[str]
    is_dry: bool = False
    minutes: float = 0.0
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    rows: list[Row] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, out: Path) -> "Record":
        """The record as it was last saved. Raises OSError or ValueError."""
        facts, rows = results.read(out / "gpu.json")
        more = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
        kept = {name: more[name] for name in ("plan", "minutes", "started", "done", "reasons")}
        return cls(out, facts, rows=rows, is_dry=more["dry_run"], **kept)

    @property
    def goals(self) -> list[goals.Goal]:
        """Every goal and what was measured; a dry run has none."""
        return [] if self.is_dry else goals.gpu_goals(self.rows, self.facts.get("gpu", ""))

    def save(self) -> None:
        """Replaces gpu.json and gpu.md, each in one step."""
        more = {name: getattr(self, name) for name in ("plan", "minutes", "started", "done", "reasons")}
        said = [dict(zip(goals.HEADS[:3], goal.cells(), strict=False)) | {"is": goal.verdict} for goal in self.goals]
        text = results.dumps(self.facts, self.rows, dry_run=self.is_dry, **more, goals=said)
        results.write(self.out / "gpu.json", text)
        results.write(self.out / "gpu.md", self.table())

    def put(self, row: Row) -> Row:
        """Adds or replaces a row, and returns it as it is kept: a dry run keeps no figures."""
        if self.is_dry:
            status = "checked" if row.status == "measured" else row.status
            row = Row(*row.key, status, row.reason)
        results.put(self.rows, row)
        self.save()
        return row

    def leave_out(self, part: Part, reason: str) -> None:
        """Notes why a part of the plan was not measured."""
        self.reasons[str(part)] = reason
        self.save()

    def finish(self, part: Part) -> None:
        """A part of the plan is over, well or badly."""
        self.done.append(str(part))
        self.reasons.pop(str(part), None)
        self.save()

    def table(self) -> str:
        """The whole record in Markdown."""
        lines = ["# GPU benchmark", ""]
        if self.is_dry:
            lines += ["A dry run on small sizes: every case was built and checked, no time is kept.", ""]
        lines += [f"Started {self.started}, given {self.minutes:g} minutes.", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        sections = (
            ("Goals", goals.HEADS, [goal.cells() for goal in self.goals]),
            ("Training step", STEP_HEADS, self._cells("step", step_cells)),
            ("Ceilings", ("", "rate"), self._cells("ceilings", lambda r: (r.peer, said(r, "rate", is_spread=True)))),
            ("Ops", OP_HEADS, self._cells("ops", op_cells)),
            ("Accuracy", ("op", "", "error of each output and gradient"), self._cells("accuracy", accuracy_cells)),
        )
        for title, heads, rows in sections:
            if rows:
                words = [WORDS[title], ""] if title in WORDS else []
                lines += ["", f"## {title}", "", *words, tables.markdown(heads, rows)]
        failures = [f"{', '.join(row.key)}: {row.reason}" for row in self.rows if row.status == "failed"]
        left = [f"{name}: {self.reasons.get(name, 'not begun')}" for name in self.plan if name not in self.done]
        for title, items in (("Failed", failures), ("Left out", left)):
            if items:
                lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(lines)

    def _cells(self, section: str, cells) -> list[tuple[str, ...]]:
        return [cells(row) for row in self.rows if row.section == section]


def said(row: Row, name: str, **how) -> str:
    """A figure, or the row's status where it has none."""
    return tables.cell(row, name, **how) or f"{row.status}{': ' if row.status == 'skipped' else ''}{row.reason}"[:60]


def step_cells(row: Row) -> tuple[str, ...]:
    """A training step as a table row."""
    names = ("tokens", "mfu", "peak memory", "time / ours", "loss difference")
    note = [row.note] if row.note else []
    note += [f"B = {row.facts['batch']}"] if note else []
    note += [f"recompute {row.facts['recompute']}"] if row.facts.get("recompute", "none") != "none" else []
    cells = [tables.cell(row, name) for name in names]
    return row.case, row.peer, said(row, "step", is_spread=True), *cells, "; ".join(note)


def op_cells(row: Row) -> tuple[str, ...]:
    """An implementation of an op as a table row."""

    def phase(name: str) -> str:
        parts = (
            tables.cell(row, name, is_spread=True),
            *(tables.cell(row, f"{name} {w}") for w in ("rate", "of ceiling")),
        )
        return ", ".join(filter(None, parts))

    forward = phase("forward") or phase("forward_no_grad")
    cells = forward or said(row, "forward"), phase("backward"), phase("both")
    return row.case, row.peer, *cells, tables.cell(row, "error"), tables.cell(row, "peak memory")


def accuracy_cells(row: Row) -> tuple[str, ...]:
    """An op's accuracy in one precision as a table row."""
    names = [name.removesuffix(", ours") for name in row.figures if name.endswith(", ours")]
    errors = [f"{n} {row.value(f'{n}, ours'):.1e} / {row.value(f'{n}, PyTorch'):.1e}" for n in names]
    return row.case, row.status, ", ".join(errors)
