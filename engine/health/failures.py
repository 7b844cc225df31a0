"""Error messages for out of memory, a full disk and a lost peer, which say what to do.

Any other exception is a bug of ours, and keeps its traceback.
"""

import errno
import re
from collections.abc import Callable

import torch
import torch.distributed as dist

from engine import system
from engine.config import TrainConfig
from engine.device import BACKENDS, describe, format_bytes
from engine.distributed import Ranks
from engine.errors import BadInput, Lost

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}

# Messages of out-of-memory errors that have no type of their own: PyTorch's CPU allocator on Linux
# and on Windows, the runtimes of CUDA and ROCm, their BLAS asking for a workspace, and MPS.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "BLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
# Gloo's errors have no type of their own either, but begin with the place in its source.
_LOST_PEER = re.compile(
    r"gloo/(transport|rendezvous)/|Connection closed by peer \[|Timed out waiting \d+ms for (send|recv) operation"
)


def explain(
    error: BaseException, config: TrainConfig, micro_batch_size: int | None, ranks: Ranks, where: Callable[[], str]
) -> BadInput | Lost | None:
    """The error to raise in place of this one, or None if it is a bug of ours.

    micro_batch_size: None before the first step, when memory holds the model alone. where:
    says which step each rank is at; called only for a lost peer, since it may wait for the store.
    """
    if out_of_memory(error):
        return BadInput(out_of_memory_sentence(error, config, micro_batch_size, ranks))
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        if isinstance(error.__context__, BadInput):  # a save that found no room either, and says how much it needs
            return error.__context__
        return BadInput(
            f"train: --out must have room for the run's record, got {error.strerror} in {config.out}; make "
            "room there; the same command goes on from the last checkpoint"
        )
    if is_lost_peer(error):
        return Lost(
            f"train: all {ranks.world_size} processes must answer within the {config.timeout_minutes:g} "
            f"min of --timeout-minutes, got {_first_line(error)} at {where()}; check hosts and network "
            "(NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the interface); the same command goes on from the last "
            "checkpoint"
        )
    message = None if isinstance(error, ImportError) else system.sentence(error, "train")
    return None if message is None else BadInput(f"{message}; the same command goes on from the last checkpoint")


# ---- Lost peers ---------------------------------------------------------------------------------------------------


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that a collective failed because a peer did not answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    """The cause, without gloo's file name in front and its advice behind."""
    line = re.sub(r"^\[\S+?\] ", "", str(error).strip().partition("\n")[0])
    return line.partition(". This is typically")[0] or repr(error)


# ---- Memory -------------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


def out_of_memory_sentence(
    error: BaseException, config: TrainConfig, micro_batch_size: int | None, ranks: Ranks
) -> str:
    """What to change so that a step fits, the cheapest first; for an error that is out_of_memory.

    micro_batch_size: None if the model itself did not fit.
    """
    request, device = _request(error), describe(ranks.device)
    more = f", asking for {request} more" if request else ""
    if micro_batch_size is None:
        advice = _advice_for_model(config, ranks)
        return f"train: the model must fit into the memory of {device}, got out of memory before step 1{more}; {advice}"
    return (
        f"train: one step must fit into the memory of {device}, got out of memory at --micro-batch-size "
        f"{micro_batch_size}{more}; {_advice(config, micro_batch_size, ranks)}"
    )


def _advice_for_model(config: TrainConfig, ranks: Ranks) -> str:
    can_shard = config.parallel == "ddp" and ranks.device.type in BACKENDS
    return "try " + ("--parallel fsdp over more GPUs, then " if can_shard else "") + "a smaller preset"


def no_room_for_the_model(error: BaseException, command: str) -> str | None:
    """The error message of a command that makes no step, or None if the error is not out_of_memory."""
    if not out_of_memory(error):
        return None
    request = _request(error)
    return (
        f"{command}: the model and its work must fit into memory, got out of memory"
        f"{f', asking for {request} more' if request else ''}; free memory, raise this process's limit (ulimit -v, or "
        "the container's), or use a machine with more"
    )


def _advice(config: TrainConfig, micro_batch_size: int, ranks: Ranks) -> str:
    if micro_batch_size > 1:
        sequences = config.tokens_per_step // (config.sequence_length * ranks.world_size)  # of one rank, per step
        smaller = max(size for size in range(1, micro_batch_size) if sequences % size == 0)
        also = " or --recompute block" if config.recompute == "none" else ""
        return f"try --micro-batch-size {smaller} (the batch stays the same, in more micro-batches){also}"
    steps = {"none": ["--recompute attention", "--recompute block"], "attention": ["--recompute block"]}
    left = steps.get(config.recompute, []).copy()
    if config.parallel == "ddp" and ranks.device.type in BACKENDS:
        left.append("--parallel fsdp over more GPUs")
    left.append(f"a --context shorter than {config.sequence_length}")
    return f"try {', then '.join(left)} or a smaller preset"


def _request(error: BaseException) -> str | None:
    """Size of the allocation that failed, from PyTorch's message."""
    if match := re.search(r"[Tt]ried to allocate (\d[\d.]* [KMG]i?B)", str(error)):
        return match[1]
    match = re.search(r"tried to allocate (\d+) bytes", str(error))
    return format_bytes(int(match[1])) if match else None
