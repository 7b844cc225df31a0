"""Numbers as words, and rows as tables: Markdown for files, aligned columns for a terminal."""

import math
from collections.abc import Iterable, Sequence

from bench.results import Figure, Row


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """Columns of equal width; those of `left` begin at the left, the others, numbers, end at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def number(value: float) -> str:
    """Three significant digits, or as many as the whole part has; no exponent from 0.001 up."""
    if not 0.001 <= abs(value) < 1e15:
        return f"{value:.2e}" if value else "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def amount(value: float, unit: str) -> str:
    """A number with its unit, and a prefix where the unit takes one: 1.5e9 B/s is "1.50 GB/s"."""
    if unit in ("B/s", "FLOP/s", "B", "FLOP"):
        power = max(0, min(4, int(math.log10(value)) // 3)) if value > 0 else 0
        return f"{number(value / 1000**power)} {' kMGT'[power].strip()}{unit}"
    if unit == "s":
        factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if value * f >= 1.0), (1e6, "us"))
        return f"{number(value * factor)} {unit}"
    return f"{100 * value:.1f}%" if unit == "%" else f"{number(value)}{'' if unit == 'x' else ' '}{unit}".strip()


def cell(row: Row, name: str, *, is_spread: bool = False) -> str:
    """A figure of a row as a cell, with its spread if asked; "" where the row has none."""
    figure: Figure | None = row.figures.get(name)
    if figure is None:
        return ""
    words = amount(figure.value, figure.unit)
    if not is_spread or figure.n == 1:
        return words
    low, high = (amount(value, figure.unit).removesuffix(f" {figure.unit}") for value in (figure.low, figure.high))
    return f"{words} ({low} to {high})"
