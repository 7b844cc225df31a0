"""The memory model against what a step of the engine really takes."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from bench.counts import memory as counted
from engine import distributed, optim
from engine.config import PRESETS, TrainConfig
from engine.distributed import Ranks
from engine.health import replicas
from engine.health.timing import Clock
from engine.planning import memory
from engine.planning.memory import PARTS, Place
from engine.step import Guard, Step
from model.gpt2 import GPT2
from model.presets import GPT2Config, num_parameters

SMALL = GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=64, vocab_size=257)
LARGE_VOCABULARY = GPT2Config(n_layer=3, n_head=2, n_embd=128, n_positions=64, vocab_size=3000)
MUON = {"B": 1, "micro_batches": 2, "preset": "tiny"}
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_of(model, B, micro_batches=1, world_size=1, preset="gpt2", **changes) -> TrainConfig:
    tokens = B * model.n_positions * micro_batches * world_size
    return dataclasses.replace(PRESETS[preset], model=model, tokens_per_step=tokens, micro_batch_size=B, **changes)


def summed(_, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def peak(config: TrainConfig, precision: str, world_size: int = 1) -> int:
    """Bytes of one rank's step on this CPU: what it holds between steps, and the most above that."""
    ranks, raw_model = Ranks(0, 0, world_size, CPU), GPT2(config.model)
    sharding = {"parallel": config.parallel, "shard_size": config.shard_size, "reshard": config.reshard}
    model = distributed.wrap(raw_model, ranks, **sharding, compute_dtype=DTYPES[precision])
    if world_size > 1 and config.parallel == "ddp":
        model.register_comm_hook(None, summed)
    raw_model.configure("torch", DTYPES[precision], config.recompute)
    optimizer = optim.build(raw_model, config.optim, replicas.group(model, ranks))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = Step(model, optimizer, scaler, Guard(CPU), 1, 1.0, ranks, Clock(CPU))
    B, T = config.micro_batch_size, config.sequence_length
    tokens = torch.zeros(B, T, dtype=torch.int64)
    micro_batches = [(tokens, tokens)] * (config.tokens_per_step // (B * T * world_size))
    steps = itertools.count()
    for _ in range(2):  # the first makes the optimizer's state, DDP orders its buckets after it
        step(next(steps), micro_batches, 1e-3)
    tensors = [*raw_model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    tensors += [copy for module in raw_model.modules() for copy in getattr(module, "copies", {}).values()]
    tensors += list(raw_model.parameters()) if world_size > 1 and config.parallel == "ddp" else []  # buckets
    held = sum(distributed.local(tensor).nbytes for tensor in tensors)
    return held + counted(lambda: step(next(steps), micro_batches, 1e-3))["peak_bytes"]


@pytest.fixture
def four_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        pytest.param(config_of(SMALL, 8), "fp32", id="head"),
        pytest.param(config_of(SMALL, 8, recompute="block"), "fp32", id="block recomputed"),
        pytest.param(config_of(SMALL, 8, recompute="attention"), "fp32", id="attention recomputed"),
        pytest.param(config_of(SMALL, 2, micro_batches=2), "fp32", id="micro-batches"),
        pytest.param(config_of(LARGE_VOCABULARY, 8), "fp32", id="large vocabulary"),
        pytest.param(config_of(LARGE_VOCABULARY, 2, 2, recompute="block"), "fp32", id="end of backward"),
        pytest.param(config_of(SMALL, 1, 2, preset="tiny"), "fp32", id="Muon"),
        pytest.param(config_of(SMALL, 2), "bf16", id="bf16"),
        pytest.param(config_of(LARGE_VOCABULARY, 8), "bf16", id="bf16 large", marks=pytest.mark.slow),
        pytest.param(config_of(SMALL, 8, recompute="block"), "bf16", id="bf16 block", marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_real_peak(config, precision):
    estimate = memory.step_bytes(config, config.micro_batch_size, precision, Place(device_type="cpu"))
    assert estimate == pytest.approx(peak(config, precision), rel=0.1)


@pytest.mark.parametrize(
    ("parallel", "changes", "precision"),
    [
        pytest.param("ddp", {}, "fp32", id="ddp"),
        pytest.param("fsdp", {}, "fp32", id="fsdp"),
        pytest.param("ddp", MUON, "fp32", id="ddp-muon", marks=pytest.mark.slow),
        pytest.param("fsdp", MUON, "fp32", id="fsdp-muon", marks=pytest.mark.slow),
        pytest.param("fsdp", {"reshard": False}, "fp32", id="fsdp-kept", marks=pytest.mark.slow),
        pytest.param("fsdp", {}, "bf16", id="fsdp-bf16", marks=pytest.mark.slow),
        pytest.param("hsdp", {"shard_size": 2}, "fp32", id="hsdp", marks=pytest.mark.slow),
    ],
)
def test_so_it_is_on_one_of_four_ranks(four_ranks, parallel, changes, precision):
    sizes = {"B": 4, "world_size": 4} | changes
    config = config_of(SMALL, parallel=parallel, **sizes)
    estimate = memory.step_bytes(config, sizes["B"], precision, Place(4, device_type="cpu"))
    assert estimate == pytest.approx(peak(config, precision, 4), rel=0.1)


@pytest.mark.parametrize(
    ("precision", "peer"), [("bf16", "ours compiled"), ("bf16", "ours eager"), ("tf32", "ours compiled")]
)
def test_the_estimate_is_within_a_hundredth_of_what_an_h200_measured(precision, peer):
    rows = json.loads((ROOT / "bench/results/nvidia-h200/gpu.json").read_text())["rows"]
    case = f"gpt2 B=64 {precision}"
    row = next(row for row in rows if (row["section"], row["case"], row["peer"]) == ("step", case, peer))
    config = config_of(PRESETS["gpt2"].model, 64)  # the benchmark makes one micro-batch
    place = Place(is_compiled=peer.endswith("compiled"))
    measured = row["figures"]["peak memory"]["value"]
    assert memory.step_bytes(config, 64, precision, place) == pytest.approx(measured, rel=0.01)


def test_the_parts_are_named_and_sum_to_the_step():
    found = memory.parts(PRESETS["gpt2-xl"], 8, "bf16", Place(8))
    assert tuple(found) == PARTS
    assert sum(found.values()) == memory.step_bytes(PRESETS["gpt2-xl"], 8, "bf16", Place(8))
    count = num_parameters(PRESETS["gpt2-xl"].model)
    assert (found["weights"], found["gradients"], found["moments"]) == (4 * count, 4 * count, 8 * count)


def test_sharding_divides_what_a_rank_holds_and_recomputing_lowers_what_it_stores():
    config = dataclasses.replace(PRESETS["gpt2-xl"], parallel="fsdp")
    two, eight = (memory.parts(config, 4, "bf16", Place(world_size)) for world_size in (2, 8))
    assert two["moments"] == pytest.approx(4 * eight["moments"], rel=0.001)
    sizes = [
        memory.step_bytes(dataclasses.replace(config, recompute=part), 4, "bf16", Place(8))
        for part in ("block", "attention", "none")
    ]
    assert sizes == sorted(sizes)
    kept = memory.step_bytes(dataclasses.replace(config, reshard=False), 4, "bf16", Place(8))
    assert kept > sizes[-1]


def test_ddp_on_several_gpus_returns_gradients_early_though_compiled():
    config = dataclasses.replace(PRESETS["gpt2-xl"], recompute="block")
    compiled, uncompiled = (memory.step_bytes(config, 4, "bf16", Place(8, is_compiled=is_)) for is_ in (True, False))
    assert compiled == uncompiled


def test_muon_keeps_one_moment_of_the_blocks_matrices():
    adamw, muon = (
        memory.parts(config_of(SMALL, 8, preset=name), 8, "fp32", Place(device_type="cpu")) for name in ("gpt2", "tiny")
    )
    assert adamw["moments"] - muon["moments"] == 4 * 12 * 4 * 128**2


def test_muon_s_moments_and_rows_are_sharded_too():
    held = []
    for rows in (False, True):
        settings = dataclasses.replace(PRESETS["tiny"].optim, muon_rows=rows)
        optimizer = optim.build(GPT2(SMALL), settings)
        optim.allocate_state(optimizer)
        states = optimizer.state.values()
        held.append(sum(t.nbytes for state in states for name, t in state.items() if name != "step"))
        for parallel, shards in (("ddp", 1), ("fsdp", 4)):
            config = config_of(SMALL, 8, world_size=4, preset="tiny", parallel=parallel, optim=settings)
            found = memory.parts(config, 8, "fp32", Place(4, device_type="cpu"))["moments"]
            assert found == pytest.approx(held[-1] / shards, rel=1e-3)
    assert held[1] - held[0] == 4 * 4 * 9 * 128  # 3C + C + 4C + C rows a block
