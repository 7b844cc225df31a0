"""README's tables, made from what bench/results holds: `python -m bench.report [--check]`.

Between `<!-- bench:NAME -->` and `<!-- /bench -->` the README holds the table NAME; this program writes them all again.
What was not measured is said to be so. --check changes nothing and ends with 1 if a table is not what it would be.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import machine

README = machine.ROOT / "README.md"
REGION = re.compile(r"(<!-- bench:([a-z_]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOT_MEASURED = "not yet measured"
HEADLINE = "H200"  # the GPU of the goals
PEERS = {"reference": "plain PyTorch", "transformers": "`transformers`"}
# Others' figures for GPT-2 124M at T = 1,024, per GPU; none measured here.
PUBLISHED = (
    ("starting recipe, fp16", "RTX A6000", "61,700", "34%", "its TensorBoard log"),
    ("nanoGPT", "A100", "91,000", "25%", "its README"),
    ("llm.c", "A100", "218,000", "60%", "`scripts/run_gpt2_124M.sh`"),
    ("PyTorch trainer of modded-nanogpt's track 3, another architecture", "H100", "443,000", "", "its logs"),
    ("llm.c", "H100", "468,000", "40.5%", "modded-nanogpt's records, 2024-10-13"),
)


def results(name: str) -> list[tuple[str, dict]]:
    """(directory, content) of every result file of that name."""
    paths = sorted(machine.RESULTS.glob(f"*/{name}"))
    return [(path.parent.name, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def markdown(heads: list[str], rows: list[tuple]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gpu() -> str:
    """GPT-2 124M on GPUs: what was measured here, or that nothing was, and what others published."""
    rows = []
    for directory, found in results("gpu.json"):
        device = found["machine"].get("gpu", directory)
        for row in found["rows"]:
            if row["section"] == "step" and row["status"] == "measured":
                who, mode = row["contestant"].split()
                title = PEERS.get(who, f"**this engine** on {who.capitalize()}")
                mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
                what = f"{title}, {row['precision']}, {mode}, B = {row['batch']}"
                rows.append((what, device, f"{row['tokens_per_s']:,.0f}", mfu, "measured: `python -m bench.gpu`"))
    if not rows:
        rows = [("**this engine**, bf16", HEADLINE, NOT_MEASURED, NOT_MEASURED, "`python -m bench.gpu --out DIR`")]
    return markdown(["GPT-2 124M, T = 1,024", "GPU", "tokens/s per GPU", "MFU", "source"], [*rows, *PUBLISHED])


def cpu() -> str:
    """Each case of bench.peers in a line: ours, the fastest peer, and how they compare."""
    from bench.peers import CEILING_GOAL, MEMORY_GOAL, best_of  # one definition of the goals

    rows, notes = [], []
    for _, found in results("peers.json"):
        cases: dict[tuple[str, str], list[dict]] = {}
        for row in found["rows"]:
            if row["status"] == "measured":
                cases.setdefault((row["case"], row["precision"]), []).append(row)
        for (case, precision), measured in cases.items():
            peers = [r for r in measured if r["contestant"] != "ours"]
            fastest, leanest = min(peers, key=milliseconds), min(peers, key=lambda r: r["step_bytes"])
            for ours in best_of([r for r in measured if r["contestant"] == "ours"]):
                is_kept, speed = ours["memory"] == "kept", ours["speed"]
                like = fastest if is_kept else min((r for r in peers if r["memory"] != "kept"), key=milliseconds)
                ratio = f"**{speed['median']:.2f}x** ({speed['min']:.2f} to {speed['max']:.2f})"
                rows.append(
                    (
                        f"{case}, {precision}" if is_kept else "all without memory kept",
                        f"{milliseconds(ours):,.0f}",
                        f"{milliseconds(like):,.0f} ({title(like)})",
                        ratio if is_kept else f"{milliseconds(like) / milliseconds(ours):.2f}x",
                        f"{ours['share_of_ceiling']:.0%}",
                        f"{ours['step_bytes'] / 1e6:,.0f} / {leanest['step_bytes'] / 1e6:,.0f}",
                    )
                )
        facts = found["facts"]
        notes.append(f"{facts['machine']}, torch {facts['torch']}, transformers {facts['transformers']}")
    if not rows:
        return NOT_MEASURED
    heads = ["step of", "ours, ms", "fastest peer, ms", "speed", "of matmul ceiling", "memory, MB: ours / leanest peer"]
    goals = f"the goals are 1.0x, {CEILING_GOAL:.0%} and {MEMORY_GOAL}"
    return markdown(heads, rows) + f"\n\n({'; '.join(notes)}; `python -m bench.peers`; {goals})"


def scaling() -> str:
    """Each way and number of processes of bench.scaling in a line."""
    rows, notes = [], []
    for _, found in results("scaling.json"):
        for row in found["rows"]:
            if row["processes"] == 1:
                continue
            counted, predicted = row["bytes_counted"], row["bytes_predicted"]
            ratio = [row[f"predicted_over_measured{end}"] for end in ("", "_p20", "_p80")]
            rows.append(
                (
                    row["processes"],
                    row["parallel"],
                    f"{row['step_ms']:,.0f}",
                    f"{row['compute_ms']:,.0f}",
                    f"{counted / 1e6:,.3f} {'=' if row['is_equal'] else '!='} {predicted / 1e6:,.3f}",
                    f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})",
                )
            )
        facts, model = found["facts"], found["model"]
        tokens = model["sequences"] * model["n_positions"]
        notes.append(
            f"{facts['machine']}, torch {facts['torch']}, gloo, `{model['name']}` with {tokens} tokens on each "
            "process, one thread each, so that four share the cores of two"
        )
    if not rows:
        return NOT_MEASURED
    heads = ["processes", "parallel", "step, ms", "without sync, ms", "MB per step, counted and computed"]
    return (
        markdown([*heads, "step, predicted / measured"], rows) + f"\n\n({'; '.join(notes)}; `python -m bench.scaling`)"
    )


def milliseconds(row: dict) -> float:
    """A row's median step."""
    return row["step_ms"]["median"]


def title(row: dict) -> str:
    """A peer and its mode in words."""
    return f"{PEERS[row['contestant']]} {row['mode']}" + (", memory kept" if row["memory"] == "kept" else "")


TABLES: dict[str, Callable[[], str]] = {"gpu": gpu, "cpu": cpu, "scaling": scaling}


def rewritten(text: str) -> str:
    """The text with every table made again. Raises ValueError if a marker names no table."""

    def region(found: re.Match) -> str:
        begin, name, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"report: a table must be one of {', '.join(TABLES)}, got {name!r}; mend the marker")
        return f"{begin}{TABLES[name]()}\n{end}"

    return REGION.sub(region, text)


def main(arguments: list[str] | None = None, readme: Path = README) -> int:
    """Writes the tables, or checks them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a table is out of date")
    args = parser.parse_args(arguments)
    before = readme.read_text(encoding="utf-8")
    try:
        after = rewritten(before)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.check:
        if after != before:
            print(
                "report: README's tables must be what bench/results gives; run python -m bench.report", file=sys.stderr
            )
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
