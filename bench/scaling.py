"""What synchronization costs a training step on this machine's CPU, counted, computed and timed.

`python -m bench.scaling [--processes 1,2,4] [--model mini] [--seconds 45] [--save]`

- Bytes: those of every collective that engine.step's update calls, as PyTorch's profiler saw them, must equal
  bench.communication's, by kind, on every rank; if not, the exit code is 1.
- Time: the step, and the same step without any collective, by as many processes at once. With DDP the difference is what
  synchronization costs; for fsdp the step without is a whole replica's.

Each process has one thread and its own batch of the same size, so that as many processes as cores should be that many
times as fast; more share them, and can at best hold the rate. All steps run in turn, in rounds.
--save writes bench/results/<machine>/scaling.json.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine, results, tables
from bench.communication import Collective, communication
from bench.results import Row, exact, find, rate, spread
from engine.errors import BAD_INPUT, DONE, INTERRUPTED, BadInput
from model.presets import PRESETS, GPT2Config

FAILED = 1
MOST_PROCESSES, LEAST_ROUNDS = 16, 5
WAYS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp no reshard": {"parallel": "fsdp", "reshard": False},
}


class LaunchFailed(Exception):
    """The processes did not end well; the message holds what they said."""


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 0 if all bytes were predicted, 1 if not or if a launch failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes, such as 1,2,4")
    parser.add_argument("--model", default="mini", help="a preset of model.presets")
    parser.add_argument("--sequences", type=int, default=1, help="sequences of a step on each process")
    parser.add_argument("--seconds", type=float, default=45.0, help="of timing for each number of processes")
    parser.add_argument("--save", action="store_true", help="also write bench/results/<machine>/scaling.json")
    args = parser.parse_args(arguments)
    try:
        processes, model = read(args)
        rows = measure(processes, model, args)
    except BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except LaunchFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("bench.scaling: interrupted; nothing is saved", file=sys.stderr)
        return INTERRUPTED
    print(table(rows))
    if args.save:
        facts = machine.facts() | {"model": args.model, "tokens": str(args.sequences * model.n_positions)}
        print(f"\nsaved {results.save('scaling', facts, rows)}")
    return DONE if all(row.status == "measured" for row in rows) else FAILED


def read(args: argparse.Namespace) -> tuple[list[int], GPT2Config]:
    """The numbers of processes and the model. Raises BadInput."""
    wrong = []
    words = args.processes.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= MOST_PROCESSES for word in words):
        known = f"numbers from 1 to {MOST_PROCESSES} with commas between"
        wrong.append(f"--processes must be {known}, got {args.processes!r}")
    if args.model not in PRESETS:
        wrong.append(f"--model must be one of {', '.join(PRESETS)}, got {args.model!r}")
    if args.sequences < 1:
        wrong.append(f"--sequences must be at least 1, got {args.sequences}")
    if not 0 < args.seconds < math.inf:
        wrong.append(f"--seconds must be above 0, got {args.seconds}")
    if wrong:
        raise BadInput("\n".join(f"bench.scaling: {each}" for each in wrong))
    return sorted({int(word) for word in words}), PRESETS[args.model]


def launch(world_size: int, request: dict, limit_s: float) -> dict:
    """What scaling_worker reports of these processes. None of them is left when this returns or raises."""
    with tempfile.TemporaryDirectory(prefix="scaling_") as directory:
        asked, found = Path(directory, "request.json"), Path(directory, "report.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.scaling_worker", str(world_size), str(asked), str(found)],
            cwd=machine.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        try:
            said, _ = child.communicate(timeout=limit_s + 10)
        except subprocess.TimeoutExpired as error:
            raise LaunchFailed(f"bench.scaling: {world_size} processes must end within {limit_s:.0f} s") from error
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if child.returncode != 0 or not found.exists():
            raise LaunchFailed(f"bench.scaling: {world_size} processes failed\n" + said[-4000:])
        return json.loads(found.read_text(encoding="utf-8"))


def request_of(model: GPT2Config, ways: list[str], *, sequences: int = 1, micro_batches: int = 1, **timing) -> dict:
    """What scaling_worker is asked for. timing: rounds, at least, and seconds; without rounds it only counts."""
    return {
        "model": dataclasses.asdict(model),
        "ways": {name: WAYS[name] for name in ways},
        "sequences": sequences,
        "micro_batches": micro_batches,
        **({"rounds": 0, "seconds": 0.0} | timing),
    }


def measure(processes: list[int], model: GPT2Config, args: argparse.Namespace) -> list[Row]:
    """The rows of every number of processes and every way."""
    rows: list[Row] = []
    for world_size in processes:
        ways = [*WAYS] if world_size > 1 else ["ddp"]
        began, seconds = time.monotonic(), args.seconds if world_size > 1 else args.seconds / 3  # one step alone
        request = request_of(model, ways, sequences=args.sequences, rounds=LEAST_ROUNDS, seconds=seconds)
        report = launch(world_size, request, limit_s=10 * args.seconds + 300)
        print(f"{world_size} processes took {time.monotonic() - began:.0f} s", file=sys.stderr)
        tokens = world_size * args.sequences * model.n_positions
        rows += [row_of(world_size, way, report, predicted(model, world_size, way), tokens) for way in ways]
    if (one := find(rows, "scaling", case_of(1), "none")) is not None:
        for row in rows:
            speedup = row.value("tokens") / one.value("tokens")
            world_size = row.facts["processes"]
            row.figures["efficiency"] = exact(speedup / world_size, "%")
            row.figures["per core"] = exact(speedup / min(world_size, machine.cores()), "%")
    return rows


def case_of(world_size: int) -> str:
    """A number of processes in words."""
    return f"{world_size} process{'es' if world_size > 1 else ''}"


def predicted(model: GPT2Config, world_size: int, way: str, micro_batches: int = 1) -> list[Collective]:
    """bench.communication's collectives of a step."""
    parallel, reshard = WAYS[way]["parallel"], WAYS[way].get("reshard", True)
    return communication(model, world_size, parallel, "fp32", micro_batches=micro_batches, reshard=reshard)


def by_kind(collectives: list[Collective]) -> dict[str, list[int]]:
    """Calls and bytes of each kind, as scaling_worker counts them."""
    found: dict[str, list[int]] = {}
    for each in collectives:
        calls = found.setdefault(each.kind, [0, 0])
        calls[0] += each.calls
        calls[1] += each.payload_bytes
    return found


def row_of(world_size: int, way: str, report: dict, collectives: list[Collective], tokens: int) -> Row:
    """One way on so many processes, whose step takes so many tokens. Failed if what was counted is not predicted."""
    counted, expected, times = report["counted"][way], by_kind(collectives), report["times"]
    steps, alone = times[way], times["alone"]
    row = Row("scaling", case_of(world_size), way if world_size > 1 else "none", facts={"processes": world_size})
    row.figures = {
        "step": spread(steps, "s"),
        "without sync": spread(alone, "s"),
        "tokens": rate(spread(steps, "s"), tokens, "tokens/s"),
        "calls counted": exact(sum(calls for calls, _ in counted[0].values()), ""),
        "bytes counted": exact(sum(size for _, size in counted[0].values()), "B"),
        "bytes computed": exact(sum(size for _, size in expected.values()), "B"),
        "sync": spread([step - without for step, without in zip(steps, alone, strict=True)], "s"),
    }
    if any(each != expected for each in counted):
        row.status, row.reason = "failed", f"the collectives must be {expected}, got {counted}"
    return row


def table(rows: list[Row]) -> str:
    """Markdown."""
    names = ("step", "without sync", "sync", "tokens", "efficiency", "per core", "bytes counted", "bytes computed")
    lines = [
        (row.case, row.peer, *(tables.cell(row, n, is_spread=n in names[:3]) for n in names), row.reason or "equal")
        for row in rows
    ]
    return tables.markdown(("processes", "parallel", *names, "bytes"), lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that launch() ends what it started
    sys.exit(main())
