"""What bench.gpu has found so far: gpu.json, gpu.md (the tables), and the parts of the plan that are left.

gpu.json is in the form of bench.results, with "dry_run", "started", "minutes", "plan", "done" (names of parts),
"reasons" (of those left out) and "goals". Rows are in section "ceilings", "accuracy", "ops" or "step" (bench.peers).
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
    "step": "Forward, backward, clipping and fused AdamW, the same for all; B sequences of T = 1,024 tokens. MFU "
    "counts 6 (N - wpe) + 12 L C T FLOPs per token, over the data sheet's dense bf16 peak. Memory: PyTorch's.",
    "ceilings": "",
    "ops": "Of ceiling: of the matrix product's FLOP/s or the copy's B/s. Peak memory: above the inputs.",
    "accuracy": "||out - ref|| / ||ref||, ref in float64.",
}


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
        text = results.dumps(self.facts, self.rows, dry_run=self.is_dry, **more, goals=list(map(str, self.goals)))
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
        lines += [f"Started {self.started}, given {self.minutes:g} minutes.", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        if self.goals:
            lines += ["", "## Goals", "", tables.markdown(goals.HEADS, [goal.cells() for goal in self.goals])]
        for section, words in WORDS.items():
            if rows := [row for row in self.rows if row.section == section]:
                lines += ["", f"## {section.capitalize()}", "", words, "", tables.of(rows)]
        failures = [f"{', '.join(row.key)}: {row.reason}" for row in self.rows if row.status == "failed"]
        left = [f"{name}: {self.reasons.get(name, 'not begun')}" for name in self.plan if name not in self.done]
        for title, items in (("Failed", failures), ("Left out", left)):
            if items:
                lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(lines)
