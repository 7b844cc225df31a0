"""Numbers as words, and rows of results as Markdown tables."""

import math
from collections.abc import Iterable, Sequence

from bench.results import Row

PREFIXED = ("B/s", "FLOP/s", "B", "FLOP")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns line up, and without those that are empty throughout."""
    lines = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    kept = [i for i in range(len(heads)) if i == 0 or any(line[i] for line in lines)]
    table = [[line[i] for i in kept] for line in (heads, *lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table)


def of(rows: Sequence[Row], names: Sequence[str] | None = None) -> str:
    """Rows as a table: case, peer, and the figures of these names, or all that any row has."""
    names = [*dict.fromkeys(name for row in rows for name in row.figures)] if names is None else names
    lines = []
    for row in rows:
        status = "" if row.status == "measured" else ": ".join(filter(None, (row.status, row.reason)))
        lines.append((row.case, row.peer, status, *(cell(row, name) for name in names), row.note))
    return markdown(("case", "peer", "status", *names, "note"), lines)


def number(value: float) -> str:
    """A whole number as it is; else three significant digits or more; no exponent from 0.001 up."""
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if not 0.001 <= abs(value) < 1e15:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def amount(value: float, unit: str) -> str:
    """A number with its unit, and a prefix where the unit takes one: 1.5e9 B/s is "1.50 GB/s"."""
    if unit in PREFIXED:
        power = max(0, min(4, int(math.log10(value)) // 3)) if value > 0 else 0
        return f"{number(value / 1000**power)} {' kMGT'[power].strip()}{unit}"
    if unit == "s":
        factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if abs(value) * f >= 1.0), (1e6, "us"))
        return f"{number(value * factor)} {unit}"
    digits = f"{value:.4f}" if unit == "nats" else number(value)  # seeds differ in the third decimal
    return f"{100 * value:.1f}%" if unit == "%" else f"{digits}{'' if unit == 'x' else ' '}{unit}".strip()


def cell(row: Row, name: str) -> str:
    """A figure of a row with its spread, if it has one; "" where the row has no such figure."""
    figure = row.figures.get(name)
    if figure is None:
        return ""
    words, low, high = (amount(value, figure.unit) for value in (figure.value, figure.low, figure.high))
    if low.split(" ")[-1] == high.split(" ")[-1]:
        low = low.split(" ")[0]
    return words + (f" ({low} to {high})" if figure.n > 1 else "")
