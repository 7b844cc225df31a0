"""Compares gradients on Triton under DDP and FSDP2, on two ranks, with those of PyTorch on one.

torchrun runs it for test_kernel_model.py.
"""

import torch
from tolerances import assert_same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine import distributed
from model.gpt2 import GPT2, GPT2Config

with distributed.process_group() as ranks:
    torch.manual_seed(0)
    raw_model = GPT2(GPT2Config(2, 2, 32, 16, 257)).to(ranks.device)
    batches = torch.randint(257, (2, 2, 9), generator=torch.Generator().manual_seed(1)).to(ranks.device)  # rank, B, T

    raw_model(batches[:, :, :-1].flatten(0, 1), batches[:, :, 1:].flatten(0, 1)).backward()  # all batches, on PyTorch
    expected = [p.grad.clone() for p in raw_model.parameters()]
    raw_model.zero_grad()

    raw_model.configure("triton", torch.float32)
    model = distributed.wrap(raw_model, ranks)
    model(batches[ranks.rank, :, :-1], batches[ranks.rank, :, 1:]).backward()
    assert_same([p.grad for p in raw_model.parameters()], expected)
    ranks.print0("gradient is the mean over both ranks: True")

    torch.manual_seed(0)
    sharded = GPT2(GPT2Config(2, 2, 32, 16, 257)).to(ranks.device)
    sharded.configure("triton", torch.float32)
    mesh = init_device_mesh(ranks.device.type, (2,))
    for block in sharded.h:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(batches[ranks.rank, :, :-1], batches[ranks.rank, :, 1:]).backward()
    assert_same([p.grad.full_tensor() for p in sharded.parameters()], expected)
    ranks.print0("so it is where parameters are sharded: True")
distributed.leave(0)
