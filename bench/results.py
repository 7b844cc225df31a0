"""The one format of results: {"facts": {...}, "rows": [...]}, rows with figures that have a unit and a spread.

No two rows share section, case and peer. status: "measured", "checked" (right, not timed), "failed" or "skipped" (both
with a reason).
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine
from engine.durable import write


class Figure(NamedTuple):
    """One number: median, unit, 20th and 80th percentile, samples."""

    value: float
    unit: str
    low: float
    high: float
    n: int


def spread(samples: Sequence[float], unit: str) -> Figure:
    """The figure of measured samples."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [samples[0]] * 4
    return Figure(statistics.median(samples), unit, cuts[0], cuts[3], len(samples))


def exact(value: float, unit: str) -> Figure:
    """The figure of a number that was counted, computed or read once."""
    return Figure(value, unit, value, value, 1)


def rate(seconds: Figure, amount: float, unit: str) -> Figure:
    """`amount` per second, from a figure in seconds."""
    return Figure(amount / seconds.value, unit, amount / seconds.high, amount / seconds.low, seconds.n)


def scaled(figure: Figure, factor: float, unit: str) -> Figure:
    """The figure in another unit."""
    return Figure(figure.value * factor, unit, figure.low * factor, figure.high * factor, figure.n)


@dataclass
class Row:
    """What is known of one peer at one case."""

    section: str
    case: str
    peer: str
    status: str = "measured"
    reason: str = ""
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.section, self.case, self.peer

    def value(self, name: str) -> float | None:
        return self.figures[name].value if name in self.figures else None

    def as_json(self) -> dict[str, Any]:
        """The row for JSON, without figures that are no finite numbers."""
        named = {name: f._asdict() for name, f in self.figures.items() if all(map(math.isfinite, (f.value, *f[2:4])))}
        return asdict(self) | {"figures": named}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Row":
        """The row that `as_json` gave. Raises KeyError or TypeError if it is none."""
        return cls(**(found | {"figures": {name: Figure(**f) for name, f in found["figures"].items()}}))


def find(rows: Sequence[Row], section: str, case: str, peer: str) -> Row | None:
    """The row of this section, case and peer, or None."""
    return next((row for row in rows if row.key == (section, case, peer)), None)


def save(name: str, facts: dict[str, str], rows: Sequence[Row], directory: str | None = None) -> Path:
    """Writes rows to bench/results/<machine>/<name>.json, in place of those of the same sections and cases.

    Each row keeps the commit and the command that made it. directory: the machine's, this one's by default.
    """
    path = machine.RESULTS / (directory or machine.slug()) / f"{name}.json"
    for row in rows:
        row.facts |= {key: facts[key] for key in ("commit", "command") if key in facts}
    measured = {(row.section, row.case) for row in rows}
    earlier = read(path)[1] if path.exists() else []
    kept = [row for row in earlier if (row.section, row.case) not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, dumps(facts, [*kept, *rows]))
    return path


def dumps(facts: dict[str, str], rows: Sequence[Row], **more: Any) -> str:
    """The file's text. more: further entries beside facts and rows."""
    content = {"facts": facts, **more, "rows": [row.as_json() for row in rows]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Facts and rows of a file. Raises OSError, or ValueError if it is not in this format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["facts"], [Row.from_json(row) for row in found["rows"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold facts and rows as bench.results writes them, got {error!r}") from error
