"""The report of runs: one HTML file with curves, samples, settings, speed and this machine's facts.

It needs no network and no server: style, script, data and the library that draws (uPlot, MIT
licence) are in it. What comes from a run reaches it through `escape` or as JSON without a "<".
"""

import datetime
import functools
import html
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from engine import durable, system
from engine.comparison import compare
from engine.comparison.records import AXES, PARTS, SCORES, Record, check_tokenizers
from engine.comparison.references import NOTE, Reference
from engine.errors import BadInput
from engine.run import rows
from engine.run.progress import words
from engine.run.repair import SAMPLE_HEADING
from model.files import few

ASSETS = Path(__file__).parent / "assets"
MOST_POINTS = 2000  # of a curve; more rows than that are averaged over neighbours
MOST_SAMPLES, LONGEST_SAMPLE = 200, 8000  # samples of a run, bytes of one
OFTEN = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "mfu",
)  # columns of rows of training; of evaluations: val_loss, SCORES
PRIVATE = ("caches", "disks", "interfaces", "gloo", "nccl", "packages")  # of doctor's facts: paths and addresses
LABELS = {
    "loss": "train",
    "val_loss": "validation",
    "lr": "rate",
    "grad_norm": "norm",
    "tokens_per_s": "speed",
    "mfu": "MFU",
    "hellaswag_acc_norm": "HellaSwag, by length",
    "hellaswag_acc": "HellaSwag",
    "lambada_acc": "LAMBADA",
}
NAMES = {"adamw": "AdamW", "muon": "Muon"}


def write(records: list[Record], references: list[Reference], out: Path) -> Path:
    """Writes the page of these runs. Returns its path.

    Raises BadInput if it cannot be written, or the runs have no unit in common.
    """
    check_tokenizers(records, "report")
    try:
        durable.write(out, page(records, references).encode(errors="replace"))
    except OSError as error:
        raise BadInput(
            f"report: --out must be a file that can be written, got {out}: {system.reason(error)}; "
            f"{system.advice(error, 'another --out')}"
        ) from error
    return out


def page(records: list[Record], references: list[Reference]) -> str:
    """The page as text."""
    is_one = len(records) == 1
    samples, notes = zip(*(read_samples(record.run) for record in records), strict=True)
    parts = {
        "title": escape(records[0].label if is_one else f"{len(records)} runs compared"),
        "lead": escape(_lead(records)),
        "kind": "one" if is_one else "several",
        "unit": records[0].unit,
        "notes": "".join(
            f'<p class="note">{escape(note)}</p>' for note in [*_notes(records, references), *filter(None, notes)]
        ),
        "summary": _tiles(records[0]) if is_one else _runs(records),
        "sections": _comparison(records) + _time(records) + _settings(records) + _machine(records[0]),
        "footer": escape(_footer(records)),
        "data": as_json(data(records, references, samples)),
        "uplot_css": (ASSETS / "uPlot.min.css").read_text(),
        "uplot_js": (ASSETS / "uPlot.iife.min.js").read_text(),
        "css": (ASSETS / "report.css").read_text(),
        "js": (ASSETS / "report.js").read_text(),
    }
    template = (ASSETS / "report.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)  # in one pass: no part is read again


def escape(text: Any) -> str:
    """Text as HTML that shows it, in an element or in an attribute."""
    return html.escape(str(text), quote=True)


def as_json(value: Any) -> str:
    """JSON that can stand in a script element: it holds no "<", so it cannot end it, and no NaN."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# ---- What the script draws ----------------------------------------------------------------------------------------


def data(records: list[Record], references: list[Reference], samples: tuple[list[tuple[int, str]], ...]) -> dict:
    """Curves and samples, as JSON types."""
    unit, scores = records[0].unit, [name for name in SCORES if any(len(r.points(name, "steps").x) for r in records)]
    nats = f"nats per {unit}"
    charts = [{"title": "Loss", "note": nats, "names": ["loss", "val_loss"], "tall": True}]
    if len(records) > 1:
        charts = [
            {"title": "Validation loss", "note": nats, "names": ["val_loss"], "tall": True},
            {"title": "Training loss", "note": nats, "names": ["loss"], "tall": True},
        ]
    charts += [{"title": LABELS[name], "note": "accuracy", "names": [name]} for name in scores]
    charts += [
        {"title": "Learning rate", "note": "of AdamW", "names": ["lr"], "floor": 0},
        {"title": "Gradient norm", "note": "before clipping", "names": ["grad_norm"], "floor": 0},
        {"title": "Speed", "note": f"{unit}s per second", "names": ["tokens_per_s"], "floor": 0},
        {"title": "Utilisation", "note": "of the peak FLOP/s (MFU)", "names": ["mfu"], "floor": 0},
    ]
    longest = max(len(record.points("loss", "steps").x) for record in records)
    nothing = dict.fromkeys(AXES, "No row of metrics.jsonl has a value to draw yet.")
    if longest:
        nothing["hours"] = "No row of metrics.jsonl has step_ms: there are no times."
    return {
        "unit": unit,
        "labels": LABELS,
        "smooth": max(1, min(50, longest // 20)),
        "charts": charts,
        "nothing": nothing,
        "runs": [
            {"label": _clean(record.label), "tables": tables(record), "samples": [[at, text] for at, text in found]}
            for record, found in zip(records, samples, strict=True)
        ],
        "references": [_reference(reference) for reference in references],
    }


def tables(record: Record) -> list[dict[str, Any]]:
    """Columns of the rows of training and of the evaluations, each of at most MOST_POINTS rows."""
    found = []
    for names, is_sparse in ((OFTEN, False), (("val_loss", *SCORES), True)):
        held = [name for name in names if len(record.points(name, "steps").x)]
        if not held:
            continue
        kept = np.any([np.isfinite(record.columns[name]) for name in held], axis=0)
        if not is_sparse:  # a loss of null, which diverged, is a gap
            kept |= np.isfinite(record.columns["lr"])
        columns = {name: _thinned(record.columns[name][kept]) for name in (*AXES, *held)}
        found.append({"is_sparse": is_sparse} | columns)
    return found


def _thinned(values: np.ndarray) -> list[float | None]:
    """At most MOST_POINTS means of as many neighbours; None for what is no number."""
    values = np.where(np.abs(values) < 1e30, values, np.nan)
    each = -(-len(values) // MOST_POINTS)
    if each > 1:
        padded = np.append(values, np.full(-len(values) % each, np.nan)).reshape(-1, each)
        counts = np.isfinite(padded).sum(axis=1)
        values = np.where(counts > 0, np.nansum(padded, axis=1) / np.maximum(counts, 1), np.nan)
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | int | None:
    """A value in as few digits as a picture needs."""
    if value != value:  # NaN
        return None
    return int(value) if value == int(value) else float(f"{value:.7g}")


def _reference(reference: Reference) -> dict[str, Any]:
    label = f"{reference.label}: {reference.validation_set} ({reference.source})"
    curve = {name: [at for at, _ in reference.over(name)] for name in AXES}
    return {"label": label, "level": reference.level, "loss": [loss for *_, loss in reference.points]} | curve


def read_samples(run: str) -> tuple[list[tuple[int, str]], str | None]:
    """((step, text), ...) of a run's samples.txt, and a note if it cannot be read. Keeps MOST_SAMPLES, evenly."""
    path, found = Path(run) / rows.SAMPLES_FILE, {}
    try:
        step = None
        for line in rows.lines(path):
            if heading := SAMPLE_HEADING.fullmatch(line.text):
                step = int(heading[1])
                found[step] = b""
            elif step is not None and len(found[step]) < LONGEST_SAMPLE:
                found[step] += line.text
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"{path} cannot be read: {error.strerror or error}."
    steps = sorted(found)
    places = (
        np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_SAMPLES)).round().astype(int)) if steps else []
    )
    return [(steps[n], found[steps[n]][:LONGEST_SAMPLE].decode(errors="replace").strip("\n")) for n in places], None


def _clean(text: str) -> str:
    """A name of a file that bytes which are no UTF-8 may be in."""
    return text.encode(errors="replace").decode()


# ---- What stands in the page --------------------------------------------------------------------------------------


def _lead(records: list[Record]) -> str:
    if len(records) > 1:
        return few([record.label for record in records], 8)
    config = records[0].config
    return (
        f"GPT-2 with {config.model.n_layer} layers, width {config.model.n_embd}, context {config.sequence_length}; "
        f"{config.tokens_per_step:,} {records[0].unit}s per step of {NAMES[config.optim.name]}, on {config.data}"
    )


def _notes(records: list[Record], references: list[Reference]) -> list[str]:
    notes = []
    for record in records:
        if not record.steps() and not len(record.columns["steps"]):
            notes.append(f"{record.label} has no rows yet.")
        if record.damaged:
            notes.append(f"{record.label}: {compare.left_out(record.damaged)}.")
        if record.changed_at:
            steps = ", ".join(f"{step:,}" for step in record.changed_at)
            notes.append(f"{record.label} changed its settings at step {steps}; those of its end are shown.")
        if (each := -(-len(record.columns["steps"]) // MOST_POINTS)) > 1:
            notes.append(f"{record.label}: a point is the mean of up to {each} rows.")
    if len(records) > 1 and (reason := compare.obstacle(records)) is not None:
        notes.append(f"The validation losses do not compare: {reason}.")
    return [*notes, *([f"{NOTE[0].upper()}{NOTE[1:]}."] if references else [])]


def _facts(record: Record) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what a run came to."""
    val, unit, speed = record.points("val_loss", "steps"), record.unit, record.median("tokens_per_s")
    steps, memory, hours = record.steps(), record.points("peak_gib", "steps").y, record.last("hours")
    scores = [(LABELS[name], record.last(name)) for name in SCORES]
    loss, remark = ("-", "not evaluated yet") if not len(val.y) else (f"{val.y[-1]:.4f}", "the lowest")
    if len(val.y) and (lowest := int(np.argmin(val.y))) != len(val.y) - 1:
        remark = f"lowest {val.y[lowest]:.4f} at {val.x[lowest]:,.0f}"
    found = [
        ("Validation loss", loss, remark),
        ("Steps", f"{steps:,}", f"of {record.config.num_steps:,}"),
        (f"Training {unit}s", f"{record.last('tokens') or 0:,.0f}", ""),
        ("Training time", "-" if hours is None else words(3600 * hours), "without evaluations"),
        ("Speed", "-" if speed is None else f"{speed:,.0f}", f"{unit}s/s, median"),
        ("Peak memory", f"{memory.max():.2f} GiB" if len(memory) else "-", "of rank 0"),
    ]
    if (mfu := record.median("mfu")) is not None:
        found.append(("Utilisation", f"{100 * mfu:.1f}%", "of the peak FLOP/s (MFU)"))
    return found + [(name, f"{100 * value:.2f}%", "last") for name, value in scores if value is not None]


def _tiles(record: Record) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in _facts(record)
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _runs(records: list[Record]) -> str:
    facts = [{name: (value, remark) for name, value, remark in _facts(record)} for record in records]
    names = list(dict.fromkeys(name for one in facts for name in one))
    units = {name: remark for one in facts for name, (_, remark) in one.items() if name in ("Speed", "Utilisation")}
    head = "".join(f"<th>{escape(name)}{escape(', ' + units[name] if name in units else '')}</th>" for name in names)
    body = ""
    for number, (record, one) in enumerate(zip(records, facts, strict=True)):
        cells = "".join(f"<td>{escape(one.get(name, ('-', ''))[0])}</td>" for name in names)
        body += f"<tr><th>{_dot(number)}{escape(record.label)}</th>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr><th>run</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _dot(number: int) -> str:
    return f'<span class="dot" style="background:var(--run{number % 8})"></span>'


def _comparison(records: list[Record]) -> str:
    """What differs first, then the words of gpt2 compare."""
    if len(records) == 1:
        return ""
    table = _table(compare.differing(records), records)
    text = escape(compare.as_text(records))
    title = f"Loss at equal {records[0].unit}s and at equal time, and whether it is more than noise"
    return f"<h2>Settings that differ</h2>{table}<details><summary>{title}</summary><pre>{text}</pre></details>"


def _table(settings: dict[str, list[Any]], records: list[Record]) -> str:
    if not settings:
        return "<p>None.</p>"
    head = "".join(f"<th>{_dot(number)}{escape(record.label)}</th>" for number, record in enumerate(records))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(compare.setting(value))}</td>' for value in values)}</tr>"
        for name, values in settings.items()
    )
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(records) > 1 else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _settings(records: list[Record]) -> str:
    found = [record.settings() for record in records]
    names = dict.fromkeys(name for one in found for name in one)
    table = _table({name: [one.get(name) for one in found] for name in names}, records)
    return f"<h2>Settings</h2><details><summary>All {len(names)} settings</summary>{table}</details>"


def _time(records: list[Record]) -> str:
    """A bar for each run of where its time went."""
    bars, used = "", {}
    for record in records:
        seconds = record.seconds()
        total = sum(seconds.values())
        used |= seconds
        if total:
            shares = [(name, 100 * seconds[name] / total) for name in PARTS.values() if name in seconds]
            bar = "".join(f'<div style="width:{share:.3f}%;background:var(--{name})"></div>' for name, share in shares)
            remark = f"{words(total)}: {', '.join(f'{name} {share:.1f}%' for name, share in shares)}"
            title = f"{escape(record.label)} <small>{escape(remark)}</small>"
            bars += f'<h3>{title}</h3><div class="split">{bar}</div>'
    if not bars:
        return ""
    keys = "".join(
        f'<span><i class="dot" style="background:var(--{name})"></i>{name}</span>'
        for name in PARTS.values()
        if name in used
    )
    return f'<h2>Where the time went</h2><p class="keys">{keys}</p>{bars}'


def _machine(record: Record) -> str:
    text = escape(doctor_facts(record))
    return (
        "<h2>Machine</h2><details><summary>gpt2 doctor on the machine that wrote this report, now; not necessarily "
        f"the one that trained</summary><pre>{text}</pre></details>"
    )


def doctor_facts(record: Record) -> str:
    """What `gpt2 doctor` prints here for the model of a run, without paths and addresses."""
    from engine.checks import doctor, selfcheck

    try:
        recall = functools.partial(selfcheck.recall_for, record.config)
        found = doctor.report(record.config.model.head_dim, "auto", recall)
        return found._replace(facts=[fact for fact in found.facts if fact.key not in PRIVATE]).text()
    except BadInput as error:
        return str(error)


def _footer(records: list[Record]) -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    version = importlib.metadata.version("gpt2-engine")
    source = f" from {records[0].run}" if len(records) == 1 else ""
    return f"Written {now}{source} by gpt2 report, gpt2-engine {version}. Curves are drawn by uPlot."
