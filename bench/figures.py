"""Reading files of results for bench.compare: pytest-benchmark's JSON, and those of bench/results.

A file of bench/results has facts about the machine and "rows", each with strings that identify it and numbers whose
names carry their unit. Its times (`_ms`, `_s`, ...) are read, or the rates (`_per_s`) of a row that has no time, with
the quartiles, percentiles or extremes that stand beside them, and each row's peak memory. Numbers that the head lists
in "counts" repeat from run to run; it gives the relative growth that is allowed, 0 for those that are exact.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.machine import PACKAGES
from engine.errors import BadInput

LEAST_ROUNDS = 3  # fewer have no quartiles
MACHINE = ("machine", "cpu", "cores", "gpu", "threads", "system")
VERSIONS = ("python", "cuda", *PACKAGES)
NO_IDENTITY = ("status", "reason", "commit", "date", "note")  # strings of a row that say nothing about its case
TIME = re.compile(r"(^|[._])(ns|us|ms|s|seconds)$")
RATE = re.compile(r"(^|[._])per_(s|second)$")
ESTIMATE = re.compile(r"predicted|bound|estimate|ceiling")  # of a time: nothing that was measured
AMOUNT = re.compile(r"^rounds$|(^|_)(ns|us|ms|s|bytes|gib|counted|predicted)$")
RANGES = (("q1", "q3"), ("p25", "p75"), ("p20", "p80"), ("min", "max"))
PEAKS = ("peak_bytes", "step_bytes", "peak_gib")  # a row's peak memory, under the first of these names


class Figure(NamedTuple):
    """One number of a file, with what its row says beside it."""

    value: float
    kind: str  # "time" or "rate" or "count"
    low: float | None = None  # lower quartile
    high: float | None = None
    peak: float | None = None  # memory, in the file's unit
    allowed: float = 0.0  # relative growth of a count
    parts: dict[str, int] | None = None  # what a count is the sum of


@dataclass
class Results:
    """What a file holds: figures by (case, name)."""

    label: str
    facts: dict[str, str]
    figures: dict[tuple[str, str], Figure] = field(default_factory=dict)


def read(path: Path) -> Results:
    """The file's figures. Raises BadInput if it cannot be read or is of neither format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"compare: {path} must be a readable file, got {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"compare: {path} must be JSON, got {error}") from error
    try:
        for key, reader in (("benchmarks", pytest_benchmark), ("rows", result_rows)):
            if isinstance(content, dict) and isinstance(content.get(key), list):
                return reader(content, str(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"compare: {path} must have the rows of its format, got {error!r}; measure it again") from error
    raise BadInput(
        f'compare: {path} must be JSON of pytest-benchmark, with "benchmarks", or of bench/results, with "rows"; got '
        + (f"an object with {', '.join(content) or 'nothing'}" if isinstance(content, dict) else type(content).__name__)
    )


def pytest_benchmark(content: dict, label: str) -> Results:
    """Times in seconds, by file and name of the test."""
    info = content.get("machine_info") or {}
    results = Results(titled(label, info), alike(info))
    for row in content["benchmarks"]:
        case = Path(row.get("fullname") or row["name"]).name if "::" in (row.get("fullname") or "") else row["name"]
        stats = row["stats"]
        low, high = (stats.get("q1"), stats.get("q3")) if stats.get("rounds", 0) >= LEAST_ROUNDS else (None, None)
        peak = (row.get("extra_info") or {}).get("peak_bytes")
        results.figures[case, "s"] = checked(label, case, Figure(stats["median"], "time", low, high, peak))
    return results


def result_rows(content: dict, label: str) -> Results:
    """Times, or rates where there are none, and counts, of every row."""
    head = next((content[key] for key in ("facts", "machine") if isinstance(content.get(key), dict)), content)
    counts, results = content.get("counts") or {}, Results(titled(label, head), alike(head))
    rows = [row for row in content["rows"] if isinstance(row, dict)]
    names = [identity(row, counts) for row in rows]
    for case, repeat, row in zip(names, repeats(names), rows, strict=True):
        case += f" #{repeat}" if repeat > 1 else ""
        peak = next((row[name] for name in PEAKS if name not in counts and number(row.get(name))), None)
        for name, allowed in counts.items():
            if number(row.get(name)):
                parts = row.get(f"{name}_by_name")
                results.figures[case, name] = checked(
                    label, case, Figure(row[name], "count", allowed=allowed, parts=parts)
                )
        found = {key: figure for key, figure in measured(row) if key not in counts}
        times = {key: figure for key, figure in found.items() if figure.kind == "time"}
        for key, figure in (times or found).items():
            results.figures[case, key] = checked(label, case, figure._replace(peak=peak))
    return results


def identity(row: dict, counts: dict[str, float]) -> str:
    """A row's strings, and its whole numbers that are neither counts nor amounts, in words."""
    parts = []
    for name, value in row.items():
        if isinstance(value, str) and name not in NO_IDENTITY:
            parts.append(value)
        elif isinstance(value, int) and number(value) and name not in counts and not AMOUNT.search(name):
            parts.append(f"{name}={value}")
    return ", ".join(parts)


def repeats(names: list[str]) -> list[int]:
    """How often each name has come so far."""
    seen: Counter = Counter()
    return [seen.update([name]) or seen[name] for name in names]


def measured(row: dict, path: str = "") -> list[tuple[str, Figure]]:
    """Every time and rate: {"step_ms": 5.0}, {"step_ms": {"median": 5.0}} or {"forward": {"median_ms": 5.0}}."""
    found = []
    for key, value in row.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            if number(value.get("median")):
                found += figure_of(name, value["median"], value, "{}")
            else:
                found += measured(value, f"{name}.")
        elif key.startswith("median_") and number(value):
            unit = key.removeprefix("median_")
            found += figure_of(f"{path}{unit}", value, row, f"{{}}_{unit}")
        elif number(value) and not re.search(r"(^|_)([pq]\d+|min|max)(_|$)", key):
            found += figure_of(name, value, row, f"{key}_{{}}")
    return found


def figure_of(name: str, value: float, beside: dict, form: str) -> list[tuple[str, Figure]]:
    """The figure of this name, if its unit is one of time or rate, with the range that stands beside it."""
    kind = "rate" if RATE.search(name) else "time" if TIME.search(name) else None
    if kind is None or ESTIMATE.search(name):
        return []
    ranges = [[beside.get(form.format(end)) for end in ends] for ends in RANGES]
    low, high = next((ends for ends in ranges if all(map(number, ends))), (None, None))
    if beside.get("rounds", LEAST_ROUNDS) < LEAST_ROUNDS:
        low = high = None
    return [(name, Figure(value, kind, low, high))]


def number(value: object) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def checked(label: str, case: str, figure: Figure) -> Figure:
    """The figure. Raises BadInput if a number of it is not finite."""
    for value in (figure.value, figure.low, figure.high, figure.peak):
        if value is not None and not (number(value) and math.isfinite(value)):
            raise BadInput(f"compare: {label}: every figure must be a finite number, got {value!r} for {case}")
    return figure


def titled(label: str, facts: dict) -> str:
    """The label with the commit and the date of the measurement, where they are known."""
    known = [str(facts[name])[:12] for name in ("commit", "date") if facts.get(name)]
    return label + (f" (commit {', '.join(known)})" if facts.get("commit") else "")


def alike(facts: dict) -> dict[str, str]:
    """What a comparison needs of a head, under the names of bench.machine where pytest-benchmark has its own."""
    facts = dict(facts)
    if isinstance(facts.get("cpu"), dict):  # no file of this project: pytest-benchmark's own facts
        cpu = facts["cpu"]
        facts = facts | {"cpu": cpu.get("brand_raw"), "cores": cpu.get("count"), "python": facts.get("python_version")}
    return {name: str(facts[name]) for name in (*MACHINE, *VERSIONS) if isinstance(facts.get(name), str | int)}
