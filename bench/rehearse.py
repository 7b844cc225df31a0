"""A step of a run on many GPUs, rehearsed on this CPU: what one of its ranks holds, sends and reads, against the plan.

Model, wrapping, optimizer, batches and update are the engine's own. Its floating-point tensors are fake: they have shapes
and storages of so many bytes, but no memory. Its process group is fake too: a collective returns at once. Nothing is
compiled, and the ops are PyTorch's for a CPU. If something differs from engine.planning, the exit code is 1.
"""

import argparse
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  (collectives of fake tensors)
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.tables import amount
from engine import distributed, optim, start
from engine import step as steps
from engine.config import PRESETS, TrainConfig, batch_shape
from engine.distributed import Ranks
from engine.errors import BAD_INPUT, DONE, BadInput
from engine.parts import Past
from engine.planning.communication import communication, padded_elements
from engine.tokens.batches import Batches
from kernels import cross_entropy
from model.presets import parameter_shapes

FAILED = 1
UPDATES = 3  # of which the last is counted: AdamW has its moments then, and DDP the order of its gradients
DIGITS = 7 * np.arange(4)  # bits of a window's number, in its first tokens
KINDS = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}
KINDS |= {"all_reduce": "all_reduce", "broadcast": "broadcast"}
NAMES = {  # of collectives: phase, kind and, after the backward pass, bytes
    ("forward", "all_gather"): "weights, forward",
    ("backward", "all_gather"): "weights, backward",
    ("backward", "reduce_scatter"): "gradients",
    ("backward", "all_reduce"): "gradients of replicas",
    ("optimizer", "all_reduce", 4): "overflow",
    ("optimizer", "all_reduce", 8): "norm of the gradient",
    ("optimizer", "broadcast", 8): "norm of the gradient of replicas",
    ("optimizer", "all_reduce", 20): "loss and signals",
}


@dataclass(frozen=True)
class Call:
    """A collective: its purpose, kind, bytes of the whole tensor, and ranks."""

    name: str
    kind: str
    payload_bytes: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.kind:<14} {amount(self.payload_bytes, 'B'):>8} {self.group_size:>6,} ranks  {self.name}"


class OneOfMany(Ranks):
    """A rank whose peers say what it says. It writes and prints nothing."""

    is_first = False

    def gather(self, value):
        return [value] * self.world_size

    def broadcast_object(self, value):
        return value


class Windows:
    """A corpus of so many windows, each of which begins with its own number."""

    def __init__(self, count: int):
        self.count = count

    def num_windows(self, context: int) -> int:
        return self.count

    def windows(self, indices: np.ndarray, context: int) -> Tensor:
        found = torch.zeros(len(indices), context + 1, dtype=torch.int64)
        found[:, : len(DIGITS)] = torch.from_numpy(indices[:, None] >> DIGITS & 127)
        return found

    @staticmethod
    def numbers(tokens: Tensor) -> list[int]:
        return (tokens[:, : len(DIGITS)].numpy() << DIGITS).sum(1).tolist()


class Counter(TorchDispatchMode):
    """Makes new floating-point tensors fake, and counts collectives and the bytes of storages that are alive."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.phase, self.live, self.peak, self.gradients = "", 0, 0, 0
        self.storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types:  # whose own dispatch comes back here with local tensors
            return NotImplemented
        if op.namespace in ("prim", "profiler"):
            return op(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if op.namespace in ("c10d", "_c10d_functional"):
            self.sees_collective(op.name(), args, inputs)
        is_new = not inputs and (kwargs.get("dtype") or torch.float32).is_floating_point
        is_fake = is_new or any(isinstance(each, FakeTensor) for each in inputs)
        with nullcontext() if is_fake else unset_fake_temporarily():
            outputs = op(*args, **kwargs)
        if op is torch.ops.gpt2.linear_cross_entropy_torch.default:  # fake ones run no code: here is its chunk of logits
            with self:
                cross_entropy._fill_torch(outputs, *args)
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor):
                self.sees(each.untyped_storage())
        return outputs

    def sees(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self.storages or self.storages[key][0]() is not storage:
            self.storages[key] = weakref.ref(storage, lambda _: self.frees(key)), 0
        ref, before = self.storages[key]
        self.storages[key] = ref, storage.nbytes()
        self.live += storage.nbytes() - before
        self.peak = max(self.peak, self.live)

    def frees(self, key: int) -> None:
        self.live -= self.storages.pop(key)[1]

    def sees_collective(self, op: str, args: tuple, inputs: list[Tensor]) -> None:
        kind = next((kind for word, kind in KINDS.items() if word in op), None)
        if kind is not None:
            groups = [ProcessGroup.unbox(each) for each in args if isinstance(each, torch.ScriptObject)]
            self.adds(kind, max(each.nbytes for each in inputs), groups[0].size() if groups else 0)

    def adds(self, kind: str, size: int, ranks: int) -> None:
        key = (self.phase, kind) if self.phase != "optimizer" else (self.phase, kind, size)
        self.calls.append(Call(NAMES.get(key, f"of {self.phase or 'no phase'}"), kind, size, ranks))
