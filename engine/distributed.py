"""Processes and devices: who this process is, what it computes on, and sums and agreements over all of them.

torchrun starts one process per device and sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one process.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import BadInput

TIMEOUT = timedelta(minutes=10)  # for one collective: a rank may be preparing data or compiling


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int  # 0 to world_size - 1, over all hosts
    local_rank: int  # on this host: the index of its GPU
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Prints on rank 0."""
        if self.is_first:
            print(line, flush=True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, the same bits on each."""
        return self.sum(value) / self.world_size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, the same bits on each."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def agree(self, value: Any) -> Any:
        """Rank 0's value of any picklable thing, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the processes that torchrun started, or stands alone, and leaves at the end."""
    ranks = _read_environment()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        keep_freed_memory()
    if ranks.world_size > 1:
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        device_id = ranks.device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed tensors for the next ones; does nothing elsewhere.

    By default it returns every megabyte to the kernel, which hands it back page by page: a step of `tiny` on 512
    bytes with AdamW took 48 ms so and 42 ms with this (medians of 4 interleaved runs, 2 cores of an AMD EPYC Milan,
    torch 2.13).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, the largest allocation that is taken from the heap, in bytes
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, free bytes at the top of the heap that are returned


def _read_environment() -> Ranks:
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if not torch.cuda.is_available():
        return Ranks(rank, local_rank, world_size, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise BadInput(
            f"distributed: a host must have a GPU for each of its processes, got {torch.cuda.device_count()} GPUs for "
            f"local rank {local_rank}; lower --nproc_per_node"
        )
    return Ranks(rank, local_rank, world_size, torch.device("cuda", local_rank))


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with its gradients averaged over all ranks, each time synchronize_gradients asks for it."""
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.local_rank] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def synchronize_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next forward and backward pass averages gradients. Call it before the forward: DDP decides there."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted
