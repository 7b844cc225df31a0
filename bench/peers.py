"""A training step here against a plain PyTorch GPT-2 and `transformers`, on a CPU: `python -m bench.peers`.

    python -m bench.peers [--case L,C,T,B ...] [--precision fp32] [--rounds 5] [--only NAME ...] [--save]

Each contestant lives in a process of its own, because peak memory belongs to the process, and waits while another
works. They begin with the same weights; first all make the same 50 updates of a small batch, and whose loss does not
agree with ours is not timed. Then, round by round, each is timed for one step in turn, between two measurements of the
machine's ceiling: the rate of a large matrix product. Ratios to our faster mode are taken within a round and reported
as their median, least and most.

"memory kept" is what this engine does on a CPU (engine.distributed.keep_freed_memory): glibc keeps freed memory. All
are timed both as they come and with it. Memory is that of the step: its peak above weights and optimizer state.
FLOPs are 6 (N - wpe) + 12 L C T per token (engine.metrics). --save writes peers.json to this machine's directory in
bench/results. Exit codes: 0 done, 1 a contestant failed or disagreed, 2 bad input.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from bench import machine
from model.presets import GPT2Config

CASES = ((4, 256, 256, 8), (4, 256, 256, 2), (4, 512, 256, 4), (6, 384, 512, 4))  # L, C, T, B; the first is the goal's
HEAD_DIM = 64
MODES = (False, True)  # eager, compiled
CONTESTANTS = (  # who, is compiled, keeps freed memory
    *(("ours", is_compiled, True) for is_compiled in MODES),
    ("ours", False, False),
    *(("reference", is_compiled, keeps) for keeps in (False, True) for is_compiled in MODES),
    *(("transformers", is_compiled, keeps) for keeps in (False, True) for is_compiled in MODES),
)
GOALS = {"fp32": 1.0, "bf16": 1.2}  # times the speed of the best peer
CEILING_GOAL, MEMORY_GOAL = 0.85, 0.5
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, after 50 updates
CEILING_SIZE = 2048  # of the square matrices whose product is the ceiling


@dataclass
class Contestant:
    """A process with one model in it, and what it said so far."""

    who: str
    is_compiled: bool
    keeps_memory: bool

    def __post_init__(self) -> None:
        self.row = {
            "contestant": self.who,
            "mode": "compiled" if self.is_compiled else "eager",
            "memory": "kept" if self.keeps_memory else "as it comes",
        }
        self.seconds: list[float] = []

    def __str__(self) -> str:
        return f"{self.who} {self.row['mode']}" + (", memory kept" if self.keeps_memory else "")

    def command(self, case: tuple[int, ...], precision: str) -> list[str]:
        """What starts the process."""
        facts = [self.who, int(self.is_compiled), int(self.keeps_memory), precision, *case]
        return [sys.executable, "-m", "bench.peer_worker", *map(str, facts)]

    def start(self, case: tuple[int, ...], precision: str) -> None:
        """Begins the process; it answers when it is asked."""
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (no pipe: nobody reads it as it fills)
        self.process = subprocess.Popen(
            self.command(case, precision),
            cwd=machine.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )

    def ask(self, what: str) -> dict:
        """The answer to a request. Raises RuntimeError with the end of what the process said, if it died."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            if answer := self.process.stdout.readline():
                return json.loads(answer)
        code = self.process.wait()
        self.said.seek(0)
        said = self.said.read().strip().splitlines()
        raise RuntimeError(f"the process ended with {code}: {said[-1] if said else 'no message'}")

    def stop(self) -> None:
        """Ends the process."""
        if hasattr(self, "process"):
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.said.close()


def config_of(case: tuple[int, ...]) -> GPT2Config:
    """The model of a case, with heads 64 wide and GPT-2's vocabulary."""
    L, C, T, _ = case
    return GPT2Config(n_layer=L, n_head=C // HEAD_DIM, n_embd=C, n_positions=T, init="gpt2")


def step_flops(case: tuple[int, ...]) -> int:
    """FLOPs of one step."""
    from engine.metrics import flops_per_token

    _, _, T, B = case
    return B * T * flops_per_token(config_of(case), T)


def measure(case: tuple[int, ...], precision: str, rounds: int, say, only: tuple[str, ...] = ()) -> list[dict]:
    """The rows of one case, ours first; of `only` these contestants, if any are named."""
    everyone = [Contestant(*facts) for facts in CONTESTANTS]
    field = [contestant for contestant in everyone if not only or str(contestant) in only]
    ready: list[Contestant] = []
    ceilings: list[float] = []
    try:
        ceiling = Contestant("ceiling", False, True)
        ceiling.start(case, precision)
        for contestant in field:
            contestant.start(case, precision)
            contestant.row |= {"case": name_of(case), "precision": precision, "status": "failed"}
            try:
                contestant.row |= contestant.ask("prepare")
            except RuntimeError as error:
                contestant.row["reason"] = str(error)
                say(f"{contestant}: FAILED: {error}")
                continue
            ours = field[0].row.get("loss_50", float("nan"))
            loss = contestant.row["loss_50"]
            if not abs(loss / ours - 1.0) <= LOSS_TOLERANCE[precision]:
                contestant.row["reason"] = f"its loss after 50 updates must be ours, {ours:.5f}, got {loss:.5f}"
                say(f"{contestant}: FAILED: {contestant.row['reason']}")
                continue
            contestant.row["status"] = "measured"
            ready.append(contestant)
            say(f"{contestant}: loss {loss:.5f}, {contestant.row['step_bytes'] / 1e6:,.0f} MB")
        for turn in range(rounds):
            ceilings.append(ceiling.ask("time")["seconds"])
            for contestant in ready[turn % 2 :] + ready[: turn % 2]:
                contestant.seconds.append(contestant.ask("time")["seconds"])
        ceilings.append(ceiling.ask("time")["seconds"])
    finally:
        for contestant in [*field, ceiling]:
            contestant.stop()
    return summarize(case, precision, field, ready, ceilings)


def summarize(case, precision: str, field, ready, ceilings: list[float]) -> list[dict]:
    """Fills in what the rounds say: medians with quartiles, and ratios to ours within each round."""
    flops, tokens = step_flops(case), case[2] * case[3]
    top = 2.0 * CEILING_SIZE**3 / statistics.median(ceilings)  # FLOP/s
    ours = min((c.seconds for c in ready if c.who == "ours"), key=statistics.median, default=None)
    fastest = min((c.seconds for c in ready if c.who != "ours"), key=statistics.median, default=None)
    for contestant in ready:
        median = statistics.median(contestant.seconds)
        contestant.row |= {
            "step_ms": spread([1e3 * seconds for seconds in contestant.seconds]),
            "tokens_per_s": tokens / median,
            "gflop_per_s": flops / median / 1e9,
            "ceiling_gflop_per_s": top / 1e9,
            "share_of_ceiling": flops / median / top,
        }
        if contestant.who == "ours" and fastest:
            contestant.row["speed"] = spread([f / s for f, s in zip(fastest, contestant.seconds, strict=True)])
        elif ours:
            contestant.row["times_ours"] = spread([s / o for s, o in zip(contestant.seconds, ours, strict=True)])
    return [contestant.row for contestant in field]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def name_of(case: tuple[int, ...]) -> str:
    """A case in words."""
    L, C, T, B = case
    return f"L={L} C={C} T={T} B={B}"


def table(rows: list[dict]) -> str:
    """The rows of one case in Markdown, and the goals."""
    lines = [
        f"{rows[0]['case']}, {rows[0]['precision']}",
        "",
        "| contestant | step ms (range) | tokens/s | of ceiling | memory MB | time / ours (range) | loss 50 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        title = f"{row['contestant']} {row['mode']}"
        title += ", memory kept" if row["memory"] == "kept" else ""
        if row["status"] != "measured":
            lines.append(f"| {title} | failed: {row.get('reason', '')} | | | | | |")
            continue
        ms, ratio = row["step_ms"], row.get("times_ours")
        times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        lines.append(
            f"| {title} | {ms['median']:,.0f} ({ms['min']:,.0f} to {ms['max']:,.0f}) | {row['tokens_per_s']:,.0f} | "
            f"{row['share_of_ceiling']:.0%} | {row['step_bytes'] / 1e6:,.0f} | {times} | {row['loss_50']:.5f} |"
        )
    return "\n".join([*lines, "", *verdicts(rows)])


def verdicts(rows: list[dict]) -> list[str]:
    """Each goal, what was measured, and whether it is met."""
    measured = [row for row in rows if row["status"] == "measured"]
    ours = [row for row in measured if row["contestant"] == "ours"]
    peers = [row for row in measured if row["contestant"] != "ours"]
    if not ours or not peers:
        return ["nothing to compare"]
    precision = rows[0]["precision"]
    leanest = min(peers, key=lambda row: row["step_bytes"])
    return [verdict(row, leanest, GOALS[precision]) for row in best_of(ours)]


def best_of(ours: list[dict]) -> list[dict]:
    """Our faster mode with freed memory kept, and without."""
    found = []
    for memory in ("kept", "as it comes"):
        rows = [row for row in ours if row["memory"] == memory]
        found += [min(rows, key=lambda row: row["step_ms"]["median"])] if rows else []
    return found


def verdict(ours: dict, leanest: dict, goal: float) -> str:
    """One of our modes against the goals, in a line."""
    speed, share, memory = ours["speed"], ours["share_of_ceiling"], ours["step_bytes"] / leanest["step_bytes"]

    def said(is_met: bool) -> str:
        return "met" if is_met else "not met"

    return (
        f"ours {ours['mode']}, memory {ours['memory']}: {speed['median']:.2f}x the speed of the fastest peer "
        f"({speed['min']:.2f} to {speed['max']:.2f}), the goal is {goal:.1f}: {said(speed['median'] >= goal)}; "
        f"{share:.0%} of {ours['ceiling_gflop_per_s']:.0f} GFLOP/s, the goal is {CEILING_GOAL:.0%}: "
        f"{said(share >= CEILING_GOAL)}; {memory:.2f} of the leanest peer's memory, the goal is {MEMORY_GOAL}: "
        f"{said(memory <= MEMORY_GOAL)}"
    )


def case_of(text: str) -> tuple[int, ...]:
    """L,C,T,B as four numbers. Raises argparse.ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        case = tuple(int(part) for part in text.split(","))
        if len(case) == 4 and min(case) > 0 and case[1] % HEAD_DIM == 0:
            return case
    raise argparse.ArgumentTypeError(f"must be L,C,T,B, with C a multiple of {HEAD_DIM}, got {text!r}")


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table per case, and with --save writes them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=case_of, nargs="+", default=CASES, metavar="L,C,T,B", help="what to train")
    parser.add_argument("--precision", choices=GOALS, default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contestant")
    names = [str(Contestant(*facts)) for facts in CONTESTANTS]
    parser.add_argument("--only", choices=names, nargs="+", default=(), metavar="NAME", help="; ".join(names))
    parser.add_argument("--save", action="store_true", help=f"write {machine.slug()}/peers.json in bench/results")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    facts, rows = machine.facts(), []
    for case in args.case:
        began = time.monotonic()
        found = measure(
            case, args.precision, args.rounds, lambda line: print(line, file=sys.stderr, flush=True), args.only
        )
        rows += found
        print(table(found) + f"\n({time.monotonic() - began:.0f} s)\n", flush=True)
        if args.save:
            save(facts, rows)
    return int(any(row["status"] != "measured" for row in rows))


def save(facts: dict[str, str], rows: list[dict]) -> None:
    """Puts these rows in peers.json, in place of those of the same cases and precisions."""
    path = machine.RESULTS / machine.slug() / "peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {(row["case"], row["precision"]) for row in rows}
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = [row for row in earlier if (row["case"], row["precision"]) not in measured]
    rows = kept + [row | {name: facts[name] for name in ("commit", "command")} for row in rows]
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
