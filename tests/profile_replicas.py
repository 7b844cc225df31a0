"""Run by torchrun from test_guard_profile.py: what three updates of two ranks sum, and where they wait for a number.

The last line is JSON: for each way of judging, for each update, the all-reduces of each number of elements, and each
call that hands a number of a tensor to Python or C++, with where it came from.
"""

import runpy
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine import distributed, optim
from engine.config import TrainConfig
from engine.guard import Guard
from engine.timing import Clock
from model.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
train_step = runpy.run_path(str(ROOT / "engine" / "train.py"))["train_step"]
MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
CONFIG = TrainConfig(model=MODEL, skip_z_score=3.0)
NUM_STEPS, ACCUMULATION = 3, 2


class Unguarded(Guard):
    """Judges nothing: the optimizer is given no verdict."""

    def judge(self, loss, grad_norm):
        return None


with distributed.process_group() as ranks:
    tokens = torch.randint(257, (NUM_STEPS, ACCUMULATION, 2, 17), generator=torch.Generator().manual_seed(ranks.rank))
    found = {}
    for kind in (Guard, Unguarded):
        torch.manual_seed(0)
        raw_model = GPT2(MODEL)
        model = distributed.wrap(raw_model, ranks, CONFIG, False, torch.float32)
        optimizer = optim.build(raw_model, CONFIG)
        scaler, guard, clock = (
            torch.amp.GradScaler("cpu", enabled=False),
            kind(CONFIG, ranks.device),
            Clock(ranks.device),
        )
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_stack=True) as profiler:
            for step in range(NUM_STEPS):
                with record_function(f"update {step}"):
                    mine = [(b[:, :-1], b[:, 1:]) for b in tokens[step]]
                    train_step(model, optimizer, scaler, guard, mine, 1e-3, step, (False, False), CONFIG, ranks, clock)
        if ranks.is_first:
            for e in profiler.events():
                if any(w in e.name for w in ("reduce", "item", "_local_scalar", "update", "is_nonzero", "bucket")):
                    print(
                        kind.__name__,
                        e.name,
                        e.input_shapes,
                        e.thread,
                        e.time_range.start,
                        [x for x in (e.stack or [])][:4],
                        e.cpu_parent.name if e.cpu_parent else None,
                    )
