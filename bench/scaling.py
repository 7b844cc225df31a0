"""What synchronization costs a training step on this machine's CPU: counted, computed and timed.

The collectives that engine.step's update calls, as PyTorch's profiler sees them, must be those of
engine.planning.communication in calls and bytes, by kind, on every rank; if not, the exit code is 1. Each process has
one thread and its own batch. A time is that of all ranks together; without synchronization as many processes make the
same step alone.
"""

import argparse
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException
from torch.profiler import ProfilerActivity, profile

from bench import machine, results, tables
from bench.counts import silenced
from bench.measure import in_turns
from bench.processes import end_with_parent
from bench.results import Row, exact, find, rate, spread
from engine import device, distributed, optim
from engine.config import OptimConfig, TrainConfig
from engine.distributed import Ranks
from engine.errors import DONE, INTERRUPTED
from engine.health.timing import Clock
from engine.planning.communication import communication, muon_communication
from engine.step import Guard, Step
from model.gpt2 import GPT2
from model.presets import PRESETS, GPT2Config

FAILED = 1
MOST_PROCESSES, LEAST_ROUNDS, WARM_UP = 16, 5, 3  # DDP sorts its buckets after the first step
WAYS = {"ddp": {"parallel": "ddp"}, "fsdp": {"parallel": "fsdp"}}
WAYS |= {"fsdp no reshard": {"parallel": "fsdp", "reshard": False}}
OPTIM = {f"{way} muon": OptimConfig("muon") for way in ("ddp", "fsdp")}
WAYS |= {way: WAYS[way.partition(" ")[0]] for way in OPTIM}
ITEMSIZE = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "unsigned char": 1}
# Ops that the profiler records with their tensors, of which the largest counts: the kind, and what gloo makes of which
# argument.
WHOLE = {
    "c10d::_allgather_base_": ("all_gather", "all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "all_reduce", 1),
    "c10d::alltoall_base_": ("all_to_all", "all_to_all", 1),
}


@dataclass(frozen=True)
class Request:
    """What every process does: one step of each way on random tokens, counted, and timed if there are seconds."""

    config: GPT2Config
    ways: tuple[str, ...] = (*WAYS,)
    sequences: int = 1
    micro_batches: int = 1
    seconds: float = 0.0


def build(request: Request, way: str, ranks: Ranks) -> Step:
    """engine.step's update under one way of `--parallel`, or "alone": without any collective."""
    torch.manual_seed(0)
    raw_model = model = GPT2(request.config)
    if way == "alone":
        ranks = replace(ranks, world_size=1)
    else:
        model = distributed.wrap(raw_model, ranks, **WAYS[way])
    raw_model.configure("torch", torch.float32)
    optimizer = optim.build(raw_model, OPTIM.get(way, OptimConfig()), dist.group.WORLD)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Step(model, optimizer, scaler, Guard(ranks.device), 1, 1.0, ranks, Clock(ranks.device))


def count(step: Callable[[], object]) -> dict[str, list[int]]:
    """The collectives that one step of this rank calls: for each kind, the calls and the bytes of whole tensors.

    gloo reduces and scatters by an all-reduce: that is one reduce_scatter here, as the step called it.
    """
    with silenced(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    called: Counter[tuple[str, int]] = Counter()  # kind, bytes of the whole tensor
    run: Counter[tuple[str, int]] = Counter()
    for event in profiler.profiler.kineto_results.events():
        sizes = [math.prod(s) * ITEMSIZE.get(d, 0) for s, d in zip(event.shapes(), event.dtypes(), strict=False)]
        backend, _, kind = event.name().partition(":")
        if event.name() in WHOLE:
            kind, run_kind, argument = WHOLE[event.name()]
            called[kind, max(sizes)] += 1
            run[run_kind, sizes[argument]] -= 1
        elif backend == "gloo":
            run[kind, sum(sizes)] += 1
    found: dict[str, list[int]] = {}
    for (kind, size), calls in (called + run).items():  # a sum of counters leaves out what is not above 0
        before = found.get(kind, (0, 0))
        found[kind] = [before[0] + calls, before[1] + calls * size]
    return found


def elapsed(run: Callable[[], object], ranks: Ranks) -> float:
    """Seconds from the first rank that begins to the last that ends, on the clock that all of them share."""
    ranks.barrier()
    began = time.perf_counter()
    run()
    times = torch.tensor([-began, time.perf_counter()], dtype=torch.float64)
    if ranks.world_size > 1:
        dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.sum().item()


def measure(request: Request, ranks: Ranks) -> dict:
    """{"counted": {way: each rank's counts}, "times": {way, or "alone": seconds in turn}}."""
    shape = request.micro_batches, request.sequences, request.config.n_positions + 1
    tokens = torch.randint(request.config.vocab_size, shape, generator=torch.Generator().manual_seed(ranks.rank))
    batch = [(each[:, :-1], each[:, 1:]) for each in tokens]
    steps = {way: build(request, way, ranks) for way in request.ways}
    runs = {way: lambda step=step: step(0, batch, 0.0) for way, step in steps.items()}  # no weight changes at lr 0
    counted = {}
    for way, run in runs.items():
        for _ in range(WARM_UP):
            run()
        counted[way] = ranks.gather(count(run))
    if not request.seconds:
        return {"counted": counted}
    alone = build(request, "alone", ranks)
    runs["alone"] = lambda: alone(0, batch, 0.0)
    deadline = time.monotonic() + request.seconds
    samplers = {name: lambda run=run: elapsed(run, ranks) for name, run in runs.items()}
    goes_on = lambda done: ranks.broadcast_object(done < LEAST_ROUNDS or time.monotonic() < deadline)  # noqa: E731
    return {"counted": counted, "times": in_turns(samplers, goes_on)}


def rank_main(rank: int, world_size: int, port: int, request: Request, out: Path) -> None:
    end_with_parent()
    _ = torch.multiprocessing.parent_process().is_alive() or os._exit(1)  # it may have died while this one imported
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    device.tune_malloc()  # as in a run
    with distributed.process_group(timeout_minutes=2.0) as ranks:
        report = measure(request, ranks)
        if ranks.is_first:
            out.write_text(json.dumps(report), encoding="utf-8")
        ranks.barrier()  # none leaves before it is written
    distributed.leave(0)


def launch(world_size: int, request: Request) -> dict:
    """What these processes measure. None of them is left when this returns or raises."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="scaling_") as directory:
        out = Path(directory, "report.json")
        torch.multiprocessing.spawn(rank_main, (world_size, port, request, out), nprocs=world_size, daemon=True)
        return json.loads(out.read_text(encoding="utf-8"))


def computed(model: GPT2Config, world_size: int, way: str, micro_batches: int = 1) -> list[dict[str, list[int]]]:
    """engine.planning.communication's calls and bytes of a step by kind, of each rank, as `count` has them."""
    config = TrainConfig(model=model, optim=OPTIM.get(way, OptimConfig()), **WAYS[way])
    calls = communication(model, world_size, precision="fp32", micro_batches=micro_batches, **WAYS[way])
    found: list[dict[str, list[int]]] = [{} for _ in range(world_size)]
    for rank, kinds in enumerate(found):
        for each in calls + muon_communication(config, world_size, world_size, rank):
            before = kinds.get(each.kind, (0, 0))
            kinds[each.kind] = [before[0] + each.calls, before[1] + each.payload_bytes]
    return found


def row_of(world_size: int, way: str, report: dict, expected: list[dict[str, list[int]]], tokens: int) -> Row:
    """One way on so many processes, whose step takes so many tokens. Failed if what was counted is not expected."""
    counted, steps, without = report["counted"][way], report["times"][way], report["times"]["alone"]
    row = Row("scaling", f"{world_size} processes", way if world_size > 1 else "none", facts={"processes": world_size})
    row.figures = {
        "step": spread(steps, "s"),
        "without sync": spread(without, "s"),
        "tokens": rate(spread(steps, "s"), tokens, "tokens/s"),
        "calls counted": exact(sum(calls for calls, _ in counted[0].values()), ""),
        "bytes counted": exact(sum(size for _, size in counted[0].values()), "B"),
        "bytes computed": exact(sum(size for _, size in expected[0].values()), "B"),
    }
    if counted != expected:
        row.status, row.reason = "failed", f"the collectives must be {expected}, got {counted}"
    return row


def compare(processes: list[int], model: GPT2Config, args: argparse.Namespace) -> list[Row]:
    """The rows of every number of processes and every way."""
    rows: list[Row] = []
    for world_size in processes:
        ways, began = [*WAYS] if world_size > 1 else ["ddp"], time.monotonic()
        seconds = args.seconds if world_size > 1 else args.seconds / 3  # one step alone
        report = launch(world_size, Request(model, tuple(ways), args.sequences, seconds=seconds))
        print(f"{world_size} processes took {time.monotonic() - began:.0f} s", file=sys.stderr)
        for way in ways:
            tokens = world_size * args.sequences * model.n_positions
            rows.append(row_of(world_size, way, report, computed(model, world_size, way), tokens))
    one = find(rows, "scaling", "1 processes", "none")
    for row in rows if one is not None else []:
        speedup, world_size = row.value("tokens") / one.value("tokens"), row.facts["processes"]
        row.figures["efficiency"] = exact(speedup / world_size, "%")
        row.figures["per core"] = exact(speedup / min(world_size, machine.cores()), "%")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 0 if all bytes were predicted, 1 if not or if a process failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    counts = {"type": int, "nargs": "+", "metavar": "N", "choices": range(1, MOST_PROCESSES + 1)}
    parser.add_argument("--processes", default=[1, 2, 4], help="numbers of processes, such as 1 2 4", **counts)
    parser.add_argument("--model", default="mini", choices=PRESETS, help="a preset of model.presets")
    parser.add_argument("--sequences", type=int, default=1, help="sequences of a step on each process")
    parser.add_argument("--seconds", type=float, default=45.0, help="of timing for each number of processes")
    parser.add_argument("--save", action="store_true", help="also write bench/results/<machine>/scaling.json")
    args = parser.parse_args(arguments)
    if args.sequences < 1 or not 0 < args.seconds < math.inf:
        parser.error(f"--sequences and --seconds must be above 0, got {args.sequences} and {args.seconds}")
    model = PRESETS[args.model]
    try:
        rows = compare(sorted({*args.processes}), model, args)
    except ProcessException as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("bench.scaling: interrupted; nothing is saved", file=sys.stderr)
        return INTERRUPTED
    print(tables.of(rows))
    if args.save:
        facts = machine.facts() | {"model": args.model, "tokens": str(args.sequences * model.n_positions)}
        print(f"\nsaved {results.save('scaling', facts, rows)}")
    return DONE if all(row.status == "measured" for row in rows) else FAILED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its processes end too
    sys.exit(main())
