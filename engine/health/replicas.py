"""Whether the ranks that should hold the same weights do, to the bit.

Under DDP every rank has its own copy, kept equal by making the same updates. Nothing would tell if a flipped bit, a
faulty device or a kernel that is not deterministic set one apart: the run would train the mean of two models.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.distributed import Ranks, is_sharded, local

CHECKSUM_CHUNK = 1 << 22  # elements, whose products take 32 MiB


def group(model: nn.Module, ranks: Ranks) -> dist.ProcessGroup | None:
    """The ranks, this one among them, that hold the same weights to the bit; None if this one has no equal."""
    if ranks.world_size == 1:
        return None
    if not is_sharded(model):
        return dist.group.WORLD
    mesh = next(model.parameters()).device_mesh
    return mesh.get_group("replicate") if mesh.ndim == 2 and mesh.size(0) > 1 else None


@torch.no_grad()
def check(raw_model: nn.Module, ranks: Ranks, replica_group: dist.ProcessGroup | None) -> str | None:
    """The same sentence on every rank, which names those whose weights are not their replicas' to the bit; or None.

    replica_group: of `group`. Where no majority says which weights are right, all ranks of the group are named. Waits
    for the GPU, and must be called on all ranks.
    """
    found = None
    if replica_group is not None:
        names, parameters = zip(*raw_model.named_parameters(), strict=True)
        sums = torch.stack([_checksum(local(p)) for p in parameters])
        gathered = [torch.empty_like(sums) for _ in range(dist.get_world_size(replica_group))]
        dist.all_gather(gathered, sums, group=replica_group)
        rows = [tuple(row.tolist()) for row in gathered]
        usual, holders = Counter(rows).most_common(1)[0]
        if holders < len(rows):
            has_majority = 2 * holders > len(rows)
            members = zip(dist.get_process_group_ranks(replica_group), rows, strict=True)
            others = [str(rank) for rank, row in members if not has_majority or row != usual]
            first = next(name for name, *column in zip(names, *rows, strict=True) if len(set(column)) > 1)
            found = (
                f"replicas: {len(rows)} of them must hold the same weights to the bit, got others on rank "
                f"{', '.join(others)}, first in {first}"
            )
    return "\n".join(said for said in dict.fromkeys(ranks.gather(found)) if said) or None


def _checksum(tensor: Tensor) -> Tensor:
    """sum_i (2 i + 1) bits_i modulo 2^64 of a float32 tensor, exact in any order of summation.

    An odd factor has an inverse, so no change of one element is lost; nor is a swap of two, below 2^31 elements.
    """
    bits = tensor.detach().contiguous().view(torch.int32).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), CHECKSUM_CHUNK):
        chunk = bits[start : start + CHECKSUM_CHUNK]
        total += (chunk * torch.arange(2 * start + 1, 2 * (start + len(chunk)), 2, device=bits.device)).sum()
    return total
