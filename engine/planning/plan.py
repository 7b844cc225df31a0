"""What a training run will take before it is paid for: memory, FLOPs, time, communication, disk, energy, cost.

`make` returns JSON types. Counts are exact; all else is an estimate, and every time rests on a share
of the peak that engine.planning.efficiencies names with its source. Free of PyTorch.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from engine.chips import Chip
from engine.config import PRESETS, TrainConfig, batch_shape
from engine.planning import efficiencies, memory, owners
from engine.planning.communication import communication, muon_communication
from engine.planning.memory import Place
from engine.planning.roofline_ops import RECOMPUTE, StepShape, step_ops
from model.presets import flops_per_token, num_parameters

WAYS = ("ddp", "fsdp", "hsdp")
WORLDS = (1, 8, 64, 256, 1024)
NETWORK = 400e9 / 8  # bytes/s of each GPU to other hosts, one direction: InfiniBand of 400 Gb/s
BACKWARD = 2 / 3  # share of a micro-batch's time that is its backward pass: twice the products of the forward
CHINCHILLA = 20  # tokens per parameter: Hoffmann et al. 2022, arXiv:2203.15556
GPT3_TOKENS = 300_000_000_000  # of every size: Brown et al. 2020, arXiv:2005.14165, table 2.1
TOKEN_BYTES = 2  # of the shards


@dataclass(frozen=True)
class Request:
    """What is planned."""

    preset: str
    config: TrainConfig
    gpus: int
    chip: Chip
    precision: str
    tokens: int
    per_host: int = 8
    price: float | None = None  # of a GPU for an hour
    budget_hours: float | None = None

    def place(self, world_size: int) -> Place:
        """As many GPUs of such hosts."""
        return Place(world_size, min(self.per_host, world_size))


@dataclass(frozen=True)
class Step:
    """One step on so many GPUs, in seconds of one of them."""

    world_size: int
    micro_batch_size: int
    micro_batches: int
    tokens: int  # of all GPUs
    fits: bool  # into memory
    by: Literal["mfu", "bound"]  # which of them compute_s is
    bound_s: float
    compute_s: float
    sent_bytes: float
    communication_s: float
    hidden_s: float
    muon_flops: int  # of Muon's matrix products, of the GPU that makes most of them; 0 with AdamW
    muon_s: float  # of these

    @property
    def seconds(self) -> float:
        """The expected time."""
        return self.compute_s + self.muon_s + self.communication_s - self.hidden_s


def make(asked: Request) -> dict:
    """The plan, as JSON types."""
    model, step = asked.config.model, step_on(asked, asked.gpus)
    count, per_token = num_parameters(model, padded=False), flops_per_token(model, asked.config.sequence_length)
    efficiency = efficiencies.of(asked.chip.name, asked.config, asked.precision, step.micro_batch_size)
    rate = step.tokens / step.seconds
    plan = {
        "preset": asked.preset,
        "gpus": asked.gpus,
        "gpu": dataclasses.asdict(asked.chip),
        "precision": asked.precision,
        "parallel": asked.config.parallel,
        "recompute": asked.config.recompute,
        "optimizer": asked.config.optim.name,
        "parameters": count,
        "tokens": asked.tokens,
        "preset_tokens_per_step": asked.config.tokens_per_step,
        "memory": memory_table(asked),
        "flops": {"per_token": per_token, "all": per_token * asked.tokens},
        "efficiency": dataclasses.asdict(efficiency),
        "step": dataclasses.asdict(step) | {"seconds": step.seconds},
        "run": spent(asked, asked.tokens / rate)
        | {"tokens_per_s": rate, "steps": math.ceil(asked.tokens / step.tokens)},
        "bound_hours": asked.tokens / step.tokens * step.bound_s / 3600,
        "communication": [dataclasses.asdict(s) | {"seconds": s.seconds} for s in worlds(asked)],
        "disk": disk(asked),
        "compute_optimal_tokens": CHINCHILLA * count,
        "gpt3_tokens": GPT3_TOKENS,
    }
    if asked.budget_hours is not None:
        plan["budget"] = bought(asked, asked.budget_hours, rate)
    return plan


def spent(asked: Request, seconds: float) -> dict:
    """Hours, energy and cost of a time on all GPUs."""
    hours = seconds / 3600
    cost = None if asked.price is None else asked.price * asked.gpus * hours
    return {"hours": hours, "kwh": asked.chip.watts * asked.gpus * hours / 1000, "cost": cost}


def memory_table(asked: Request) -> list[dict]:
    """For each way and each recomputed part the micro-batch of its step, whether it fits, and the parts."""
    found = []
    for parallel in WAYS:
        for recompute in RECOMPUTE:
            config = dataclasses.replace(asked.config, parallel=parallel, recompute=recompute)
            config, size, _, fits = divided(dataclasses.replace(asked, config=config), asked.gpus)
            parts = memory.parts(config, size, asked.precision, asked.place(asked.gpus))
            found.append({"parallel": parallel, "recompute": recompute, "fits": fits, "micro_batch_size": size} | parts)
    return found


def divided(asked: Request, world_size: int) -> tuple[TrainConfig, int, int, bool]:
    """A step that divides among so many GPUs: its config, micro-batch size and count, and whether it fits.

    The tokens are the nearest to the preset's, at least one sequence per GPU. The micro-batch is the
    one that gpt2 train chooses.
    """
    T, place = asked.config.sequence_length, asked.place(world_size)
    share = max(1, round(asked.config.tokens_per_step / (T * world_size)))  # sequences of each GPU
    config = dataclasses.replace(asked.config, tokens_per_step=share * T * world_size)
    room = asked.chip.memory_bytes
    most = memory.largest_micro_batch(config, asked.precision, room, place)
    size, micro_batches = batch_shape(config, world_size, most)
    return config, size, micro_batches, memory.fits(config, size, asked.precision, room, place)


def step_on(asked: Request, world_size: int) -> Step:
    """A step on so many GPUs, as if it did where it does not fit into memory."""
    config, size, micro_batches, fits = divided(asked, world_size)
    T, chip, precision = config.sequence_length, asked.chip, asked.precision
    shape = StepShape(config.model, size, T, precision, config.recompute, micro_batches, world_size)
    bound_s = bound(shape, chip)
    again = bound_s / bound(dataclasses.replace(shape, recompute="none"), chip)
    flops = flops_per_token(config.model, T) * micro_batches * size * T
    mfu = efficiencies.of(chip.name, config, precision, size).mfu
    mfu_s = again * flops / (mfu * chip.flops_per_s[precision])
    by, compute_s = ("mfu", mfu_s) if mfu_s >= bound_s else ("bound", bound_s)
    sent_bytes, communication_s, hidden_s = sent(asked, world_size, micro_batches, compute_s)
    seconds = (bound_s, compute_s, sent_bytes, communication_s, hidden_s)
    muon = muon_flops(asked, world_size)
    of_muon = (muon, muon / (mfu * chip.flops_per_s["bf16"]))  # in bf16 on every GPU that has it
    return Step(world_size, size, micro_batches, config.tokens_per_step, fits, by, *seconds, *of_muon)


def muon_flops(asked: Request, world_size: int) -> int:
    """FLOPs of Muon's matrix products per step, of the GPU that makes most of them; 0 with AdamW."""
    config, shards = asked.config, asked.place(world_size).shards(asked.config)
    if config.optim.name != "muon":
        return 0
    return owners.flops(config.model, world_size if config.parallel == "ddp" else shards)


def bound(shape: StepShape, chip: Chip) -> float:
    """Seconds that a step takes at least, by its ops' FLOPs and bytes."""
    return sum(op.bound_ms(chip, shape.precision) for op in step_ops(shape)) / 1e3


def sent(asked: Request, world_size: int, micro_batches: int, compute_s: float) -> tuple[float, float, float]:
    """Bytes that one GPU sends per step, their seconds, and how many of these the computation hides.

    DDP sends during the last backward pass, bucket by bucket, at which a compiled graph is cut too. The
    embeddings' gradient is the last to be ready and is sent after it. FSDP sends during the whole step,
    but for the first gather and the last reduction, of the embeddings too. Muon sends after both.
    """
    config, place = asked.config, asked.place(world_size)
    shards, options = place.shards(config), {"micro_batches": micro_batches, "reshard": config.reshard}
    calls = communication(config.model, world_size, config.parallel, asked.precision, shard_size=shards, **options)
    of_muon = muon_communication(config, world_size, shards)
    seconds = {each: each.wire_bytes / link(asked, each.name, each.group_size, shards) for each in [*calls, *of_muon]}
    communication_s, wire_bytes = sum(seconds.values()), sum(each.wire_bytes for each in seconds)
    if not seconds:
        return 0.0, 0.0, 0.0
    table = 4 * (config.model.padded_vocab_size + config.model.n_positions) * config.model.n_embd
    rounds = 2 * (world_size - 1) / world_size  # a gather and a reduction send as much as an all-reduce
    late_s = rounds * table / min(each.wire_bytes / seconds[each] for each in calls)
    late_s = min(communication_s, late_s + sum(seconds[each] for each in of_muon))
    window_s = BACKWARD * compute_s / micro_batches if config.parallel == "ddp" else compute_s
    return wire_bytes, communication_s, min(communication_s - late_s, window_s)


def link(asked: Request, name: str, group_size: int, shards: int) -> float:
    """Bytes/s of the slowest link of a group: inside a host its fastest, else the network's."""
    spans = "replicas" in name and shards >= asked.per_host
    inside = group_size <= asked.per_host and not (spans and group_size > 1)
    return max(asked.chip.links.values()) if inside else NETWORK


def worlds(asked: Request) -> list[Step]:
    """Steps on 1 to 1,024 GPUs, and on those that are asked for."""
    even = [n for n in {*WORLDS, asked.gpus} if n <= asked.per_host or n % asked.per_host == 0]
    return [step_on(asked, n) for n in sorted(even)]


def disk(asked: Request) -> dict:
    """Bytes of the data and of a checkpoint, and of as many as a run keeps while it writes one more."""
    on_one = memory.parts(dataclasses.replace(asked.config, parallel="ddp"), 1, asked.precision)
    checkpoint = on_one["weights"] + on_one["moments"]
    kept = asked.config.keep_last + 2  # the best one, and the one that is written
    return {"data": TOKEN_BYTES * asked.tokens, "checkpoint": checkpoint, "checkpoints": kept * checkpoint}


def bought(asked: Request, hours: float, rate: float) -> dict:
    """What the hours buy: tokens of this preset, and the preset whose compute-optimal run comes nearest below.

    Each preset is trained in the way that is asked for. too_large: those that do not fit into memory so.
    """
    best, too_large = None, []
    for name, each in PRESETS.items():
        if name in ("tiny", "mini", "small"):
            continue
        tokens = CHINCHILLA * num_parameters(each.model, padded=False)
        step = step_on(dataclasses.replace(asked, preset=name, config=like(asked.config, each)), asked.gpus)
        needed = tokens / step.tokens * step.seconds / 3600
        if needed <= hours and not step.fits:
            too_large.append(name)
        elif needed <= hours and (best is None or needed > best["hours"]):
            best = {"preset": name, "tokens": tokens, "hours": needed}
    return {"hours": hours, "tokens": round(rate * 3600 * hours), "compute_optimal": best, "too_large": too_large}


def like(config: TrainConfig, preset: TrainConfig) -> TrainConfig:
    """Another preset, trained in the same way."""
    names = ("optim", "parallel", "recompute", "reshard", "shard_size")
    return dataclasses.replace(preset, **{name: getattr(config, name) for name in names})
