"""Ranks: the process group, collectives over all processes, and DDP or FSDP2 around the model.

torchrun starts one process per device and sets RANK, LOCAL_RANK and WORLD_SIZE. Without it there is
one process.
"""

import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engine import device, output, rendezvous
from engine.errors import BadInput
from model.gpt2 import GPT2

# Of one collective. Never reached: the heartbeat ends a run without progress, and knows who works and who is gone.
TIMEOUT = timedelta(days=7)

_had_peers = False  # whether this process ever joined a group of several: see leave


@dataclass(frozen=True)
class Ranks:
    """This process, its device, and collectives over all processes."""

    rank: int  # 0 to world_size - 1, over all hosts
    local_rank: int  # rank on this host, which is the index of its GPU
    world_size: int
    device: torch.device
    meeting: str = ""  # prefix of this attempt's keys in the store: see rendezvous.meet

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def print0(self, line: str) -> None:
        """Prints on rank 0."""
        if self.is_first:
            print(line, flush=True)

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, the same bits on each."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank. The value must be picklable."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Waits until every rank has reached this call."""
        self.gather(None)

    def gather(self, value: Any) -> list:
        """Values of all ranks, in rank order, on every rank. The values must be picklable."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Copies rank 0's tensors into those of every rank, in place. Shapes must be the same."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """If any rank raises BadInput inside, all ranks raise it, naming the ranks that failed.

        Without it one rank would exit with an error message and the others would wait for it in the
        next collective.
        """
        problem = None
        try:
            yield
        except BadInput as error:
            problem = str(error)
        problems = self.gather(problem)
        if not any(problems):
            return
        ranks_of: dict[str, list[str]] = {}  # message -> ranks
        for rank, message in enumerate(problems):
            if message:
                ranks_of.setdefault(message, []).append(str(rank))
        is_same = len(ranks_of) == 1 and None not in problems  # every rank raised this one
        lines = [message if is_same else f"rank {', '.join(at)}: {message}" for message, at in ranks_of.items()]
        raise BadInput("\n".join(lines))

    def check_alike(self, facts: dict[str, Any], who: str = "train") -> None:
        """Raises BadInput on every rank, naming what differs and where, unless all have the same facts."""
        gathered = self.gather(facts)
        wrong = []
        for name in facts:
            ranks_of: dict[str, list[str]] = {}  # value -> ranks
            for rank, theirs in enumerate(gathered):
                ranks_of.setdefault(str(theirs.get(name)), []).append(str(rank))
            if len(ranks_of) > 1:
                parts = [f"{value} on rank {', '.join(at)}" for value, at in ranks_of.items()]
                wrong.append(f"{name}: {'; '.join(parts)}")
        if wrong:
            raise BadInput(
                f"{who}: every rank must run the same thing, but these differ\n  " + "\n  ".join(wrong) + "\n  "
                "start all of them with the same flags, code, data and versions"
            )

    def connect_store(self) -> dist.Store | None:
        """A new connection to the rendezvous store, for another thread; None if there is one process."""
        if self.world_size == 1:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return dist.PrefixStore(self.meeting, store)


@contextmanager
def process_group(timeout_minutes: float = 10.0) -> Iterator[Ranks]:
    """Joins torchrun's process group, and leaves it at the end. One process joins none.

    timeout_minutes: of joining. After an exception a group of several stays: see leave. Raises
    BadInput if the processes cannot reach each other.
    """
    global _had_peers
    ranks = _read_environment()
    if ranks.device.type != "cpu":
        torch.accelerator.set_device_index(ranks.local_rank)
    if ranks.world_size > 1:
        has_joined, is_late = threading.Event(), threading.Event()
        watched = ranks.rank, ranks.world_size, 60 * timeout_minutes, has_joined, is_late
        watcher = threading.Thread(target=rendezvous.watch, args=watched, daemon=True)
        watcher.start()
        # torchrun sets 1, with which NCCL's own thread aborts the process when a peer is lost: SIGABRT in
        # place of a sentence and exit code 4. The heartbeat ends the waiting instead.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        kind, between = ranks.device.type, device.BACKENDS.get(ranks.device.type)
        backend = f"cpu:gloo,{kind}:{between}" if between else "gloo"
        try:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
            ranks = replace(ranks, meeting=rendezvous.meet(store, ranks.rank, ranks.world_size, is_late))
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(ranks.meeting, store),
                rank=rank,
                world_size=world_size,
                timeout=TIMEOUT,
                device_id=ranks.device if between else None,
            )
            dist.all_reduce(torch.zeros(1, device=ranks.device))  # the first collective, which connects the processes
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise BadInput(rendezvous.unreachable(ranks.rank, ranks.world_size, error)) from error
        finally:
            has_joined.set()
            watcher.join()
            _had_peers = True
    try:
        yield ranks
    except BaseException:
        if ranks.world_size == 1 and dist.is_initialized():
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> int:
    """Ends the process here if it was ever one of several; else returns the code.

    Taking a group down might wait for members that are gone. And gloo's threads free Python objects
    late: if Python is ending meanwhile, they abort the process.
    """
    if _had_peers:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _read_environment() -> Ranks:
    """Rank and device, as torchrun tells them. Raises BadInput if the variables make no sense."""
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    found = {name: os.environ.get(name, default) for name, default in names.items()}
    numbers = [int(text) if re.fullmatch(r"\d{1,6}", text) else -1 for text in found.values()]
    rank, local_rank, world_size, local_world_size = numbers
    lacks = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world_size > 1 and not os.environ.get(name)]
    if min(rank, local_rank, local_world_size - 1) < 0 or max(rank, local_rank) >= world_size or lacks:
        got = ", ".join([f"{name}={text}" for name, text in found.items()] + [f"no {name}" for name in lacks])
        raise BadInput(
            "distributed: LOCAL_RANK and RANK must be numbers below WORLD_SIZE, and several processes need MASTER_ADDR "
            f"and MASTER_PORT, got {got}; torchrun sets them all; for one process unset them, as with: env -u RANK -u "
            f"LOCAL_RANK -u WORLD_SIZE -u LOCAL_WORLD_SIZE {output.program()} train (a scheduler or container may "
            "have set them)"
        )
    kind = device.current().type
    if kind == "cpu":
        return Ranks(rank, local_rank, world_size, torch.device("cpu"))
    if world_size > 1 and kind not in device.BACKENDS:
        raise BadInput(
            f"distributed: several processes must be on CPUs or on GPUs with collectives, got {world_size} on {kind}, "
            "for which PyTorch has none; start one process, or put GPT2_DEVICE=cpu in front of the command"
        )
    if local_rank >= (count := torch.accelerator.device_count()):
        raise BadInput(
            f"distributed: a host must have a GPU for each of its processes, got {count} GPUs for local rank "
            f"{local_rank}; lower --nproc_per_node"
        )
    return Ranks(rank, local_rank, world_size, torch.device(kind, local_rank))


def wrap(
    raw_model: GPT2,
    ranks: Ranks,
    *,
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp",
    shard_size: int | None = None,
    reshard: bool = True,
    is_compiled: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Wraps the model for training: on the device, compiled if asked, gradients averaged.

    ddp wraps the raw model. fsdp and hsdp shard it in place and return it. They move it to the GPU
    block by block, so leave it on the CPU, and build the optimizer afterwards. shard_size: ranks
    per replica of hsdp; None: those of one host. reshard: free gathered weights after a block's
    forward. Raises BadInput if shard_size does not divide the number of ranks.
    """
    if parallel == "ddp":
        model = raw_model.to(ranks.device)
        if is_compiled:
            model = torch.compile(model, dynamic=False)
        if ranks.world_size == 1:
            return model
        device_ids = [ranks.local_rank] if ranks.device.type != "cpu" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no in-place op changes the view
    mesh = _mesh(ranks, parallel, shard_size)
    # Weights are gathered in the compute dtype, gradients are summed in float32.
    # The model itself casts activations.
    policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in raw_model.h:
        if is_compiled:
            block.compile(dynamic=False)  # per block: a graph of the whole model would contain all-gathers and hooks
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root's weights (the tied embedding's) stay float32: their gradient is the sum of the head's
    # and the embedding's, which bfloat16 would round before the ranks add theirs.
    # The backward pass begins with them. If they were freed, they would be gathered twice.
    fully_shard(raw_model, mesh=mesh, mp_policy=replace(policy, param_dtype=None), reshard_after_forward=False)
    for name in ("last_logits", "log_probabilities"):
        register_fsdp_forward_method(raw_model, name)
    return raw_model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `wrap` made, without torch.compile. Changes a wrapper in place."""
    if isinstance(model, DistributedDataParallel):
        model.module = uncompiled(model.module)
    for module in model.modules():
        module._compiled_call_impl = None  # what Module.compile sets
    return getattr(model, "_orig_mod", model)


def _mesh(ranks: Ranks, parallel: Literal["ddp", "fsdp", "hsdp"], shard_size: int | None) -> DeviceMesh:
    """Makes the device mesh.

    fsdp: (ranks,), one replica. hsdp: (replicas, shard_size), each replica over neighbouring ranks.
    """
    if not dist.is_initialized():  # one process, which no torchrun started
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if parallel == "fsdp":
        return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    size = shards(parallel, shard_size, ranks)  # of hsdp
    if ranks.world_size % size:
        even = [str(n) for n in range(1, ranks.world_size + 1) if ranks.world_size % n == 0]
        raise BadInput(
            f"distributed: the processes that share one replica must divide all {ranks.world_size} processes, got "
            f"{size}; set --shard-size to one of {', '.join(even)}"
        )
    shape = (ranks.world_size // size, size)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # which begin with 30 minutes (gloo) or 10 (NCCL)
        distributed_c10d._set_pg_timeout(TIMEOUT, group)
    return mesh


def shards(parallel: Literal["ddp", "fsdp", "hsdp"], shard_size: int | None, ranks: Ranks) -> int:
    """Number of ranks that share one copy of weights, gradients and moments."""
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return {"ddp": 1, "fsdp": ranks.world_size, "hsdp": shard_size or per_host}[parallel]


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only a shard of the model, so that every forward needs all ranks."""
    return isinstance(model, FSDPModule)


def synchronize_gradients(model: nn.Module, wanted: bool) -> None:
    """Sets whether the next backward pass averages gradients.

    Call it before the forward pass, because DDP reads the setting there.
    FSDP reduce-scatters after every micro-batch in any case: a rank has no room for whole
    gradients. Only its all-reduce over replicas waits for the last micro-batch.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted
    elif is_sharded(model):
        model.set_requires_all_reduce(wanted)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Clips the whole gradient. Returns its norm before: a float32 scalar, the same bits on each rank."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([local(p.grad) for p in parameters])
    if is_sharded(model):  # one all-reduce for all parameters; PyTorch's norm of DTensors makes one for each
        mesh, squared = parameters[0].grad.device_mesh, norm.to(device.widest(norm.device)).square()
        dist.all_reduce(squared, group=mesh.get_group("shard"))
        if mesh.ndim == 2:  # each replica has its own sum; replicas that differed in a bit would drift apart
            dist.broadcast(squared, group=mesh.get_group("replicate"), group_src=0)
        norm = squared.sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextmanager
def outside_training(raw_model: nn.Module) -> Iterator[None]:
    """Context manager for forwards without a backward, of any shape.

    Every rank must run the same number of forwards inside.
    A sharded model runs uncompiled and is resharded at the end.
    """
    if not is_sharded(raw_model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):  # else one compiled graph per batch shape and sample length
        yield
    for module in raw_model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
