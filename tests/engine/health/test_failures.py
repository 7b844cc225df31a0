"""Out of memory and lost peers: told from other errors; advice that works."""

import dataclasses
import json
import os
from collections import namedtuple

import forks
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from engine.config import PRESETS, batch_shape
from engine.device import alloc_retries
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.health.failures import is_lost_peer, out_of_memory, out_of_memory_sentence

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ONE = Ranks(0, 0, 1, torch.device("cpu"))
CUDA = Ranks(0, 0, 1, torch.device("cuda", 0))


def config(**fields):
    return dataclasses.replace(PRESETS["gpt2"], **fields)


@pytest.fixture
def h200(monkeypatch):
    gpu = namedtuple("Gpu", "name total_memory")("NVIDIA H200", int(139.8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


def test_an_allocation_that_a_cpu_refuses_is_out_of_memory():
    with pytest.raises(RuntimeError) as info:
        torch.empty(10**15)
    assert out_of_memory(info.value)
    assert "asking for 3725290.3 GiB more" in out_of_memory_sentence(info.value, config(), 16, ONE)


def test_a_step_that_a_limit_on_the_process_stops_is_out_of_memory():
    program = """
import resource, sys
import torch
from engine.health.failures import out_of_memory
from model.gpt2 import GPT2, GPT2Config
model = GPT2(GPT2Config(1, 2, 32, 512, 257))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    tokens = torch.zeros(4096, 512, dtype=torch.int64)
    model(tokens, tokens).backward()
except Exception as error:
    print(type(error).__name__, out_of_memory(error))
"""
    done = forks.run("-c", program)
    assert done.stdout.split() == ["RuntimeError", "True"], done.stderr


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: out of memory"), False),
        (OSError(28, "No space left on device"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_memory_is_told_from_other_errors(error, is_memory):
    assert out_of_memory(error) is is_memory


def test_the_sentence_names_the_gpu_the_request_and_the_next_micro_batch(h200):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert out_of_memory_sentence(error, config(), 16, CUDA) == (
        "train: one step must fit into the memory of cuda:0, NVIDIA H200, 139.8 GiB, got out of memory at "
        "--micro-batch-size 16, asking for 2.00 GiB more; try --micro-batch-size 8 (the batch stays the same, in more "
        "micro-batches) or --recompute block"
    )


def test_on_a_cpu_the_sentence_names_its_memory():
    sentence = out_of_memory_sentence(MemoryError(), config(recompute="block"), 2, ONE)
    assert "the memory of this machine's CPU, " in sentence
    assert "GiB, got out of memory at --micro-batch-size 2; try --micro-batch-size 1 (" in sentence
    assert "--recompute" not in sentence


@pytest.mark.parametrize(("sequences", "world_size", "size"), [(512, 1, 16), (90, 1, 15), (90, 2, 9), (49, 1, 49)])
def test_the_micro_batch_that_it_advises_is_the_largest_that_runs(sequences, world_size, size):
    ranks = Ranks(0, 0, world_size, torch.device("cpu"))
    run = config(tokens_per_step=1024 * sequences, micro_batch_size=size)
    advised = int(
        out_of_memory_sentence(MemoryError(), run, size, ranks).split("try --micro-batch-size ")[1].split()[0]
    )
    assert advised < size
    assert batch_shape(dataclasses.replace(run, micro_batch_size=advised), world_size)[0] == advised
    for between in range(advised + 1, size):
        with pytest.raises(BadInput):
            batch_shape(dataclasses.replace(run, micro_batch_size=between), world_size)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        (
            {},
            "try --recompute attention, then --recompute block, then --parallel fsdp over more GPUs, then a --context "
            "shorter than 1024 or a smaller preset",
        ),
        (
            {"recompute": "attention"},
            "try --recompute block, then --parallel fsdp over more GPUs, then a --context shorter than 1024 or a "
            "smaller preset",
        ),
        (
            {"recompute": "block"},
            "try --parallel fsdp over more GPUs, then a --context shorter than 1024 or a smaller preset",
        ),
        (
            {"recompute": "block", "optim": PRESETS["tiny"].optim},
            "try --parallel fsdp over more GPUs, then a --context shorter than 1024 or a smaller preset",
        ),
        (
            {"recompute": "block", "parallel": "fsdp", "context": 512},
            "try a --context shorter than 512 or a smaller preset",
        ),
    ],
    ids=["none", "attention", "block", "muon", "fsdp"],
)
def test_one_sequence_that_does_not_fit_gets_the_steps_that_are_left(h200, fields, advice):
    sentence = out_of_memory_sentence(MemoryError(), config(**fields), 1, CUDA)
    assert sentence.split("; ")[1] == advice


def test_a_cpu_is_not_told_to_get_more_gpus():
    assert "GPU" not in out_of_memory_sentence(MemoryError(), config(), 1, ONE)


def test_retries_are_the_allocator_s(monkeypatch):
    assert alloc_retries(torch.device("cpu")) is None
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda device: {"num_alloc_retries": 3})
    assert alloc_retries(torch.device("cuda", 0)) == 3


# ---- Lost peers ----------------------------------------------------------------------------------------------------


# Two processes. Rank 1, a fork, answers the first all-reduce and not the second.
PAIR = """
import datetime, json, os, sys, time
import torch, torch.distributed as dist
for kind in ("hangs", "is gone"):
    child = os.fork()
    rank, store = 0 if child else 1, dist.FileStore(sys.argv[1] + kind, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=1))
    dist.all_reduce(torch.ones(3))
    if rank:
        time.sleep(3 if kind == "hangs" else 0)
        os._exit(0)
    try:
        dist.all_reduce(torch.ones(3))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
    dist.destroy_process_group()
os._exit(0)
"""


def test_a_real_peer_that_hangs_or_is_gone_is_recognised(tmp_path):
    done = forks.run("-c", PAIR, tmp_path / "pair", seconds=60)
    assert done.returncode == 0, done.stderr
    errors = [getattr(dist, name, RuntimeError)(message) for name, message in map(json.loads, done.stdout.splitlines())]
    assert len(errors) == 2
    assert all(map(is_lost_peer, errors)), errors
    assert "Timed out waiting 1000ms" in str(errors[0])
    assert "Connection" in str(errors[1])


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [10.0.0.2]:4711: Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("Timed out waiting 9000ms for recv operation to complete"), True),
        (RuntimeError("Timed out waiting 9000ms for send operation to complete"), True),
        (RuntimeError(GLOO), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (dist.DistStoreError("wait timeout after 5000ms"), True),
        (
            RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
            False,
        ),
        (RuntimeError("compiling the kernel timed out"), False),
        (RuntimeError("Timed out waiting for pending UserRRefs"), False),
        (RuntimeError("no kernel for backend gloo"), False),
        (RuntimeError("runs/gloo/checkpoints could not be read"), False),
        (TimeoutError("timed out"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (ValueError(GLOO), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:50] if isinstance(value, BaseException) else str(value),
)
def test_only_a_collective_s_errors_mean_a_lost_peer(error, is_lost):
    assert is_lost_peer(error) == is_lost
