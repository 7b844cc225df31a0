"""The collectives that engine.planning.communication names, against those that a step of the engine really calls."""

from collections import Counter
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.distributed import _functional_collectives as functional_collectives
from torch.utils._python_dispatch import TorchDispatchMode

from engine import distributed, optim
from engine.config import OptimConfig, TrainConfig
from engine.distributed import Ranks
from engine.health import replicas
from engine.planning.communication import communication, muon_communication, num_buckets
from model.gpt2 import GPT2
from model.presets import PRESETS, GPT2Config

SMALL = GPT2Config(n_layer=3, n_head=2, n_embd=48, n_positions=20, vocab_size=200)


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture
def four_ranks():
    """A process group of four of which only this process exists: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield Ranks(0, 0, 4, torch.device("cpu"))
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts calls and bytes of the larger tensor by kind."""

    KINDS: ClassVar = {
        "allgather": "all_gather",
        "reduce_scatter": "reduce_scatter",
        "allreduce": "all_reduce",
        "alltoall": "all_to_all",
    }

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            name = next((kind for word, kind in self.KINDS.items() if word in op.name()), "broadcast")
            self.add(name, max(nbytes([t]) for t in tensors))
        return op(*args, **(kwargs or {}))

    def add(self, kind: str, number: int) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += number


WIDE = GPT2Config(2, 2, 258, n_positions=33, vocab_size=257)  # four shards of its tensors are padded, two are not
LARGE_VOCABULARY = GPT2Config(1, 2, 64, n_positions=33, vocab_size=5000)  # its last gradient fills DDP's first bucket
ADAMW, MUON = OptimConfig(), OptimConfig("muon", muon_rows=True)


@pytest.mark.parametrize(
    ("config", "parallel", "reshard", "precision", "micro_batches", "settings"),
    [
        pytest.param(WIDE, "ddp", True, "fp32", 2, ADAMW, id="ddp"),
        pytest.param(LARGE_VOCABULARY, "ddp", True, "fp32", 1, MUON, id="ddp-one-bucket-muon"),
        pytest.param(WIDE, "fsdp", True, "bf16", 2, ADAMW, id="fsdp", marks=pytest.mark.slow),
        pytest.param(WIDE, "fsdp", False, "fp32", 1, MUON, id="fsdp-kept-muon"),
        pytest.param(WIDE, "hsdp", True, "bf16", 2, ADAMW, id="hsdp", marks=pytest.mark.slow),
        pytest.param(WIDE, "hsdp", True, "bf16", 2, MUON, id="hsdp-muon"),
    ],
)
def test_a_step_sends_the_bytes_that_communication_counts(
    four_ranks, config, parallel, reshard, precision, micro_batches, settings
):
    shards = {"ddp": 1, "fsdp": 4, "hsdp": 2}[parallel]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    raw_model = GPT2(config)
    model = distributed.wrap(
        raw_model, four_ranks, parallel=parallel, shard_size=2, reshard=reshard, compute_dtype=dtype
    )
    raw_model.configure("torch", dtype)
    optimizer, seen = optim.build(raw_model, settings, replicas.group(model, four_ranks)), Collectives()

    def see_bucket(state, bucket):
        seen.add("all_reduce", nbytes([bucket.buffer()]))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    if parallel == "ddp":
        model.register_comm_hook(None, see_bucket)
    tokens = torch.zeros(1, 33, dtype=torch.int64)
    for _ in range(3):  # DDP learns the order of its gradients in the first, and tells the others before the second
        seen.calls.clear()
        seen.bytes.clear()
        with seen:
            for index in range(micro_batches):
                distributed.synchronize_gradients(model, index == micro_batches - 1)
                model(tokens, tokens).backward()
            distributed.clip(model, 1.0)
            optimizer.step()
            four_ranks.sum(torch.zeros(5))
        raw_model.zero_grad(set_to_none=True)
    calls, sent = Counter(), Counter()
    of_muon = muon_communication(TrainConfig(model=config, parallel=parallel, optim=settings), 4, shards, rank=0)
    for each in of_muon + communication(
        config, 4, parallel, precision, micro_batches=micro_batches, reshard=reshard, shard_size=2
    ):
        calls[each.kind] += each.calls
        sent[each.kind] += each.payload_bytes
    assert (seen.calls, seen.bytes) == (calls, sent)


def test_shards_tell_each_other_of_an_overflow(four_ranks, monkeypatch):
    raw_model = GPT2(SMALL)
    distributed.wrap(raw_model, four_ranks, parallel="fsdp", compute_dtype=torch.float16)
    for p in raw_model.parameters():
        p.grad = torch.ones_like(p)
    sent, all_reduce = [], functional_collectives.all_reduce

    def seen(tensor, *args, **kwargs):
        sent.append(nbytes([tensor]))
        return all_reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(functional_collectives, "all_reduce", seen)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.AdamW(raw_model.parameters(), fused=True))
    assert sent == [each.payload_bytes for each in communication(SMALL, 4, "fsdp", "fp16") if each.name == "overflow"]


def test_wire_bytes_are_those_of_a_ring():
    both = {each.name: each for each in communication(PRESETS["gpt2"], 8, "fsdp", "bf16")}
    gathered, summed = both["weights, forward"], both["loss and signals"]
    assert gathered.wire_bytes == 7 / 8 * gathered.payload_bytes
    assert summed.wire_bytes == 2 * 7 / 8 * 20
    assert communication(PRESETS["gpt2"], 1) == []


def test_a_rank_without_a_matrix_broadcasts_nothing():
    config = TrainConfig(model=SMALL, optim=MUON)
    assert [muon_communication(config, n, 1)[0].calls for n in (4, 12, 64)] == [4, 12, 12]  # 3 blocks of 4 matrices


def test_a_bucket_is_full_once_it_has_reached_its_size():
    mib = 2**20
    assert num_buckets([mib, 25 * mib, 24 * mib, 2 * mib, 1]) == 4  # 1, 25, 24 + 2, the rest
    assert num_buckets([mib - 4, 4, 4]) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(world_size=0), "at least 1"),
        (dict(world_size=2, precision="int8"), "must be one of bf16"),
        (dict(world_size=2, parallel="tensor"), "must be ddp"),
        (dict(world_size=6, parallel="hsdp", shard_size=4), "must divide 6"),
    ],
)
def test_communication_rejects_what_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        communication(SMALL, **wrong)
