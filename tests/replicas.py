"""Run by torchrun from test_train.py: train_step on two ranks, four micro-batches each, all of them different."""

import hashlib
import runpy
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from engine import distributed, optim
from engine.config import PRESETS
from engine.guard import Guard
from engine.timing import Clock
from model.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
train_step = runpy.run_path(str(ROOT / "engine" / "train.py"))["train_step"]

with distributed.process_group() as ranks:
    torch.manual_seed(0)
    raw_model = GPT2(GPT2Config(2, 2, 32, 16, 257))
    config = replace(PRESETS["tiny"], optim=replace(PRESETS["tiny"].optim, clip=1e9))
    every = torch.randint(257, (3, 4, 2, 2, 17), generator=torch.Generator().manual_seed(1))  # step, micro, rank, B, T
    start = {name: p.detach().clone() for name, p in raw_model.named_parameters()}

    all_of_it = every[0].reshape(-1, 17)
    raw_model(all_of_it[:, :-1], all_of_it[:, 1:]).backward()
    expected = {name: p.grad.clone() for name, p in raw_model.named_parameters()}
    raw_model.zero_grad()

    model = distributed.wrap(raw_model, ranks, config, False, torch.float32)
    optimizer = optim.build(raw_model, config)
    scaler, guard, clock = torch.amp.GradScaler("cpu", enabled=False), Guard(config, ranks.device), Clock(ranks.device)
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in raw_model.named_parameters()}) if not seen else None
    )
    for step in range(3):
        mine = [(b[:, :-1], b[:, 1:]) for b in every[step, :, ranks.rank]]
        train_step(model, optimizer, scaler, guard, mine, 1e-3, step, (False, False), config, ranks, clock)

    content = b"".join(p.detach().numpy().tobytes() for p in raw_model.parameters())
    digests = [None, None]
    dist.all_gather_object(digests, hashlib.sha256(content).hexdigest())
    moved = not all(torch.equal(p, start[name]) for name, p in raw_model.named_parameters())
    ranks.say(f"replicas equal: {digests[0] == digests[1] and moved}")
    close = all(torch.allclose(seen[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
    ranks.say(f"gradient is the mean over all micro-batches of all ranks: {close}")
