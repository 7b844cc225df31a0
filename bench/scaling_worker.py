"""The processes that bench.scaling has count and time the collectives of a training step.

`python -m bench.scaling_worker PROCESSES REQUEST.json OUT.json` imports once, then forks; they meet on the loopback
device. The step is engine.step.Step on random tokens, at a learning rate of 0, so that steps without synchronization
leave every rank's weights alike. A time is that of all ranks together: from the first that begins to the last that
ends, on the clock that the processes of a host share.
"""

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from bench.measure import in_turns
from bench.processes import end_with_parent
from engine import distributed, optim
from engine.config import OptimConfig
from engine.distributed import Ranks
from engine.health.timing import Clock
from engine.step import Guard, Step
from model.gpt2 import GPT2
from model.presets import GPT2Config

WARM_UP = 3  # steps; DDP sorts its buckets after the first
ITEMSIZE = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "unsigned char": 1}
# Ops that the profiler records with their tensors: the kind, which argument is the whole tensor, and what gloo makes of
# which argument.
WHOLE = {
    "c10d::_allgather_base_": ("all_gather", 0, "all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, "all_reduce", 1),
}


class Unsynchronized(nn.Module):
    """DDP with gradient all-reduce always off."""

    def __init__(self, model: DistributedDataParallel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with self.model.no_sync():  # DDP decides in the forward
            return self.model(tokens, targets)


@dataclass
class Trainer:
    """A step under one way of `--parallel`, with its batch."""

    step: Step
    micro_batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def build(cls, request: dict, parallel: dict, ranks: Ranks) -> "Trainer":
        """parallel: `parallel` and `reshard`, as engine.distributed.wrap takes them."""
        config, optim_config = GPT2Config(**request["model"]), OptimConfig()
        torch.manual_seed(0)
        raw_model = GPT2(config)
        model = distributed.wrap(raw_model, ranks, **parallel)
        raw_model.configure("torch", torch.float32)
        tokens = torch.randint(
            config.vocab_size,
            (request["micro_batches"], request["sequences"], config.n_positions + 1),
            generator=torch.Generator().manual_seed(ranks.rank),
        )
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer, guard = optim.build(raw_model, optim_config), Guard(ranks.device)
        step = Step(model, optimizer, scaler, guard, 1, optim_config.clip, ranks, Clock(ranks.device))
        return cls(step, [(each[:, :-1], each[:, 1:]) for each in tokens])

    def alone(self) -> "Trainer":
        """The same model, optimizer and batch without any collective."""
        model, ranks = self.step.model, replace(self.step.ranks, world_size=1)
        model = Unsynchronized(model) if isinstance(model, DistributedDataParallel) else model
        return replace(self, step=replace(self.step, model=model, ranks=ranks))

    def update(self) -> None:
        """One update that changes no weight."""
        self.step(0, self.micro_batches, 0.0)


def count(step: Callable[[], None]) -> dict[str, list[int]]:
    """The collectives that one step of this rank calls: for each kind, the calls and the bytes of whole tensors.

    Those that take a list of tensors, as DDP's sums, are seen where gloo runs them. It reduces and scatters by an
    all-reduce: that is one reduce_scatter here, as the step called it.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    called: Counter[tuple[str, int]] = Counter()  # kind, bytes of the whole tensor
    run: Counter[tuple[str, int]] = Counter()
    for event in profiler.profiler.kineto_results.events():
        backend, _, kind = event.name().partition(":")
        if event.name() in WHOLE:
            kind, whole, run_kind, argument = WHOLE[event.name()]
            called[kind, num_bytes(event, whole)] += 1
            run[run_kind, num_bytes(event, argument)] -= 1
        elif backend == "gloo":
            run[kind, sum(num_bytes(event, i) for i in range(len(event.shapes())))] += 1
    found: dict[str, list[int]] = {}
    for (kind, size), calls in (called + run).items():  # a sum of counters leaves out what is not above 0
        total = found.setdefault(kind, [0, 0])
        total[0] += calls
        total[1] += calls * size
    return found


def num_bytes(event: torch._C._autograd._KinetoEvent, argument: int) -> int:
    """Bytes of a tensor that an op was given."""
    return torch.Size(event.shapes()[argument]).numel() * ITEMSIZE[event.dtypes()[argument]]


def elapsed(run: Callable[[], object], ranks: Ranks) -> float:
    """Seconds of all ranks together, the same number on each."""
    if ranks.world_size > 1:
        dist.barrier()
    began = time.perf_counter()
    run()
    times = torch.tensor([-began, time.perf_counter()], dtype=torch.float64)
    if ranks.world_size > 1:
        dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.sum().item()


def measure(request: dict, ranks: Ranks) -> dict:
    """Counts, and then seconds of all steps in turn until the time is over; "alone" is the one without collectives."""
    trainers = {name: Trainer.build(request, fields, ranks) for name, fields in request["ways"].items()}
    report: dict = {"counted": {}, "times": {}}
    for name, trainer in trainers.items():
        for _ in range(WARM_UP):
            trainer.update()
        report["counted"][name] = ranks.gather(count(trainer.update))
    if request["rounds"]:
        runs = {"alone": trainers["ddp"].alone().update}
        runs |= {name: trainer.update for name, trainer in trainers.items()}
        deadline = time.monotonic() + request["seconds"]
        report["times"] = in_turns(
            {name: lambda run=run: elapsed(run, ranks) for name, run in runs.items()},
            lambda done: ranks.broadcast_object(done < request["rounds"] or time.monotonic() < deadline),
        )
    return report


def rank_main(rank: int, world_size: int, port: int, request: dict, out: Path) -> None:
    """One process."""
    end_with_parent()  # this one forked from main, which ends with who asked
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    with distributed.process_group(timeout_minutes=2.0) as ranks:
        report = measure(request, ranks)
        if ranks.is_first:
            out.write_text(json.dumps(report), encoding="utf-8")
        ranks.barrier()  # none leaves before it is written


def main() -> None:
    """Forks the processes and waits for them."""
    end_with_parent()
    world_size, request_path, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world_size, port, request, out)
    torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main()
