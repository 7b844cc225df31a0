"""What bench.gpu has found so far: gpu.json, gpu.md (the tables), and the parts of the plan not yet measured.

Free of PyTorch: the process that reads and formats results never touches the GPU.

gpu.json: "machine" (bench.machine.facts and the GPU's), "rows", "goals" (gpu_goals.goals), "plan" and "left_out" (names
of parts), "reasons" (of those left out), "dry_run", "started" and "minutes"; the rest is this program's own.

Every row has "section", "op", "contestant" (no two share all three) and "status": "measured", "checked" (right, but not
timed), "failed" or "skipped" (both with "reason"). Measured rows have in section

- ceilings: "phases": {"forward": phase}
- attention, layer_norm, gelu, cross_entropy: "errors" by tensor, "peak_bytes", and "phases" by name: "forward" (or
  "forward_no_grad"), "backward", "both"
- accuracy: "errors": {tensor: [ours, PyTorch's]}
- tests: "counts": {"passed", "failed", "skipped"}, "failures", and "stopped" if not all ran
- step and sizes: op "<preset> <precision>", contestant "triton|torch|reference|transformers compiled|eager";
  "preset", "precision", "context", "batch", "recompute", "tokens_per_s", "step_ms" (times), "mfu" (None where the
  peak is not known), "peak_gib", "in_turns" (timed in turns with the part's others), "note" ("" or what did not fit)
- loss: contestant "<other> against <ours>"; "precision", "batch", "context", "steps" (updates), "losses" [first, last]
  of ours, "losses_against" [first, last] of the other, "largest_difference" (relative, over all steps), "tolerance"
- batch: op and contestant as for step; "batch" (the largest that ran), "too_large" (the smallest that did not, or
  None), "is_exact" (nothing lies between), "unit" (what it is a multiple of), "context", "peak_gib" (at "batch")

A phase is times and "rate", "unit" (TFLOP/s or GB/s), "share_of_ceiling" (0 to 1, or None); times are "median_ms",
"p20_ms", "p80_ms" and "samples".
"""

import json
import os
import time
from pathlib import Path

from bench import gpu_tables as tables
from bench.gpu_goals import Row, find, goals
from bench.gpu_plan import OPS, PLAN, Part


class Record:
    """The results under one directory. `save` writes both files whole, so that a kill at any moment leaves the last."""

    def __init__(self, out: Path, state: dict):
        self.out, self.state = out, state

    @classmethod
    def new(cls, out: Path, **facts) -> "Record":
        """An empty record with these facts about the run."""
        plan = [str(part) for part in PLAN]
        return cls(out, {"machine": {}, **facts, "rows": [], "plan": plan, "done": [], "reasons": {}, "running": None})

    @classmethod
    def load(cls, out: Path) -> "Record":
        """The record as it was last saved."""
        return cls(out, json.loads((out / "gpu.json").read_text(encoding="utf-8")))

    def save(self) -> None:
        """Replaces gpu.json and gpu.md, each in one step."""
        state = self.state
        state["goals"] = [] if state["dry_run"] else goals(state["rows"], state["machine"].get("gpu", ""))
        state["left_out"] = [name for name in state["plan"] if name not in state["done"]]
        for name, text in (("gpu.json", json.dumps(state, indent=1, allow_nan=False)), ("gpu.md", self.table())):
            temporary = self.out / f".{name}.writing"
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self.out / name)

    def put(self, row: Row) -> None:
        """Adds a row, or replaces the one of the same section, op and contestant."""
        rows = self.state["rows"]
        place = next((i for i, other in enumerate(rows) if key(other) == key(row)), len(rows))
        rows[place : place + 1] = [row]
        self.save()

    def find(self, section: str, op: str, contestant: str) -> Row | None:
        """The row of this section, op and contestant, or None."""
        return find(self.state["rows"], section, op, contestant)

    def begin(self, part: Part, section: str, op: str, contestant: str, seconds: float) -> None:
        """Notes what runs from now on, so that it can be named if the process dies or hangs.

        It hangs when it takes more than twice the seconds that it should, and half a minute.
        """
        self.state["running"] = {
            "part": str(part),
            "section": section,
            "op": op,
            "contestant": contestant,
            "limit_s": 2.0 * seconds + 30.0,
            "since": time.time(),
        }
        self.save()

    def leave_out(self, part: Part, reason: str) -> None:
        """Notes why a part of the plan was not measured."""
        self.state["reasons"][str(part)] = reason
        self.save()

    def finish(self, part: Part) -> None:
        """A part of the plan is over, well or badly."""
        self.state["done"].append(str(part))
        self.state["running"] = None
        self.save()

    def table(self) -> str:
        """The whole record in Markdown."""
        state = self.state
        lines = ["# GPU benchmark", ""]
        if state["dry_run"]:
            lines += ["A dry run on small sizes: every case was built and checked, nothing was timed.", ""]
        lines += [f"Started {state['started']}, given {state['minutes']:g} minutes.", ""]
        lines += [f"- {name}: {value}" for name, value in state["machine"].items()]
        for title, words, heads, cells, rows in (
            ("Goals", "", ("goal", "measured", "wanted", ""), tables.goal_cells, state["goals"]),
            ("Training step", tables.CONVENTIONS, tables.STEP_HEADS, tables.step_cells, self.section("step")),
            ("Larger presets", "", tables.STEP_HEADS, tables.step_cells, self.section("sizes")),
            ("Losses, ours / theirs", tables.LOSS_WORDS, tables.LOSS_HEADS, tables.loss_cells, self.section("loss")),
            ("Largest micro-batch", "", tables.BATCH_HEADS, tables.batch_cells, self.section("batch")),
            ("Ceilings", "", tables.CEILING_HEADS, tables.ceiling_cells, self.section("ceilings")),
            *((section, "", tables.OP_HEADS, tables.op_cells, self.section(section)) for section in OPS),
            ("Accuracy", tables.ERROR_WORDS, tables.ERROR_HEADS, tables.accuracy_cells, self.section("accuracy")),
            ("Kernel tests", "", ("", "passed", "failed", "skipped"), tables.test_cells, self.section("tests")),
        ):
            if rows:
                lines += ["", f"## {title}", "", *([words, ""] if words else [])]
                lines += tables.markdown(heads, [cells(row) for row in rows])
        for title, items in (("Failed", self._failures()), ("Left out", self._left_out())):
            if items:
                lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(lines)

    def section(self, section: str) -> list[Row]:
        """Its rows, in the order in which they came."""
        return [row for row in self.state["rows"] if row["section"] == section]

    def _failures(self) -> list[str]:
        return [
            f"{row['section']}: {row['op']}, {row['contestant']}: {row['reason']}"
            for row in self.state["rows"]
            if row["status"] == "failed"
        ]

    def _left_out(self) -> list[str]:
        begun = self.state["running"] and self.state["running"]["part"]
        return [
            f"{name}: {'begun, not finished' if name == begun else self.state['reasons'].get(name, 'not begun')}"
            for name in self.state["left_out"]
        ]


def key(row: Row) -> tuple[str, str, str]:
    """What no two rows share."""
    return row["section"], row["op"], row["contestant"]
