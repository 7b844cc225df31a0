"""Rows of bench.gpu as cells of Markdown tables. Free of PyTorch."""

import math

Row = dict
OP_HEADS = (
    *("op", "contestant", "forward", "backward", "forward + backward"),
    *("largest error, of", "peak MB above inputs"),
)
CEILING_HEADS = ("", "median (20th to 80th percentile)", "rate")
ERROR_HEADS = ("op", "precision", "result", "error of each output and gradient")
ERROR_WORDS = "||out - ref|| / ||ref||, ours / PyTorch's, ref in float64."
STEP_HEADS = ("model", "contestant", "B", "step ms", "tokens/s", "MFU", "peak GiB", "note")
LOSS_HEADS = ("model", "contestants", "step", "losses", "largest difference", "allowed", "result")
BATCH_HEADS = ("model", "contestant", "largest that ran", "smallest that did not", "peak GiB", "note")
LOSS_WORDS = "From the same weights, on the same batches of log-uniform tokens, an update after each."
CONVENTIONS = """\
A step is forward, backward, clipping to a norm of 1 and fused AdamW, the same for all; B sequences of T = 1,024 tokens.
Step ms is the median (20th to 80th percentile). MFU: tokens/s times 6 (N - wpe) + 12 L C T FLOPs, over the data
sheet's dense bf16 peak. N counts each parameter once, the tied head and the padded vocabulary included; attention
is counted without its causal half, and what is recomputed is not. "-": the peak is not known for this GPU or
precision. Peak GiB: the most that PyTorch had allocated for this contestant: weights, gradients, AdamW's state,
activations."""


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


def significant(value: float) -> str:
    """Three significant digits, or as many as the whole part has; no exponent from 0.001 up."""
    if not 0.001 <= abs(value) < 1e15:
        return f"{value:.2e}" if value else "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spread(phase: dict) -> str:
    """A median time with the 20th and 80th percentile."""
    times = (significant(phase[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
    return "{} ({} to {}) ms".format(*times)


def result(row: Row) -> str:
    """The status, with the reason of a row that was skipped."""
    return f"{row['status']}: {row['reason']}" if row["status"] == "skipped" else row["status"]


def goal_cells(goal: dict) -> tuple[str, ...]:
    """A goal as a table row."""
    verdict = {None: "not measured", True: "met", False: "not met"}[goal["is_met"]]
    measured = "-" if goal["measured"] is None else f"{significant(goal['measured'])} {goal['unit']}"
    return goal["goal"], measured, f"at least {goal['wanted']:,} {goal['unit']}", verdict


def ceiling_cells(row: Row) -> tuple[str, ...]:
    """A ceiling as a table row."""
    if "phases" not in row:
        return row["contestant"], row["status"], ""
    phase = row["phases"]["forward"]
    return row["contestant"], spread(phase), f"{significant(phase['rate'])} {phase['unit']}"


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


def accuracy_cells(row: Row) -> tuple[str, ...]:
    """An op's accuracy in one precision as a table row: our error and PyTorch's, output by output."""
    pairs = {
        name: ["not finite" if e is None else f"{e:.1e}" for e in pair] for name, pair in row.get("errors", {}).items()
    }
    errors = ", ".join(f"{name} {ours} / {theirs}" for name, (ours, theirs) in pairs.items())
    return row["op"], row["contestant"], row["status"], errors


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
        return row["op"], row["contestant"], result(row), *("" for _ in STEP_HEADS[3:])
    notes = [row["note"]] if row["note"] else []
    notes += [f"recompute {row['recompute']}"] if row["recompute"] != "none" else []
    notes += ["in turns"] if row["in_turns"] else []
    return (
        row["op"],
        row["contestant"],
        str(row["batch"]),
        spread(row["step_ms"]),
        f"{row['tokens_per_s']:,.0f}",
        "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%",
        f"{row['peak_gib']:.2f}",
        "; ".join(notes),
    )


def loss_cells(row: Row) -> tuple[str, ...]:
    """Two contestants' losses as a table row."""
    if "largest_difference" not in row:
        return row["op"], row["contestant"], *("" for _ in LOSS_HEADS[3:]), result(row)
    (first, last), (other_first, other_last) = row["losses"], row["losses_against"]
    return (
        f"{row['op']}, B = {row['batch']}, T = {row['context']}",
        row["contestant"],
        f"1 and {row['steps']}",
        f"{first:.5f} / {other_first:.5f} and {last:.5f} / {other_last:.5f}",
        f"{row['largest_difference']:.1e}",
        f"{row['tolerance']:.0e}",
        row["status"],
    )


def batch_cells(row: Row) -> tuple[str, ...]:
    """A search for the largest micro-batch as a table row."""
    if "batch" not in row or "too_large" not in row:
        return row["op"], row["contestant"], result(row), *("" for _ in BATCH_HEADS[3:])
    return (
        row["op"],
        row["contestant"],
        str(row["batch"]),
        "-" if row["too_large"] is None else str(row["too_large"]),
        f"{row['peak_gib']:.2f}",
        "" if row["is_exact"] else "the search was cut short",
    )
