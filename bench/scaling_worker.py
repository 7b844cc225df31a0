"""The processes that bench.scaling has count and time the collectives of a training step.

`python -m bench.scaling_worker PROCESSES REQUEST.json OUT.json` imports once, then forks; they meet on the loopback
device. The step is engine.train's own, on random tokens, at a learning rate of 0, so that steps without synchronization
leave every rank's weights alike. A time is that of all ranks together: from the first that begins to the last that
ends, on the clock that the processes of a host share.
"""

import json
import os
import runpy
import socket
import sys
import threading
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

from engine import distributed, optim
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.guard import Guard
from engine.timing import Clock
from model.gpt2 import GPT2
from model.presets import GPT2Config

ROOT = Path(__file__).resolve().parent.parent
train_step = runpy.run_path(str(ROOT / "engine" / "train.py"))["train_step"]

BARE_BYTES = (2**12, 2**20, 2**23, 24 * 2**20)  # payloads of the bare collectives, up to one of DDP's buckets
WARM_UP, WIRE_STEPS = 3, 4  # steps; DDP sorts its buckets after the first
ITEMSIZE = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "unsigned char": 1}
# Ops that the profiler records with their tensors: the kind, which argument is the whole tensor, and what gloo makes of
# which argument.
WHOLE = {
    "c10d::_allgather_base_": ("all_gather", 0, "all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, "all_reduce", 1),
}


class Unsynchronized(nn.Module):
    """A DDP model whose gradients stay each rank's own, which train_step's own call for the last pass cannot undo."""

    def __init__(self, model: DistributedDataParallel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with self.model.no_sync():  # DDP decides in the forward
            return self.model(tokens, targets)


@dataclass
class Trainer:
    """A model under one way of `--parallel`, with all that its step needs."""

    raw_model: GPT2
    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: Guard
    config: TrainConfig
    ranks: Ranks
    micro_batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def build(cls, request: dict, parallel: dict, ranks: Ranks) -> "Trainer":
        """parallel: fields of TrainConfig, `parallel` and `reshard`."""
        config = TrainConfig(model=GPT2Config(**request["model"]), precision="fp32", **parallel)
        torch.manual_seed(0)
        raw_model = GPT2(config.model)
        model = distributed.wrap(raw_model, ranks, config, False, torch.float32)
        raw_model.configure("torch", torch.float32)
        tokens = torch.randint(
            config.model.vocab_size,
            (request["micro_batches"], request["sequences"], config.model.n_positions + 1),
            generator=torch.Generator().manual_seed(ranks.rank),
        )
        micro_batches = [(each[:, :-1], each[:, 1:]) for each in tokens]
        optimizer = optim.build(raw_model, config)
        return cls(raw_model, model, optimizer, Guard(config, ranks.device), config, ranks, micro_batches)

    def alone(self) -> "Trainer":
        """The same model, optimizer and batch without any collective."""
        model = Unsynchronized(self.model) if isinstance(self.model, DistributedDataParallel) else self.model
        return replace(self, model=model, ranks=replace(self.ranks, world_size=1))

    def step(self) -> None:
        """One update by engine.train."""
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        clock = Clock(self.ranks.device)
        parts = (self.model, self.optimizer, scaler, self.guard, self.micro_batches)
        train_step(*parts, 0.0, 0, (False, False), self.config, self.ranks, clock)


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
    """Of a tensor that an op was given."""
    return torch.Size(event.shapes()[argument]).numel() * ITEMSIZE[event.dtypes()[argument]]


def loopback_bytes() -> int:
    """Bytes that the loopback device of this network namespace has sent so far, headers included."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[8])
    raise OSError("/proc/net/dev names no loopback device")


def count_wire(step: Callable[[], None]) -> float:
    """Bytes per step that crossed the loopback device, of all ranks."""
    readings = []
    for num_steps in (WIRE_STEPS, 0):
        dist.barrier()
        time.sleep(0.1)  # for the last acknowledgments
        readings.append(loopback_bytes())
        dist.barrier()
        for _ in range(num_steps):
            step()
    return (readings[1] - readings[0]) / WIRE_STEPS


def elapsed_ms(run: Callable[[], object], ranks: Ranks) -> float:
    """Of all ranks together, the same number on each."""
    if ranks.world_size > 1:
        dist.barrier()
    began = time.perf_counter()
    run()
    times = torch.tensor([-began, time.perf_counter()], dtype=torch.float64)
    if ranks.world_size > 1:
        dist.all_reduce(times, dist.ReduceOp.MAX)
    return 1e3 * times.sum().item()


def bare_collectives(world_size: int) -> dict[str, dict[int, Callable[[], object]]]:
    """By kind and bytes of the whole tensor."""
    runs: dict[str, dict[int, Callable[[], object]]] = {"all_reduce": {}, "all_gather": {}, "reduce_scatter": {}}
    for size in BARE_BYTES if world_size > 1 else ():
        whole, part = torch.ones(size // 4), torch.ones(size // 4 // world_size)
        runs["all_reduce"][size] = lambda whole=whole: dist.all_reduce(whole, dist.ReduceOp.MAX)  # ones for ever
        runs["all_gather"][size] = lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part)
        runs["reduce_scatter"][size] = lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole)
    return runs


def measure(request: dict, ranks: Ranks) -> dict:
    """Counts, and then times in rounds of all steps and bare collectives until the seconds are over."""
    trainers = {name: Trainer.build(request, fields, ranks) for name, fields in request["ways"].items()}
    report: dict = {"counted": {}, "wire_bytes": {}, "steps_ms": {}, "compute_ms": [], "bare_ms": {}}
    for name, trainer in trainers.items():
        for _ in range(WARM_UP):
            trainer.step()
        report["counted"][name] = ranks.gather(count(trainer.step))
        report["wire_bytes"][name] = count_wire(trainer.step) if request["is_quiet"] else None
    if not request["rounds"]:
        return report

    alone = trainers["ddp"].alone()
    steps = {"": alone.step, **{name: trainer.step for name, trainer in trainers.items()}}
    bare = bare_collectives(ranks.world_size)
    deadline, rounds = time.monotonic() + request["seconds"], 0
    while ranks.agree(rounds < request["rounds"] or time.monotonic() < deadline):
        for name in [*steps][:: 1 if rounds % 2 else -1]:
            times = report["steps_ms"].setdefault(name, []) if name else report["compute_ms"]
            times.append(elapsed_ms(steps[name], ranks))
        for kind, runs in bare.items():
            for size, run in runs.items():
                report["bare_ms"].setdefault(kind, {}).setdefault(size, []).append(elapsed_ms(run, ranks))
        rounds += 1
    return report


def rank_main(rank: int, world_size: int, port: int, request: dict, out: Path) -> None:
    """One process."""
    end_with(os.getppid(), request["parent"], request["limit_s"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    with distributed.process_group(timeout_minutes=2.0) as ranks:
        report = measure(request, ranks)
        if ranks.is_first:
            out.write_text(json.dumps(report), encoding="utf-8")
        ranks.agree(None)  # none leaves before it is written


def end_with(launcher: int, asker: int, seconds: float) -> None:
    """Ends this process when the one that forked it or the one that asked for it is gone, or after so many seconds."""

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and os.getppid() == launcher and Path(f"/proc/{asker}").exists():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    world_size, request_path, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world_size, port, request, out)
    torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main()
