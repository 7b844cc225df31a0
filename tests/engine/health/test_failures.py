"""Out of memory: told from other errors, and its advice works."""

import dataclasses
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from conftest import ROOT

from engine.config import PRESETS, batch_shape
from engine.device import alloc_retries
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.health.failures import out_of_memory, out_of_memory_sentence

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
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
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
            "try --parallel fsdp over more GPUs with --optim.name adamw, then a --context shorter than 1024 or a "
            "smaller preset",
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
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 3})
    assert alloc_retries(torch.device("cuda", 0)) == 3
