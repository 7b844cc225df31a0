"""The collectives of one training step: what each rank sends, computed from shapes and checked against counted bytes.

payload_bytes are those of the whole tensors; wire_bytes are what one rank sends when the collective runs around a ring,
which no algorithm on equal links beats. Those of an all-to-all are the more of what a rank sends and
receives, of which a part stays with it. Not counted: what the start sends, logging, comparing replicas, evaluation.
Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.config import TrainConfig
from engine.planning.owners import assign, matrices, parts, share, work
from model.presets import GPT2Config, parameter_shapes

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"]
ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # bytes of an activation, and of a weight cast to match
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "all_to_all": 1}  # around the ring
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # DistributedDataParallel's defaults


@dataclass(frozen=True)
class Collective:
    """All calls of one kind that a step makes for one purpose."""

    name: str
    kind: Kind
    calls: int  # per step
    payload_bytes: int  # per step, all calls together
    group_size: int  # ranks that take part

    @property
    def wire_bytes(self) -> float:
        """What one rank sends per step, around a ring."""
        return ROUNDS[self.kind] * (self.group_size - 1) / self.group_size * self.payload_bytes


def communication(
    config: GPT2Config,
    world_size: int,
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp",
    precision: str = "bf16",
    *,
    micro_batches: int = 1,
    reshard: bool = True,
    shard_size: int | None = None,
) -> list[Collective]:
    """The collectives of one engine.step.Step with AdamW; none for one rank. ValueError if the arguments do not fit.

    micro_batches: per step on each rank. reshard: as TrainConfig has it. shard_size: hsdp's processes per replica.
    """
    if precision not in ITEMSIZE:
        raise ValueError(f"communication: the precision must be one of {', '.join(ITEMSIZE)}, got {precision!r}")
    if parallel not in ("ddp", "fsdp", "hsdp"):
        raise ValueError(f"communication: parallel must be ddp, fsdp or hsdp, got {parallel!r}")
    if min(world_size, micro_batches) < 1:
        raise ValueError(f"communication: ranks and micro-batches must be at least 1, got {world_size, micro_batches}")
    if world_size == 1:
        return []
    numbers = Collective("loss and signals", "all_reduce", 1, 5 * 4, world_size)  # five float32 of engine.step
    if parallel == "ddp":
        sizes = [4 * math.prod(shape) for shape in reversed(parameter_shapes(config).values())]
        return [Collective("gradients", "all_reduce", num_buckets(sizes), sum(sizes), world_size), numbers]

    shards = world_size if parallel == "fsdp" else shard_size
    if shards is None or shards < 1 or world_size % shards:
        raise ValueError(f"communication: hsdp's shard_size must divide {world_size} processes, got {shard_size}")
    shapes, blocks, size = parameter_shapes(config), config.n_layer, ITEMSIZE[precision]
    root = padded_elements([shape for name, shape in shapes.items() if not name.startswith("h.")], shards)
    block = padded_elements([shape for name, shape in shapes.items() if name.startswith("h.0.")], shards)
    elements, gathered, passes = blocks * block + root, blocks * block * size + root * 4, micro_batches  # root: float32
    found = [
        Collective("weights, forward", "all_gather", passes * (blocks + 1), passes * gathered, shards),
        Collective("weights, backward", "all_gather", passes * blocks, passes * blocks * block * size, shards),
        Collective("gradients", "reduce_scatter", passes * (blocks + 1), passes * elements * 4, shards),
        Collective("norm of the gradient", "all_reduce", 1, 8, shards),  # engine.distributed.clip's float64
    ]
    if not reshard:
        del found[1]
    if precision == "fp16":  # GradScaler's flag: DDP's ranks find it in the same gradients, shards must tell each other
        found.append(Collective("overflow", "all_reduce", 1, 4, shards))
    if parallel == "hsdp":
        replicas = world_size // shards
        found.append(Collective("gradients of replicas", "all_reduce", blocks + 1, elements // shards * 4, replicas))
        found.append(Collective("norm of the gradient of replicas", "broadcast", 1, 8, replicas))
    return [each for each in [*found, numbers] if each.group_size > 1]


def muon_communication(config: TrainConfig, world_size: int, shards: int, rank: int | None = None) -> list[Collective]:
    """What Muon's step sends besides `communication`: see engine.optim.sharing. None for AdamW.

    shards: ranks that share one copy of the weights. rank: of these; None: the most that any has.
    """
    size = world_size if config.parallel == "ddp" else shards
    if config.optim.name != "muon" or size == 1:
        return []
    shapes = matrices(config.model)
    costs = [work(shape, parts(name)) for name, shape in shapes.items()]
    owners = assign(costs, min(size, len(costs)))  # of more ranks the others own none
    owned, held = Counter(), 0  # bytes of the whole matrices of each owner, and of this rank's rows of all
    for owner, (rows, columns) in zip(owners, shapes.values(), strict=True):
        row = 4 * (columns + config.optim.muon_rows)  # with a number of normalize_rows
        owned[owner] += rows * row
        held += share(rows, rank or 0, size) * row
    if config.parallel == "ddp":
        return [Collective("Muon's matrices", "broadcast", len(owned), owned.total(), size)]
    most = max(owned.values()) if rank is None else owned[rank]
    return [Collective("Muon's matrices", "all_to_all", 2, 2 * max(held, most), size)]  # there, and back


def padded_elements(shapes: Iterable[tuple[int, ...]], shards: int) -> int:
    """Elements of tensors that FSDP cuts along their first axis, each padded to equal parts."""
    return sum(-(-shape[0] // shards) * shards * math.prod(shape[1:]) for shape in shapes)


def num_buckets(sizes: Iterable[int]) -> int:
    """How many calls DDP sends gradients of these bytes in, in the order in which they are ready: the last layer first.

    It knows the order after the first step. A bucket is full once it has reached its size.
    """
    buckets, held, limit = 0, 0, FIRST_BUCKET_BYTES
    for size in sizes:
        held += size
        if held >= limit:
            buckets, held, limit = buckets + 1, 0, BUCKET_BYTES
    return buckets + (held > 0)
