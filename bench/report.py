"""The tables of README.md and docs/*.md, made from what bench/results holds: `python -m bench.report [--check]`.

Between `<!-- bench:NAME -->` and `<!-- /bench -->` such a file holds the table NAME. --check changes nothing. Exit
codes: 0 done, 1 a table is out of date or stands in no file, 2 a marker names no table.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import machine, results, tables
from bench.results import Figure, Row, exact
from engine.durable import write

REGION = re.compile(r"(<!-- bench:([a-z_]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOT_MEASURED = "not yet measured"
HEADLINE = "H200"  # the GPU of the goals
GOAL_CASE = "L=4 C=256 T=256 B=8 fp32"  # the CPU's
SPEED, CEILING, MEMORY = 1.1, 0.85, 0.5  # the CPU's goals: times the fastest peer, of the ceiling, of the leanest peer
COMPILED = ("ours compiled", "reference compiled", "transformers compiled")  # the rest stand in docs/benchmarks.md
STEP = ("step", "tokens", "mfu", "step memory", "time / ours", "loss difference")
OP = ("forward", "backward", "forward_no_grad", "both", "both of ceiling", "peak memory", "error", "rate")
TITLES = {"ours": "this engine", "reference": "plain PyTorch", "transformers": "`transformers`"}
TRACK_3 = "modded-nanogpt, track 3 log, 2026-05, torch 2.11"
OTHER_MODEL = "plain PyTorch trainer, another model with GPT-2's FLOPs per token"
# Others' figures per GPU at T = 1,024, of GPT-2 124M unless said otherwise; none measured here. README has the first.
PUBLISHED = (
    (OTHER_MODEL, "1 x H200", "489,700", "42.4%", TRACK_3),
    ("llm.c", "8 x H100", "468,000", "40.5%", "modded-nanogpt records, 2024-10-13"),
    ("GPT-2 124M in PyTorch: bf16, SDPA, compile, fused AdamW", "8 x H100", "380,800", "33%", "a write-up of 2025-07"),
    ("the recipe this project starts from, fp16", "2 x RTX A6000", "61,700", "34%", "its TensorBoard log"),
    (OTHER_MODEL, "8 x H200", "455,700", "39.4%", TRACK_3),
    (OTHER_MODEL, "8 x H100", "448,400", "38.8%", TRACK_3),
    (OTHER_MODEL, "8 x H100", "443,000", "", "modded-nanogpt, track 3 logs, earlier"),
    ("llm.c", "8 x A100-80", "218,000", "60%", "`scripts/run_gpt2_124M.sh`"),
    ("nanoGPT, compile", "A100-40", "91,000", "25%", "its README"),
)
SHORT = 4  # rows of PUBLISHED in README; all stand in docs/benchmarks.md
HEADS = ["T = 1,024", "GPU", "tokens/s per GPU", "MFU", "source"]


def found(name: str) -> Iterator[tuple[Path, dict[str, str], list[Row]]]:
    """(path, facts, rows) of every result file of that name."""
    for path in sorted(machine.RESULTS.glob(f"*/{name}")):
        yield path, *results.read(path)


def note(facts: dict[str, str], command: str, *more: str) -> str:
    """The line under a table: where its figures come from."""
    versions = [f"{package} {facts[package]}" for package in ("torch", "transformers") if package in facts]
    return f"\n\n({', '.join([facts['machine'], *versions, *more])}; `python -m {command}`)"


def chip(gpu: str) -> str:
    """H100 of "NVIDIA H100 80GB HBM3"."""
    return found[0] if (found := re.search(r"\b[A-Z]+\d+\b", gpu)) else gpu.split()[-1]


def gpu() -> str:
    """GPT-2 124M on GPUs: what was measured here, or that nothing was, and what others published."""
    rows = []
    for _, facts, measured in found("gpu.json"):
        for row in measured:
            shown = COMPILED if chip(facts["gpu"]) == HEADLINE else COMPILED[:1]  # the rest stand in gpu_all
            if row.case == "gpt2 B=64 bf16" and row.peer in shown and row.status == "measured":
                who, *how = row.peer.split(" ", 1)
                title = "**this engine**" if who == "ours" else TITLES[who]
                what = f"{title}, {row.facts['precision']}, {' '.join(how)}, B = {row.facts['batch']}"
                tokens = f"{row.value('tokens'):,.0f}"
                mfu = tables.amount(row.value("mfu"), "%") if "mfu" in row.figures else ""
                rows.append((what, f"1 x {chip(facts['gpu'])}", tokens, mfu, "measured: `python -m bench.gpu`"))
    if not rows:
        rows = [("**this engine**, bf16", HEADLINE, NOT_MEASURED, NOT_MEASURED, "`python -m bench.gpu --out DIR`")]
    return tables.markdown(HEADS, [*rows, *PUBLISHED[:SHORT]])


def published() -> str:
    """What others published, all of it."""
    return tables.markdown(HEADS, list(PUBLISHED))


def gpu_all() -> str:
    """All steps, ops and ceilings that bench.gpu measured."""
    parts = []
    for _, facts, rows in found("gpu.json"):
        rows = [row for row in rows if row.status == "measured"]
        parts.append(tables.of([row for row in rows if row.section == "step"], STEP))
        parts.append(tables.of([row for row in rows if row.section in ("ceilings", "ops")], OP))
        parts[-1] += note(facts, "bench.gpu")
    return "\n\n".join(parts) or NOT_MEASURED


def cpu() -> str:
    """The goal's case of bench.peers in two lines, malloc tuned and not."""
    parts = []
    for _, facts, rows in found("peers.json"):
        measured = [row for row in rows if row.case == GOAL_CASE]
        theirs = [row for row in measured if not row.peer.startswith("ours") and row.status == "measured"]
        lines = [cpu_line(ours, theirs) for ours in best_of(measured)]
        goal = f"goals: {SPEED}x the speed, {CEILING:.0%} of the ceiling, {MEMORY} of the memory"
        heads = ["step of", "ours", "fastest peer", "speed", "of matmul ceiling", "step memory: ours / leanest peer"]
        parts += [tables.markdown(heads, lines) + note(facts, "bench.peers", goal)] if lines else []
    return "\n\n".join(parts) or NOT_MEASURED


def best_of(rows: Sequence[Row]) -> list[Row]:
    """Our fastest row with malloc tuned, and without."""
    ours = [row for row in rows if row.peer.startswith("ours") and row.status == "measured"]
    both = ([row for row in ours if row.peer.endswith("malloc tuned") == is_tuned] for is_tuned in (True, False))
    return [min(some, key=lambda row: row.value("step")) for some in both if some]


def cpu_line(ours: Row, peers: list[Row]) -> tuple[str, ...]:
    """One of our rows against the fastest and the leanest peer; where malloc is as it comes, it is so for all."""
    is_tuned = ours.peer.endswith("malloc tuned")
    like = [row for row in peers if is_tuned or not row.peer.endswith("malloc tuned")]
    fastest, leanest = (min(some, key=lambda r: r.value(n)) for some, n in ((like, "step"), (peers, "step memory")))
    speed = tables.cell(ours, "speed")
    who, how = fastest.peer.split(" ", 1)
    return (
        f"{ours.case}, {'malloc tuned' if is_tuned else 'malloc as it comes'}",
        tables.cell(ours, "step"),
        f"{tables.cell(fastest, 'step')} ({TITLES[who]} {how})",
        f"**{speed}**" if is_tuned else tables.amount(fastest.value("step") / ours.value("step"), "x"),
        tables.cell(ours, "of ceiling"),
        f"{tables.cell(ours, 'step memory')} / {tables.cell(leanest, 'step memory')}",
    )


def peers() -> str:
    """All that bench.peers measured."""
    names = ("step", "tokens", "of ceiling", "step memory", "time / ours", "speed", "loss")
    parts = [tables.of(rows, names) + note(facts, "bench.peers") for _, facts, rows in found("peers.json")]
    return "\n\n".join(parts) or NOT_MEASURED


def scaling() -> str:
    """Each way and number of processes of bench.scaling in a line."""
    parts = []
    for _, facts, rows in found("scaling.json"):
        for row in rows:
            sizes = [f"{row.value(name) / 1e6:,.3f}" for name in ("bytes counted", "bytes computed")]
            row.note = f"{sizes[0]} MB {'=' if row.status == 'measured' else '!='} {sizes[1]} MB"
        each = f"`{facts['model']}` with {facts['tokens']} tokens on each process"
        table = tables.of(rows, ("step", "without sync", "tokens", "efficiency", "per core", "calls counted"))
        parts.append(table + note(facts, "bench.scaling", f"gloo, {each}; note: bytes counted = computed"))
    return "\n\n".join(parts) or NOT_MEASURED


def learning() -> str:
    """Each recipe of bench.learning in a line, with intervals of 95%."""
    studies = [(facts, [row for row in rows if row.section == "learning"]) for _, facts, rows in found("learning.json")]
    parts = [tables.of(rows) + note(facts, "bench.learning") for facts, rows in studies]
    return "\n\n".join(parts) or NOT_MEASURED


def suites() -> str:
    """Each case of the pytest-benchmark suites in a line."""
    parts = []
    for path in sorted(machine.RESULTS.glob("*/bench.json")):
        content, rows = json.loads(path.read_text(encoding="utf-8")), []
        for each in content["benchmarks"]:
            case, stats, info = each["name"].removeprefix("test_"), each["stats"], each["extra_info"]
            rows.append(Row("suites", case, "", note=info.get("note", "")))
            time = Figure(stats["median"], "s", stats["q1"], stats["q3"], stats["rounds"])
            figures = {
                key: exact(info[key]["value"], info[key]["unit"]) for key in ("throughput", "peak") if key in info
            }
            rows[-1].figures = {"median (quartiles)": time, **figures}
        facts = content["machine_info"]
        parts.append(tables.of(rows) + note(facts, facts["command"].removeprefix("python -m ")))
    return "\n\n".join(parts) or NOT_MEASURED


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (gpu, gpu_all, published, cpu, peers, scaling, suites, learning)
}


def rewritten(text: str) -> str:
    """The text with every table made again. Raises ValueError if a marker names no table."""

    def region(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"report: a table must be one of {', '.join(TABLES)}, got {name!r}; mend the marker")
        return f"{begin}{TABLES[name]()}\n{end}"

    return REGION.sub(region, text)


def main(arguments: list[str] | None = None, root: Path = machine.ROOT) -> int:
    """Writes the tables, or checks them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a table is out of date")
    args = parser.parse_args(arguments)
    before = {path: path.read_text(encoding="utf-8") for path in (root / "README.md", *sorted(root.glob("docs/*.md")))}
    try:
        after = {path: rewritten(text) for path, text in before.items()}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    homeless = TABLES.keys() - {match[2] for text in before.values() for match in REGION.finditer(text)}
    if homeless:
        names = ", ".join(sorted(homeless))
        print(f"report: every table must stand in README.md or docs/*.md, {names} in none", file=sys.stderr)
    stale = [path for path in before if after[path] != before[path]]
    for path in stale:
        if not args.check:
            write(path, after[path])
            continue
        print(f"report: {path.name} must hold what bench/results gives; run python -m bench.report", file=sys.stderr)
    return int(bool(homeless or (args.check and stale)))


if __name__ == "__main__":
    sys.exit(main())
