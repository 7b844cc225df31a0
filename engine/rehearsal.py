"""The update of a run on many GPUs, rehearsed by one process on a CPU: what one of its ranks holds, sends and reads.

Model, wrapping, optimizer, batches and update are those of a run. Floating-point tensors are fake: they
have storages of so many bytes, but no memory. So is the process group: its collectives return at
once. Nothing is compiled, and the ops are PyTorch's for a CPU. Integers are real. What a run does
around its updates is left out: it reads numbers, which fake tensors do not have.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup, _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import distributed, optim, start, step
from engine.config import TrainConfig, batch_shape
from engine.distributed import Ranks
from engine.optim import muon
from engine.parts import Past
from engine.tokens.batches import Batches
from kernels import cross_entropy

UPDATES = 3  # 0 to 2, of which 2 is looked at: the optimizer has its state, and DDP knows the order of its gradients
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")
# Purposes as engine.planning.communication names them: by phase and kind, else by kind and bytes, else by kind.
PURPOSES = {
    ("forward", "all_gather"): "weights, forward",
    ("backward", "all_gather"): "weights, backward",
    ("backward", "reduce_scatter"): "gradients",
    ("backward", "all_reduce"): "gradients of replicas",
}
BY_BYTES = {
    ("all_reduce", 4): "overflow",
    ("all_reduce", 8): "norm of the gradient",
    ("all_reduce", 20): "loss and signals",
    ("broadcast", 8): "norm of the gradient of replicas",
}
BY_KIND = {"broadcast": "Muon's matrices", "all_to_all": "Muon's matrices"}


class Call(NamedTuple):
    """A collective. payload_bytes: as engine.planning.communication has them."""

    purpose: str
    kind: str
    group_size: int
    payload_bytes: int


class OneOfMany(Ranks):
    """A rank whose peers say what it says. It writes and prints nothing."""

    is_first = False

    def gather(self, value):
        return [value] * self.world_size

    def broadcast_object(self, value):
        return value


class Seen(TorchDispatchMode):
    """Makes new floating-point tensors fake. Sees collectives, and the bytes of storages that are alive."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.phase, self.live, self.peak = "", 0, 0
        self.storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types:  # whose own dispatch comes back here with local tensors
            return NotImplemented
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        word = op.name().replace("_", "") if "c10d" in op.namespace else ""
        if kind := next((kind for kind in KINDS if kind.replace("_", "") in word), None):
            boxed = next((each for each in args if isinstance(each, torch.ScriptObject)), None)
            group = _resolve_process_group(args[-1]) if boxed is None else ProcessGroup.unbox(boxed)
            size, purpose = max(each.nbytes for each in inputs), PURPOSES.get((self.phase, kind))
            purpose = purpose or BY_BYTES.get((kind, size)) or BY_KIND.get(kind, "unknown")
            self.calls.append(Call(purpose, kind, group.size(), size))
        is_new = not inputs and (kwargs.get("dtype") or torch.float32).is_floating_point
        is_fake = is_new or any(isinstance(each, FakeTensor) for each in inputs)
        if is_fake and op.namespace == "c10d":
            work = FakeWork().boxed()
            return work if kind == "all_to_all" else (args[0], work)
        with nullcontext() if is_fake else unset_fake_temporarily():
            outputs = op(*args, **kwargs)
        if op is torch.ops.gpt2.linear_cross_entropy_torch.default:  # fake tensors know its outputs, not its logits
            with self, patch.object(cross_entropy, "_mend_far_losses", lambda *_: None):  # which reads the losses
                cross_entropy._fill_torch(outputs, *args)
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor) and each.layout == torch.strided:  # a sparse one's values were seen before
                self.see(each.untyped_storage())
        return outputs

    def see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.free(key)), 0
        ref, before = self.storages[key]
        self.storages[key] = ref, storage.nbytes()
        self.live += storage.nbytes() - before
        self.peak = max(self.peak, self.live)

    def free(self, key: int) -> None:
        self.live -= self.storages.pop(key)[1]


@contextmanager
def one_of(world_size: int, rank: int, per_host: int) -> Iterator[Ranks]:
    """This process as a rank of a fake process group."""
    warnings.filterwarnings("ignore", "Set timeout is now only supported")  # and needed
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield OneOfMany(rank, rank % per_host, world_size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def rehearse(config: TrainConfig, ranks: Ranks, precision: str) -> tuple[dict[str, int], list[Call]]:
    """What this rank holds in its last update, in bytes by part and at the peak, and its collectives in order."""
    seen, held, resize = Seen(), {}, torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> None:  # FSDP frees gathered weights so, without an op
        resize(storage, size)
        seen.see(storage)

    def holds(part: str, tensors: Iterable[Tensor]) -> None:
        storages = {id(each): each for each in (distributed.local(tensor).untyped_storage() for tensor in tensors)}
        held[part] = sum(each.nbytes() for each in storages.values())

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        seen.phase = name
        if name == "optimizer":
            holds("gradients", (p.grad for p in raw_model.parameters()))
        yield

    def bucket(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        seen.calls.append(Call("gradients", "all_reduce", ranks.world_size, bucket.buffer().nbytes))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    patches = patch.object(torch.UntypedStorage, "resize_", resized), patch.object(step, "phase", phase)
    no_value = patch.object(muon, "is_readable", lambda flag: False)  # a fake flag has none
    with (
        closing(batches(config, ranks)) as data,
        FakeTensorMode(allow_non_fake_inputs=True),
        seen,
        patches[0],
        patches[1],
        no_value,
    ):
        raw_model, _ = start.first_weights(config, Past({}, None, step=0, tokens=0), ranks, None)
        raw_model.to = lambda device: raw_model  # where it is already; fake parameters cannot be replaced
        update = start.build_step(config, raw_model, ranks, precision, is_compiled=False)
        if isinstance(update.model, DistributedDataParallel):  # whose all-reduces are no ops
            update.model.register_comm_hook(None, bucket)
        for index in range(distributed.is_sharded(raw_model), UPDATES):
            seen.calls, seen.peak = [], seen.live
            in_vocabulary = [tuple(t % config.model.vocab_size for t in pair) for pair in data.at(index)]
            update(index, in_vocabulary, optim.learning_rate(index, config))
        holds("weights", raw_model.parameters())
        holds("moments", (each for state in update.optimizer.state.values() for each in state.values() if each.ndim))
    return held | {"peak": seen.peak}, seen.calls


def batches(config: TrainConfig, ranks: Ranks, size: int | None = None) -> Batches:
    """Batches of a rank, whose corpus is just enough, and in which each token is the number of its window.

    size: of a micro-batch; None: of batch_shape.
    """
    count = UPDATES * config.tokens_per_step // config.sequence_length
    stream = SimpleNamespace(num_windows=lambda T: count)
    stream.window_rows = lambda numbers, T: np.broadcast_to(numbers[:, None], (len(numbers), T + 1))
    return Batches(
        stream,
        context=config.sequence_length,
        tokens_per_step=config.tokens_per_step,
        micro_batch_size=size or batch_shape(config, ranks.world_size)[0],
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def partition(config: TrainConfig, ranks: Ranks) -> tuple[list[list[list[int]]], bool]:
    """Windows of every rank's micro-batches in the last update, and whether they are all of it, in order, each once."""

    def read(**changes) -> list[list[int]]:
        with closing(batches(config, replace(ranks, **changes.pop("of", {})), **changes)) as data:
            return [tokens[:, 0].tolist() for tokens, _ in data.at(UPDATES - 1)]

    found = [read(of={"rank": rank}) for rank in range(ranks.world_size)]
    (whole,) = read(of={"rank": 0, "world_size": 1}, size=config.tokens_per_step // config.sequence_length)
    in_order = [number for position in zip(*found, strict=True) for windows in position for number in windows]
    return found, in_order == whole and len({*whole}) == len(whole)
