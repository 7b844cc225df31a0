"""What differs between runs: settings, loss at equal tokens and at equal time, speed, memory.

Runs with equal settings but the seed are a group. Between groups of at least two seeds each, Welch's
t-test says whether their losses differ by more than seeds make them differ. Runs of one group and
one seed, such as copies, are no independent samples: the first of them counts.
"""

import json
from dataclasses import dataclass
from typing import Any

from engine.comparison import welch
from engine.comparison.records import Record
from engine.run.progress import words
from model.files import few

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of what all runs reached, at which losses are compared
WIDTH = 80  # columns of the table
NAME = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone. members: indices of runs; seeds: theirs."""

    name: str
    members: tuple[int, ...]
    seeds: tuple[int, ...]

    def alike(self) -> list[tuple[int, ...]]:
        """The members that share a seed with another one, together."""
        found = [
            tuple(member for member, theirs in zip(self.members, self.seeds, strict=True) if theirs == seed)
            for seed in dict.fromkeys(self.seeds)
        ]
        return [members for members in found if len(members) > 1]

    def sample(self, values: list[float | None]) -> list[float]:
        """The first known value of each seed. values: one per run."""
        found: dict[int, float] = {}
        for member, seed in zip(self.members, self.seeds, strict=True):
            if values[member] is not None:
                found.setdefault(seed, values[member])
        return list(found.values())


def differing(records: list[Record]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with the value of each run; None where it is not known."""
    found = [record.settings() for record in records]
    names = dict.fromkeys(name for one in found for name in one)
    values = {name: [one.get(name) for one in found] for name in names}
    return {name: those for name, those in values.items() if any(value != those[0] for value in those)}


def groups(records: list[Record]) -> list[Group]:
    """The runs by what they computed with, in their order."""
    found: list[tuple[dict, list[int]]] = []
    for index, record in enumerate(records):
        members = next((members for key, members in found if key == record.computed()), None)
        if members is None:
            found.append((record.computed(), members := []))
        members.append(index)
    return [
        Group(
            NAME[number] if number < len(NAME) else f"group {number + 1}",
            tuple(members),
            tuple(records[member].config.seed for member in members),
        )
        for number, (_, members) in enumerate(found)
    ]


def obstacle(records: list[Record]) -> str | None:
    """Why validation losses do not compare, or None."""
    for name, text in (("tokenizer", "tokenizers"), ("digest", "data")):
        values = {getattr(record, name) for record in records} - {None}
        if len(values) > 1:
            return f"the runs have different {text}"
    if len({record.config.eval_tokens for record in records}) > 1:
        return "the runs evaluate different numbers of tokens (--eval-tokens)"
    if len({record.config.sequence_length for record in records}) > 1:
        return "the runs have different contexts"
    return None


def losses(records: list[Record], x: str) -> list[tuple[float, list[float | None]]]:
    """Validation losses at FRACTIONS of what all runs reached: (tokens or hours, a loss per run).

    Between two evaluations a loss lies on the straight line. [] if a run has none, or no times.
    """
    reached = [points.x[-1] for record in records if len((points := record.points("val_loss", x)).x)]
    if len(reached) < len(records) or min(reached) <= 0:
        return []
    places = [fraction * float(min(reached)) for fraction in FRACTIONS]
    return [(where, [record.at("val_loss", where, x) for record in records]) for where in places]


def summary(records: list[Record]) -> dict[str, Any]:
    """All of the comparison, as JSON types."""
    grouped, reason, differences = groups(records), obstacle(records), differing(records)
    tables = {name: [] if reason else losses(records, name) for name in ("tokens", "hours")}
    return {
        "runs": [_run(record) for record in records],
        "differences": differences,
        "losses_not_comparable": reason,
        "loss_at_equal_tokens": [{"tokens": where, "val_loss": found} for where, found in tables["tokens"]],
        "loss_at_equal_time": [{"hours": where, "val_loss": found} for where, found in tables["hours"]],
        "groups": [_group(group, differences) for group in grouped],
        "tests": [
            _test(axis, table[-1], grouped[0], other)
            for axis, table in tables.items()
            if table
            for other in grouped[1:]
        ],
    }


def _run(record: Record) -> dict[str, Any]:
    val = record.points("val_loss").y
    return {
        "run": record.run,
        "label": record.label,
        "unit": record.unit,
        "steps": record.steps(),
        "num_steps": record.config.num_steps,
        "tokens": record.last("tokens"),
        "hours": record.last("hours"),
        "val_loss": float(val[-1]) if len(val) else None,
        "best_val_loss": float(val.min()) if len(val) else None,
        "tokens_per_s": record.median("tokens_per_s"),
        "mfu": record.median("mfu"),
        "peak_gib": max(record.points("peak_gib").y, default=None),
        "seconds": record.seconds(),
        "settings_changed_at": record.changed_at,
        "damaged_rows": record.damaged,
    }


def _group(group: Group, differences: dict[str, list[Any]]) -> dict[str, Any]:
    """Numbers of its runs, from 1, and in which settings they are alike and differ from other runs."""
    first = {name: values[group.members[0]] for name, values in differences.items() if name != "seed"}
    alike = {
        name: value
        for name, value in first.items()
        if {str(differences[name][n]) for n in group.members} == {str(value)}
    }
    same = [[number + 1 for number in members] for members in group.alike()]
    return {"name": group.name, "runs": [number + 1 for number in group.members], "settings": alike, "same_seed": same}


def _test(axis: str, row: tuple[float, list[float | None]], a: Group, b: Group) -> dict[str, Any]:
    where, values = row
    sides = [group.sample(values) for group in (a, b)]
    found = welch.difference(*sides)
    fields = {"groups": [a.name, b.name], axis: where, "n": [len(side) for side in sides]}
    if found is None:
        return fields
    return fields | found._asdict() | {"level": welch.LEVEL, "is_more_than_noise": found.is_more_than_noise}


def as_json(records: list[Record]) -> str:
    """The comparison as one JSON object."""
    return json.dumps(summary(records), indent=1, allow_nan=False, default=float)


# ---- In words -----------------------------------------------------------------------------------------------------


def as_text(records: list[Record]) -> str:
    """The comparison as tables of at most 80 columns, if the runs are few."""
    found, units = summary(records), [record.unit for record in records]
    unit = units[0]
    lines = ["runs"]
    for number, run in enumerate(found["runs"], start=1):
        final = "no validation yet" if run["val_loss"] is None else f"validation loss {run['val_loss']:.4f}"
        lines.append(f"  {number}  {run['label']}: {run['steps']:,} of {run['num_steps']:,} steps, {final}")
        if run["settings_changed_at"]:
            steps = ", ".join(f"{step:,}" for step in run["settings_changed_at"])
            lines.append(f"     its settings changed at step {steps}; those of its end are compared")
        if run["damaged_rows"]:
            lines.append(f"     {left_out(run['damaged_rows'])}")
    settings = {name: [setting(value) for value in values] for name, values in found["differences"].items()}
    lines += _table("settings that differ", settings, len(records))
    if found["losses_not_comparable"] is not None:
        lines += ["", f"validation losses are not compared: {found['losses_not_comparable']}"]
    else:
        lines += _losses(found, unit, len(records))
    rates = [run["tokens_per_s"] for run in found["runs"]]
    speed: dict[str, list] = {f"{unit}s/s, median": rates}
    if len(set(units)) > 1:
        each = [None if rate is None else f"{rate:,.0f} {unit}s" for rate, unit in zip(rates, units, strict=True)]
        speed = {"per second, median": each}
    speed |= {"model FLOPs utilisation": [run["mfu"] for run in found["runs"]]}
    speed |= {"peak memory, GiB": [_gib(run["peak_gib"]) for run in found["runs"]]}
    times = [run["hours"] for run in found["runs"]]
    speed |= {"training time": [None if hours is None else words(3600 * hours) for hours in times]}
    speed = {name: values for name, values in speed.items() if any(value is not None for value in values)}
    return "\n".join([*lines, *_table("speed and memory", speed, len(records)), *_noise(found, unit)])


def _losses(found: dict, unit: str, count: int) -> list[str]:
    tokens = {f"at {row['tokens']:,.0f} {unit}s": row["val_loss"] for row in found["loss_at_equal_tokens"]}
    hours = {f"at {words(3600 * row['hours'])} of training": row["val_loss"] for row in found["loss_at_equal_time"]}
    lines = _table(f"validation loss, nats per {unit}, at equal {unit}s", tokens, count)
    lines = lines or ["", "validation losses are not compared: a run has none yet"]
    lines += _table("and at equal training time (step_ms times steps, without evaluations)", hours, count)
    if tokens and not hours:
        lines += ["", "nothing is compared at equal time: a run has no step_ms in its rows"]
    return lines


def _noise(found: dict, unit: str) -> list[str]:
    """Which runs are alike, and what the tests say."""
    if len(found["groups"]) < 2:
        return ["", *_all_alike(found["groups"][0])]
    lines = ["", "is it more than noise? runs with equal settings but the seed are a group"]
    for one in found["groups"]:
        runs = f"run{'s' if len(one['runs']) > 1 else ''} {', '.join(map(str, one['runs']))}"
        alike = [f"{name} {setting(value)}" for name, value in one["settings"].items()]
        lines.append(f"  {one['name']}: {runs}; {few(alike, 3)}")
        lines += _same_seed(one)
    for test in found["tests"]:
        where = f"{test['tokens']:,.0f} {unit}s" if "tokens" in test else f"{words(3600 * test['hours'])} of training"
        (a, b), n = test["groups"], test["n"]
        if "value" not in test:
            alone = [name for name, count in zip((a, b), n, strict=True) if count < 2]
            reason = f"{alone[0]} has one seed" if len(alone) == 1 else "one seed each"
            reason = reason if alone else "equal losses within each group"
            lines.append(f"  {b} - {a} at {where}: no statement about noise, {reason}")
            continue
        verdict = "more than noise" if test["is_more_than_noise"] else "no more than noise can be"
        lines.append(f"  {b} - {a} at {where}: {test['value']:+.4f}, standard error {test['error']:.4f},")
        p = "p < 0.001" if test["p"] < 0.001 else f"p = {test['p']:.3f}"
        lines.append(f"    95% interval {test['low']:+.4f} to {test['high']:+.4f}: {verdict}")
        lines.append(f"    (Welch's t-test, {test['df']:.1f} degrees of freedom, {p})")
    return lines


def _all_alike(group: dict) -> list[str]:
    """What runs show that are one group."""
    same = group["same_seed"]
    if same and len(same[0]) == len(group["runs"]):
        return ["all runs have equal settings and one seed: they show no noise, and no difference"]
    return ["all runs have equal settings but the seed: they show the noise, and no difference", *_same_seed(group)]


def _same_seed(group: dict) -> list[str]:
    return [f"     runs {', '.join(map(str, runs))} have the same seed: they count once" for runs in group["same_seed"]]


def left_out(damaged: int) -> str:
    """How many lines of a run's rows are no rows."""
    return f"{damaged:,} damaged line{' of metrics.jsonl is' if damaged == 1 else 's of metrics.jsonl are'} left out"


def _table(title: str, rows: dict[str, list[Any]], count: int) -> list[str]:
    """A title, the numbers of the runs, a line per row; a value per line where that is too wide. [] without rows."""
    if not rows:
        return []
    cells = {name: [_cell(value) for value in values] for name, values in rows.items()}
    first = max(map(len, cells)) + 2
    width = max(len(cell) for values in cells.values() for cell in values) + 2
    fits = first + width * count <= WIDTH
    wide = {name for name, values in cells.items() if not fits and max(map(len, values)) + 2 > (WIDTH - first) // count}
    kept = [len(cell) for name, values in cells.items() if name not in wide for cell in values]
    width = max([*kept, 1]) + 2
    lines = ["", title, " " * (first + 2) + "".join(f"{number:>{width}}" for number in range(1, count + 1))]
    for name, values in cells.items():
        if name in wide:
            lines += [f"  {name}", *(f"    {number}: {cell}" for number, cell in enumerate(values, start=1))]
        else:
            lines.append(f"  {name:<{first}}" + "".join(f"{cell:>{width}}" for cell in values))
    return lines


def setting(value: Any) -> str:
    """The value of a setting in words."""
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def _gib(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 4  # a speed, or a loss
        return f"{value:,.{digits}f}" if abs(value) >= 0.001 else f"{value:.4g}"
    return "-" if value is None else str(value)
