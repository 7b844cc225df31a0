"""Measures communication on two ranks, of which rank 1 begins each backward pass 50 ms late.

torchrun runs it for test_timing.py. On both ranks each backward pass takes 100 ms more after its first gradient, which
must not count as communication.
"""

import time

import torch
import torch.distributed as dist

from engine import distributed
from engine.health.timing import Clock
from model.gpt2 import GPT2, GPT2Config

with distributed.process_group() as ranks:
    torch.manual_seed(0)
    raw_model = GPT2(GPT2Config(2, 2, 32, 16, 257))
    clock = Clock(ranks.device)
    clock.watch(raw_model.wte.weight, raw_model.wpe.weight)
    raw_model.ln_f.weight.register_post_accumulate_grad_hook(lambda _: time.sleep(0.1))
    model = distributed.wrap(raw_model, ranks)
    tokens = torch.randint(257, (2, 16))
    seen = []
    for _ in range(4):
        with clock.part("update"):
            for is_last in (False, True):
                distributed.synchronize_gradients(model, is_last)
                loss = model(tokens, tokens)
                if is_last:
                    dist.barrier()
                    time.sleep(0.05 * ranks.rank)
                loss.backward()
            clock.synchronized()
        seen.append(clock.read())
    both = [None, None]
    dist.all_gather_object(both, [row["communication_ms"] for row in seen])
    ranks.print0(f"early rank waited: {min(both[0]):.1f} ms at least")
    ranks.print0(f"late rank waited: {min(both[1]):.1f} ms at least")
distributed.leave(0)
