"""Bitwise comparison of the weights of ranks that must hold the same ones.

Under DDP every rank has its own copy of the weights, kept equal by making the same updates. A
flipped bit, a faulty device or a non-deterministic kernel could change one copy. Without this check
the run would then go on and average the gradients of different models.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.distributed import Ranks, is_sharded, local

CHECKSUM_CHUNK = 1 << 22  # elements per chunk; their int64 products take 32 MiB


def group(model: nn.Module, ranks: Ranks) -> dist.ProcessGroup | None:
    """Process group of the ranks with the same weights as this one; None if it is the only one."""
    if ranks.world_size == 1:
        return None
    if not is_sharded(model):
        return dist.group.WORLD
    mesh = next(model.parameters()).device_mesh
    return mesh.get_group("replicate") if mesh.ndim == 2 and mesh.size(0) > 1 else None


@torch.no_grad()
def check(raw_model: nn.Module, ranks: Ranks, replica_group: dist.ProcessGroup | None) -> str | None:
    """Error message naming the ranks whose weights differ from their replicas', or None.

    The message is the same on every rank.
    replica_group: from `group`. If no majority of the group has the same weights, all its ranks are
    named. Waits for the GPU. All ranks call it.
    """
    message = None
    if replica_group is not None:
        names, parameters = zip(*raw_model.named_parameters(), strict=True)
        sums = torch.stack([_checksum(local(p)) for p in parameters])
        gathered = [torch.empty_like(sums) for _ in range(dist.get_world_size(replica_group))]
        dist.all_gather(gathered, sums, group=replica_group)
        rows = [tuple(row.tolist()) for row in gathered]
        most_common, count = Counter(rows).most_common(1)[0]
        if count < len(rows):
            has_majority = 2 * count > len(rows)
            members = zip(dist.get_process_group_ranks(replica_group), rows, strict=True)
            others = [str(rank) for rank, row in members if not has_majority or row != most_common]
            first = next(name for name, *column in zip(names, *rows, strict=True) if len(set(column)) > 1)
            message = (
                f"replicas: {len(rows)} of them must hold the same weights to the bit, got others on rank "
                f"{', '.join(others)}, first in {first}"
            )
    return "\n".join(message for message in dict.fromkeys(ranks.gather(message)) if message) or None


def _checksum(tensor: Tensor) -> Tensor:
    """Checksum of a float32 tensor: sum_i (2 i + 1) bits_i modulo 2^64.

    The sum is exact in any order.
    It detects every change of one element, since odd factors are invertible. It detects every swap
    of two different elements in a tensor of fewer than 2^31.
    """
    bits = tensor.detach().contiguous().view(torch.int32).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), CHECKSUM_CHUNK):
        chunk = bits[start : start + CHECKSUM_CHUNK]
        total += (chunk * torch.arange(2 * start + 1, 2 * (start + len(chunk)), 2, device=bits.device)).sum()
    return total
