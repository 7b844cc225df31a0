"""Two files of results side by side, and whether the second is a regression.

    python -m bench.compare A.json B.json [--threshold 1.10]      # files: see bench/figures.py
    python -m bench.compare --commits [BASE [HEAD]] [-k EXPRESSION] [--rounds 5]      # see bench/commits.py

The ratio is B / A. Its spread goes from (lower quartile of B) / (upper quartile of A) to (upper quartile of B) / (lower
quartile of A). A spread that holds 1 is noise; a figure without one, or of fewer than three rounds, is not judged. Nor
are times from different machines or versions, and counts from different versions: the first line then says so.

Exit code: 0; or 1 if a time is worse by more than the threshold and outside the noise, or a count grew; or 2 on bad
input, such as files that share no case.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bench import commits
from bench.figures import LEAST_ROUNDS, MACHINE, VERSIONS, Figure, Results, read
from engine.errors import BAD_INPUT, DONE, BadInput

REGRESSED = 1
THRESHOLD = 1.10


class Line(NamedTuple):
    """One line of the table."""

    cells: tuple[str, ...]
    verdict: str  # one of those below, without what is said in addition
    regressed: bool
    peak_ratio: float | None = None


HEADS = ("case", "A", "B", "B/A", "spread", "verdict", "peak B/A")
SLOWER, FASTER, SAME, NOT_JUDGED = "slower", "faster", "same within noise", "not judged"
GREW, SHRANK, EQUAL = "grew", "shrank", "equal"


# ---- Judging ------------------------------------------------------------------------------------------------------


def lines(a: Results, b: Results, threshold: float) -> list[Line]:
    """The table, without counts that are equal."""
    is_machine, is_version = (bool(differences(a, b, names)) for names in (MACHINE, VERSIONS))
    found = []
    for key, before in a.figures.items():
        after = b.figures.get(key)
        if after is None:
            continue
        if before.kind == after.kind == "count":
            found.append(count_line(key, before, after, is_judged=not is_version))
        else:
            found.append(time_line(key, before, after, threshold, is_judged=not (is_machine or is_version)))
    return found


def time_line(key: tuple[str, str], a: Figure, b: Figure, threshold: float, is_judged: bool) -> Line:
    """A time or a rate. More of a rate is better."""
    ratio = b.value / a.value if a.value > 0 and b.value > 0 else None
    spread = None
    if None not in (a.low, a.high, b.low, b.high) and min(a.low, b.low) > 0:
        spread = b.low / a.high, b.high / a.low
    verdict, regressed, addition = NOT_JUDGED, False, ": no spread" if ratio is not None else ": not above 0"
    if ratio is not None and spread is not None:
        worse, least = (ratio, spread[0]) if a.kind == "time" else (1 / ratio, 1 / spread[1])
        most = spread[1] if a.kind == "time" else 1 / spread[0]
        verdict = SLOWER if least > 1 else FASTER if most < 1 else SAME
        regressed = verdict == SLOWER and worse > threshold and is_judged
        addition = f", within {threshold:.2f}" if verdict == SLOWER and worse <= threshold else ""
    peak_ratio = b.peak / a.peak if a.peak and b.peak else None
    case, unit = key
    scale, unit = in_unit(a.value) if unit == "s" else (1.0, unit)
    cells = (
        case if unit in ("s", "ms", "us") else f"{case}: {unit}",
        *(f"{figure.value * scale:,.4g}" + (f" {unit}" if key[1] == "s" else "") for figure in (a, b)),
        f"{ratio:.3f}" if ratio is not None else "-",
        f"{spread[0]:.3f} to {spread[1]:.3f}" if spread is not None else "-",
        verdict + addition,
        f"{peak_ratio:.3f}" if peak_ratio else "-",
    )
    return Line(cells, verdict, regressed, peak_ratio)


def count_line(key: tuple[str, str], a: Figure, b: Figure, is_judged: bool) -> Line:
    """A count: any growth that is not allowed is one too much."""
    allowed = max(a.allowed, b.allowed)
    verdict = GREW if b.value > a.value * (1 + allowed) else SHRANK if b.value < a.value * (1 - allowed) else EQUAL
    changes = ""
    if verdict != EQUAL and a.parts and b.parts:
        changed = {name: b.parts.get(name, 0) - a.parts.get(name, 0) for name in a.parts | b.parts}
        changes = ": " + ", ".join(f"{name} {change:+,}" for name, change in changed.items() if change)
    cells = (
        f"{key[0]}: {key[1]}",
        *(f"{figure.value:,}" for figure in (a, b)),
        f"{b.value / a.value:.4f}" if a.value else "-",
        f"within {allowed:.1%}" if allowed else "exact",
        verdict + changes,
        "-",
    )
    return Line(cells, verdict, verdict == GREW and is_judged)


def in_unit(seconds: float) -> tuple[float, str]:
    """What to multiply by, and the unit that it gives."""
    return next(((scale, unit) for scale, unit in ((1.0, "s"), (1e3, "ms")) if seconds * scale >= 1.0), (1e6, "us"))


def differences(a: Results, b: Results, names: tuple[str, ...]) -> list[str]:
    """Facts of these names that both files have and that differ, as "name A / B"."""
    both = [name for name in names if name in a.facts and name in b.facts]
    return [f"{name} {a.facts[name]} / {b.facts[name]}" for name in both if a.facts[name] != b.facts[name]]


# ---- Report -------------------------------------------------------------------------------------------------------


def report(a: Results, b: Results, threshold: float = THRESHOLD) -> int:
    """Prints the comparison; the exit code. Raises BadInput if no figure is in both."""
    machines, versions = (differences(a, b, names) for names in (MACHINE, VERSIONS))
    if machines or versions:
        what = " and ".join(word for word, found in (("machines", machines), ("versions", versions)) if found)
        spared = "times and counts" if versions else "times"
        print(f"different {what}: {'; '.join(machines + versions)}: ratios of {spared} are shown, not judged")
    print(f"A: {a.label}\nB: {b.label}")
    found = lines(a, b, threshold)
    if shown := [line.cells for line in found if line.verdict != EQUAL]:
        print("", *aligned([HEADS, *shown]), sep="\n")
    for side, one, other in (("A", a, b), ("B", b, a)):
        known = {case for case, _ in other.figures}
        alone: dict[str, list[str]] = {}
        for case, name in (key for key in one.figures if key not in other.figures):
            alone.setdefault(case, []).append(name)
        if alone:
            listed = [f"{case}: {', '.join(names)}" if case in known else case for case, names in alone.items()]
            print(f"\nonly in {side}:", *listed, sep="\n  ")
    if not found:
        counts = f"{len(a.figures)} figures in A and {len(b.figures)} in B"
        raise BadInput(f"compare: at least one figure must be in both, got {counts} and none that they share")
    print("\n" + summary(found, threshold))
    return REGRESSED if any(line.regressed for line in found) else DONE


def summary(found: list[Line], threshold: float) -> str:
    """How many of each verdict, and what makes it a regression."""
    verdicts = Counter(line.verdict for line in found)
    counted = [
        f"{verdicts[verdict]} {verdict}" + (" (counts)" if verdict in (GREW, SHRANK, EQUAL) else "")
        for verdict in (SLOWER, FASTER, SAME, NOT_JUDGED, GREW, SHRANK, EQUAL)
        if verdicts[verdict]
    ]
    parts = [", ".join(counted)]
    if heavier := [line for line in found if (line.peak_ratio or 0.0) > threshold]:
        cases = "; ".join(f"{line.cells[0]} ({line.peak_ratio:.3f})" for line in heavier)
        parts.append(f"more peak memory, beyond {threshold:.2f}, which is not judged: {cases}")
    if regressed := [line for line in found if line.regressed]:
        cases = "; ".join(f"{line.cells[0]} ({line.cells[3]})" for line in regressed)
        parts.append(f"REGRESSED, a time beyond {threshold:.2f} and the noise or a count: {cases}")
    else:
        parts.append("no regression")
    return "\n".join(parts)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table, columns padded: the first and the verdict to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    to_left = (0, HEADS.index("verdict"))
    return [
        "  ".join(
            cell.ljust(width) if column in to_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compares two files, or two commits; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="A.json and B.json")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="times slower that is a regression")
    parser.add_argument("--commits", nargs="*", metavar="COMMIT", help="measure two commits: BASE, then HEAD")
    parser.add_argument("-k", dest="expression", default=commits.EXPRESSION, help="with --commits: which cases")
    parser.add_argument("--rounds", type=int, default=commits.ROUNDS, help="with --commits: processes per commit")
    args = parser.parse_args(arguments)
    try:
        if not args.threshold >= 1.0:
            raise BadInput(f"compare: --threshold must be at least 1, got {args.threshold}")
        if args.commits is not None:
            if args.files or len(args.commits) > 2:
                raise BadInput("compare: --commits takes BASE and HEAD at most, got more; leave the others out")
            if args.rounds < LEAST_ROUNDS:
                raise BadInput(f"compare: --rounds must be at least {LEAST_ROUNDS} for a spread, got {args.rounds}")
            return report(*commits.measure_both(args.commits, args.expression, args.rounds), args.threshold)
        if len(args.files) != 2:
            raise BadInput(f"compare: two files must be given, A.json and B.json, got {len(args.files)}")
        return report(*map(read, args.files), args.threshold)
    except BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
