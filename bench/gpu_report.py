"""What bench.gpu has found so far: gpu.json and gpu.md, the goals, and the parts of the plan not yet measured.

Free of PyTorch: the process that reads and formats results never touches the GPU. The record is a dictionary that JSON
can hold; its rows are {"section", "op", "contestant", "status"} and whatever was measured. Status is "measured",
"checked" (right, but not timed) or "failed" (with a "reason").
"""

import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

Row = dict


class Part(NamedTuple):
    """One line of the plan."""

    section: str
    name: str
    seconds: float  # it is not begun with less left: compilation included, generous

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"


OPS = {
    "attention": ("attention", "separate q, k, v"),
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "gelu": ("gelu", "bias_gelu"),
    "cross_entropy": ("linear_cross_entropy",),
}
STEPS = ("triton compiled", "torch compiled", "triton eager", "torch eager")
STEP = "training step"

# In order of priority: what no longer fits is left out, and the next part is tried.
PLAN = (
    Part("ceilings", "matmul and copy", 20),
    Part("accuracy", "attention", 45),
    *(Part("accuracy", op, 15) for op in ("layer_norm", "add_layer_norm", "gelu", "bias_gelu")),
    Part("accuracy", "linear_cross_entropy", 20),
    Part("attention", "attention", 50),
    Part("attention", "separate q, k, v", 15),
    *(Part(section, op, 25) for section in ("layer_norm", "gelu") for op in OPS[section]),
    Part("cross_entropy", "linear_cross_entropy", 50),
    Part("tests", "kernel tests", 45),
    *(Part("step", name, 70 if "compiled" in name else 25) for name in STEPS),
)


class Record:
    """The results under one directory. `save` writes both files whole, so that a kill at any moment leaves the last."""

    def __init__(self, out: Path, state: dict):
        self.out, self.state = out, state

    @classmethod
    def new(cls, out: Path, **facts) -> "Record":
        """An empty record with these facts about the run."""
        plan = [str(part) for part in PLAN]
        return cls(out, {**facts, "machine": {}, "rows": [], "plan": plan, "done": [], "reasons": {}, "running": None})

    @classmethod
    def load(cls, out: Path) -> "Record":
        """The record as it was last saved."""
        return cls(out, json.loads((out / "gpu.json").read_text(encoding="utf-8")))

    def save(self) -> None:
        """Replaces gpu.json and gpu.md, each in one step."""
        self.state["goals"] = [] if self.state["dry_run"] else goals(self.state["rows"])
        self.state["left_out"] = [name for name in self.state["plan"] if name not in self.state["done"]]
        for name, text in (("gpu.json", json.dumps(self.state, indent=1, allow_nan=False)), ("gpu.md", self.table())):
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

    def begin(self, part: Part, op: str, contestant: str) -> None:
        """Notes what runs from now on, so that it can be named if the process dies or hangs.

        It hangs when it takes more than twice what the whole part should, and half a minute.
        """
        self.state["running"] = {
            "part": str(part),
            "section": part.section,
            "op": op,
            "contestant": contestant,
            "limit_s": 2.0 * part.seconds + 30.0,
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
        lines += [f"`{state['command']}`, {state['started']}", ""]
        lines += [f"- {name}: {value}" for name, value in state["machine"].items()]
        for title, heads, rows in (
            (
                "Ceilings",
                ("", "median (20th to 80th percentile)", "rate"),
                [ceiling_cells(row) for row in self.section("ceilings")],
            ),
            *((section, OP_HEADS, [op_cells(row) for row in self.section(section)]) for section in OPS),
            ("Accuracy: ||out - ref|| / ||ref||, ours / PyTorch's, ref in float64", *self._accuracy()),
            ("Kernel tests", ("", "passed", "failed", "skipped"), [test_cells(row) for row in self.section("tests")]),
            ("Training step", STEP_HEADS, [step_cells(row) for row in self.section("step")]),
            ("Goals", ("goal", "measured", "wanted", ""), [goal_cells(goal) for goal in state["goals"]]),
        ):
            if rows:
                lines += ["", f"## {title}", "", *markdown(heads, rows)]
        for title, items in (("Failed", self._failures()), ("Left out", self._left_out())):
            if items:
                lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(lines)

    def section(self, section: str) -> list[Row]:
        """Its rows, in the order in which they came."""
        return [row for row in self.state["rows"] if row["section"] == section]

    def _accuracy(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        return ("op", "precision", "result", "error of each output and gradient"), [
            (row["op"], row["contestant"], row["status"], errors_in_words(row)) for row in self.section("accuracy")
        ]

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


def find(rows: list[Row], section: str, op: str, contestant: str) -> Row | None:
    """The row of this section, op and contestant, or None."""
    return next((row for row in rows if key(row) == (section, op, contestant)), None)


# The goals


def goals(rows: list[Row]) -> list[dict]:
    """Every goal with what was measured: {"goal", "wanted", "measured", "is_met"}; None where a figure is missing."""

    def median_ms(section: str, op: str, contestant: str, phase: str) -> float | None:
        row = find(rows, section, op, contestant)
        return row["phases"][phase]["median_ms"] if row and phase in row.get("phases", {}) else None

    def times_faster(section: str, op: str, rivals: list[str], phase: str) -> float | None:
        ours = median_ms(section, op, "triton", phase)
        theirs = [t for rival in rivals if (t := median_ms(section, op, rival, phase)) is not None]
        return min(theirs) / ours if ours is not None and theirs else None

    def share(section: str, op: str, phase: str) -> float | None:
        row = find(rows, section, op, "triton")
        return row["phases"][phase]["share_of_ceiling"] if row and phase in row.get("phases", {}) else None

    sdpa = [row["contestant"] for row in rows if row["op"] == "attention" and row["contestant"] != "triton"]
    found = [
        at_least(
            "attention, forward + backward, against the best of PyTorch's with its copies",
            times_faster("attention", "attention", sdpa, "both"),
            1.0,
        )
    ]
    for section in ("layer_norm", "gelu"):
        for op in OPS[section]:
            for phase, wanted in (("forward", 0.9), ("backward", 0.8)):
                found.append(at_least(f"{op}, {phase}, share of the copy ceiling", share(section, op, phase), wanted))
            for phase, words in (("forward", "forward"), ("both", "forward + backward")):
                ratio = times_faster(section, op, ["compile"], phase)
                found.append(at_least(f"{op}, {words}, against torch.compile", ratio, 1.0))
    head = ("cross_entropy", "linear_cross_entropy")
    ratio = times_faster(*head, ["compile"], "both")
    found.append(at_least("linear_cross_entropy, forward + backward, against torch.compile", ratio, 1.0))
    ours, theirs = (find(rows, *head, contestant) for contestant in ("triton", "compile"))
    memory = None
    if ours and theirs and "peak_bytes" in ours and "peak_bytes" in theirs:
        memory = theirs["peak_bytes"] / max(1, ours["peak_bytes"])
    found.append(at_least("linear_cross_entropy, times less peak memory than torch.compile", memory, 6.0))
    return found


def at_least(goal: str, measured: float | None, wanted: float) -> dict:
    """One goal: measured >= wanted."""
    return {
        "goal": goal,
        "wanted": wanted,
        "measured": measured,
        "is_met": None if measured is None else measured >= wanted,
    }


# Cells of the tables

OP_HEADS = (
    *("op", "contestant", "forward", "backward", "forward + backward"),
    *("largest error, of", "peak MB above inputs"),
)
STEP_HEADS = ("ops", "step ms", "tokens/s", "MFU", "peak GiB")


def markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (
            heads,
            tuple("---" for _ in heads),
            *(tuple(str(cell).replace("|", "/") for cell in r) for r in rows),
        )
    ]


def goal_cells(goal: dict) -> tuple[str, ...]:
    """A goal as a table row."""
    verdict = {None: "not measured", True: "met", False: "not met"}[goal["is_met"]]
    unit = "of it" if "share" in goal["goal"] else "x"
    measured = "-" if goal["measured"] is None else f"{significant(goal['measured'])} {unit}"
    return goal["goal"], measured, f"at least {goal['wanted']} {unit}", verdict


def significant(value: float) -> str:
    """Three significant digits, or as many as the whole part has; no exponent from 0.001 up."""
    if not 0.001 <= abs(value) < 1e15:
        return f"{value:.2e}" if value else "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spread(phase: dict) -> str:
    """A median time with the 20th and 80th percentile."""
    times = (significant(phase[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
    return "{} ({} to {}) ms".format(*times)


def phase_cell(phase: dict | None) -> str:
    """Time, rate and share of the ceiling of one phase."""
    if phase is None:
        return "-"
    share = phase["share_of_ceiling"]
    of_ceiling = "" if share is None else f", {100 * share:.1f}%"
    return f"{spread(phase)}, {significant(phase['rate'])} {phase['unit']}{of_ceiling}"


def op_cells(row: Row) -> tuple[str, ...]:
    """A contestant of an op as a table row."""
    phases = row.get("phases")
    if phases is None:
        return row["op"], row["contestant"], row["status"], *("" for _ in OP_HEADS[3:])
    name, error = max(row["errors"].items(), key=lambda item: item[1])
    return (
        row["op"],
        row["contestant"],
        phase_cell(phases["forward"])
        if "forward" in phases
        else f"{phase_cell(phases['forward_no_grad'])}, no gradients",
        phase_cell(phases.get("backward")),
        phase_cell(phases["both"]),
        f"{error:.1e}, {name}",
        f"{row['peak_bytes'] / 1e6:,.0f}",
    )


def ceiling_cells(row: Row) -> tuple[str, ...]:
    """A ceiling as a table row."""
    if "phases" not in row:
        return row["contestant"], row["status"], ""
    phase = row["phases"]["forward"]
    return row["contestant"], spread(phase), f"{significant(phase['rate'])} {phase['unit']}"


def errors_in_words(row: Row) -> str:
    """Our error and PyTorch's, output by output."""
    pairs = {
        name: ["not finite" if e is None else f"{e:.1e}" for e in pair] for name, pair in row.get("errors", {}).items()
    }
    return ", ".join(f"{name} {ours} / {theirs}" for name, (ours, theirs) in pairs.items())


def test_cells(row: Row) -> tuple[str, ...]:
    """The kernel tests as a table row."""
    counts = row.get("counts")
    if counts is None:
        return row["op"], row["status"], "", ""
    what = f"{row['op']} (not all ran: {row['stopped']})" if row.get("stopped") else row["op"]
    return what, *(str(counts[name]) for name in ("passed", "failed", "skipped"))


def step_cells(row: Row) -> tuple[str, ...]:
    """A training step as a table row."""
    if "step_ms" not in row:
        return row["contestant"], row["status"], "", "", ""
    mfu = "not known for this GPU" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    return (
        row["contestant"],
        spread(row["step_ms"]),
        f"{row['tokens_per_s']:,.0f}",
        mfu,
        f"{row['peak_gib']:.2f}",
    )
