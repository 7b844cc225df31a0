"""What synchronization costs a training step on this machine's CPU, counted and timed against what is predicted.

`python -m bench.scaling [--processes 1,2,4] [--model mini] [--seconds 45] [--save]`

- Bytes: those of every collective that engine.train's step calls, as PyTorch's profiler saw them, must equal
  bench.communication's, by kind, on every rank; if not, the exit code is 1. Beside them, what really crossed the
  loopback device, where a network namespace with nobody else in it can be made. gloo's all-reduce and all-gather send
  what a ring does; its reduce-scatter is an all-reduce, and sends twice that.
- Time: predicted = the step without synchronization, by as many processes at once, + communication's calls and bytes
  at the latency and rate of bare collectives. It assumes that nothing is hidden: here communication is work of the
  same cores. Goal for DDP: within 25 % of measured. For fsdp the step without is a whole replica's, whose optimizer
  does more work, and FSDP's copies into and out of its buffers are not predicted.

Each process has one thread and its own batch of the same size, so that as many processes as cores should be that many
times as fast; more share them, and can at best hold the rate. All steps and bare collectives run in turn, in rounds;
figures are medians with the 20th and 80th percentile. --save writes bench/results/<machine>/scaling.json.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine
from bench.communication import Collective, communication
from engine.errors import BAD_INPUT, DONE, INTERRUPTED, BadInput
from model.presets import PRESETS, GPT2Config

FAILED = 1
MOST_PROCESSES, LEAST_ROUNDS = 16, 5
GOAL = 0.25  # of the measured DDP step, that the predicted one may be off
WAYS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp no reshard": {"parallel": "fsdp", "reshard": False},
}
GLOO_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 2}  # around the ring
NAMESPACE = ["unshare", "-Urn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]  # a network with nobody else in it


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
        rows, ceilings = measure(processes, model, args.sequences, args.seconds)
    except BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except LaunchFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("bench.scaling: interrupted; nothing is saved", file=sys.stderr)
        return INTERRUPTED
    shape = dataclasses.asdict(model) | {"name": args.model, "sequences": args.sequences, "threads": 1}
    report = {"facts": machine.facts(), "model": shape, "ceilings": ceilings, "rows": rows}
    print(table(report))
    if args.save:
        path = machine.RESULTS / machine.slug() / "scaling.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nsaved {path.relative_to(machine.ROOT)}")
    return DONE if all(row["is_equal"] for row in rows) else FAILED


def read(args: argparse.Namespace) -> tuple[list[int], GPT2Config]:
    """The numbers of processes and the model. Raises BadInput."""
    wrong = []
    words = args.processes.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= MOST_PROCESSES for word in words):
        wrong.append(
            f"--processes must be numbers from 1 to {MOST_PROCESSES} with commas between, got {args.processes!r}"
        )
    if args.model not in PRESETS:
        wrong.append(f"--model must be one of {', '.join(PRESETS)}, got {args.model!r}")
    if args.sequences < 1:
        wrong.append(f"--sequences must be at least 1, got {args.sequences}")
    if not 0 < args.seconds < math.inf:
        wrong.append(f"--seconds must be above 0, got {args.seconds}")
    if wrong:
        raise BadInput("\n".join(f"bench.scaling: {each}" for each in wrong))
    return sorted({int(word) for word in words}), PRESETS[args.model]


class LaunchFailed(Exception):
    """The processes did not end well; the message holds what they said."""


def can_be_quiet() -> bool:
    """Whether the processes can have a network namespace of their own, where nothing else sends."""
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def launch(world_size: int, request: dict, limit_s: float) -> dict:
    """What scaling_worker reports of these processes. None of them is left when this returns or raises."""
    is_quiet = world_size > 1 and can_be_quiet()
    request = request | {"parent": os.getpid(), "limit_s": limit_s, "is_quiet": is_quiet}
    with tempfile.TemporaryDirectory(prefix="scaling_") as directory:
        asked, found = Path(directory, "request.json"), Path(directory, "report.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [*(NAMESPACE if is_quiet else []), sys.executable, "-m", "bench.scaling_worker", str(world_size)]
        child = subprocess.Popen(
            [*command, str(asked), str(found)],
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


def measure(processes: list[int], model: GPT2Config, sequences: int, seconds: float) -> tuple[list[dict], list[dict]]:
    """The rows of the table, and the latency and rate of the bare collectives."""
    rows, ceilings = [], []
    for world_size in processes:
        ways = [*WAYS] if world_size > 1 else ["ddp"]
        began = time.monotonic()
        timing = {"rounds": LEAST_ROUNDS, "seconds": seconds if world_size > 1 else seconds / 3}  # one step alone
        request = request_of(model, ways, sequences=sequences, **timing)
        report = launch(world_size, request, limit_s=10 * seconds + 300)
        print(f"{world_size} processes took {time.monotonic() - began:.0f} s", file=sys.stderr)
        found = [
            {"processes": world_size, "kind": kind, **fit({int(size): times for size, times in by_size.items()})}
            for kind, by_size in report["bare_ms"].items()
        ]
        ceilings += found
        one = next((row for row in rows if row["processes"] == 1), None)
        for way in ways:
            rows.append(row_of(world_size, way, report, found, model, sequences, one))
    return rows, ceilings


def fit(times_ms: dict[int, list[float]]) -> dict[str, float]:
    """ms = latency_ms + bytes / rate by least squares of relative errors, over the medians of each size."""
    points = [(size, statistics.median(times)) for size, times in times_ms.items()]
    weights = [1.0 / ms**2 for _, ms in points]
    total = sum(weights)
    x, y = (sum(w * point[i] for w, point in zip(weights, points, strict=True)) / total for i in (0, 1))
    covariance = sum(w * (size - x) * (ms - y) for w, (size, ms) in zip(weights, points, strict=True))
    ms_per_byte = covariance / sum(w * (size - x) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    latency_ms = y - ms_per_byte * x
    worst = max(abs(latency_ms + size * ms_per_byte - ms) / ms for size, ms in points)
    return {
        "latency_ms": latency_ms,
        "gb_per_s": 1e-6 / ms_per_byte,
        "worst_relative_error": worst,
        **{f"ms_of_{size}_bytes": ms for size, ms in points},
    }


def predict_ms(collectives: list[Collective], ceilings: list[dict]) -> float:
    """The time of these collectives one after the other, each as if nothing else ran."""
    rates = {each["kind"]: each for each in ceilings}
    return sum(
        each.calls * rates[each.kind]["latency_ms"] + 1e-6 * each.payload_bytes / rates[each.kind]["gb_per_s"]
        for each in collectives
    )


def by_kind(collectives: list[Collective]) -> dict[str, list[int]]:
    """Calls and bytes of each kind, as scaling_worker counts them."""
    found: dict[str, list[int]] = {}
    for each in collectives:
        calls = found.setdefault(each.kind, [0, 0])
        calls[0] += each.calls
        calls[1] += each.payload_bytes
    return found


def predicted(model: GPT2Config, world_size: int, way: str, micro_batches: int = 1) -> list[Collective]:
    """bench.communication's collectives of a step."""
    fields = WAYS[way]
    return communication(
        model, world_size, fields["parallel"], "fp32", micro_batches=micro_batches, reshard=fields.get("reshard", True)
    )


def gloo_wire_bytes(collectives: list[Collective]) -> float:
    """What all ranks together send through gloo in a step, without the headers."""
    return sum(GLOO_ROUNDS[each.kind] * (each.group_size - 1) * each.payload_bytes for each in collectives)


def row_of(
    world_size: int, way: str, report: dict, ceilings: list[dict], model: GPT2Config, sequences: int, one: dict | None
) -> dict:
    """One way on so many processes. one: the row of one process."""
    collectives = predicted(model, world_size, way)
    counted, expected = report["counted"][way], by_kind(collectives)
    steps, compute = report["steps_ms"][way], report["compute_ms"]
    communication_ms = predict_ms(collectives, ceilings)
    step_ms = statistics.median(steps)
    tokens_per_s = world_size * sequences * model.n_positions / step_ms * 1e3
    ideal = one and tokens_per_s / one["tokens_per_s"]
    return {
        "processes": world_size,
        "parallel": way if world_size > 1 else "none",
        **spread("step_ms", steps),
        **spread("compute_ms", compute),
        "tokens_per_s": tokens_per_s,
        "efficiency": ideal and ideal / world_size,
        "efficiency_per_core": ideal and ideal / min(world_size, machine.cores()),
        "calls_counted": sum(calls for calls, _ in counted[0].values()),
        "calls_predicted": sum(calls for calls, _ in expected.values()),
        "bytes_counted": sum(size for _, size in counted[0].values()),
        "bytes_predicted": sum(size for _, size in expected.values()),
        "is_equal": all(each == expected for each in counted),
        "wire_bytes_counted": report["wire_bytes"][way],  # of all ranks, headers included
        "wire_bytes_gloo": gloo_wire_bytes(collectives),
        "wire_bytes_ring": world_size * sum(each.wire_bytes for each in collectives),
        "communication_ms_predicted": communication_ms,
        **spread("communication_ms", [step - alone for step, alone in zip(steps, compute, strict=True)]),
        **spread(
            "predicted_over_measured",
            [(alone + communication_ms) / step for step, alone in zip(steps, compute, strict=True)],
        ),
        "rounds": len(steps),
    }


def spread(name: str, values: list[float]) -> dict[str, float]:
    """The median under the name, and the 20th and 80th percentile."""
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {name: statistics.median(values), f"{name}_p20": low, f"{name}_p80": high}


def table(report: dict) -> str:
    """Markdown."""
    facts, shape = report["facts"], report["model"]
    lines = [
        f"{shape['name']}, {shape['sequences']} x {shape['n_positions']} tokens on each process, one thread each, "
        f"fp32, gloo; {facts['machine']}, torch {facts['torch']}, {facts['date']}, commit {facts['commit']}",
        "",
        "| processes | parallel | step ms (p20 to p80) | without sync ms | tokens/s | efficiency | per core | calls "
        "| MB counted | MB predicted | equal | wire MB counted / by gloo's rounds | communication ms predicted | "
        "measured | predicted / measured step |",
        "|" + " --- |" * 15,
    ]
    for row in report["rows"]:
        wire = row["wire_bytes_counted"]
        cells = [
            f"{row['processes']}",
            row["parallel"],
            f"{row['step_ms']:.0f} ({row['step_ms_p20']:.0f} to {row['step_ms_p80']:.0f})",
            f"{row['compute_ms']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            *("" if row[name] is None else f"{row[name]:.0%}" for name in ("efficiency", "efficiency_per_core")),
            f"{row['calls_counted']}",
            f"{row['bytes_counted'] / 1e6:.3f}",
            f"{row['bytes_predicted'] / 1e6:.3f}",
            "yes" if row["is_equal"] else "no",
            f"{'not counted' if wire is None else f'{wire / 1e6:.2f}'} / {row['wire_bytes_gloo'] / 1e6:.2f}",
            f"{row['communication_ms_predicted']:.0f}",
            f"{row['communication_ms']:.0f} ({row['communication_ms_p20']:.0f} to {row['communication_ms_p80']:.0f})",
            f"{row['predicted_over_measured']:.2f} ({row['predicted_over_measured_p20']:.2f} to "
            f"{row['predicted_over_measured_p80']:.2f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for each in report["ceilings"]:
        lines.append(
            f"{each['processes']} processes, bare {each['kind']}: {each['latency_ms']:.2f} ms + bytes / "
            f"{each['gb_per_s']:.2f} GB/s, off by at most {each['worst_relative_error']:.0%} at the measured sizes"
        )
    for row in report["rows"]:
        if row["parallel"] == "ddp":
            off = abs(row["predicted_over_measured"] - 1.0)
            verdict = "within" if off <= GOAL else "not within"
            lines.append(f"{row['processes']} processes, ddp: predicted step {verdict} {GOAL:.0%} ({off:.0%} off)")
    if any(row["processes"] > machine.cores() for row in report["rows"]):
        lines.append(
            f"more processes than the {machine.cores()} cores share them: efficiency can then be at most cores / "
            "processes, and per core says how far from that it is"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that launch() ends what it started
    sys.exit(main())
