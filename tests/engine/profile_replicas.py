"""Profiles three updates on two ranks with each kind of guard.

torchrun runs it for test_guard_profile.py. The last line is JSON: for each guard and update, the sizes of all tensors
that were all-reduced, and how often a tensor's value was read, by the op that read it; "" is Step or the guard.
On a GPU each read would synchronise.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from engine import distributed, optim
from engine.config import OptimConfig
from engine.health.timing import Clock
from engine.step import Guard, Step
from model.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parents[2]
MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=16, vocab_size=257)  # 1.7 MB: two of DDP's buckets
NUM_STEPS, ACCUMULATION = 3, 2
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")  # item, float and bool; masks; torch.equal
TO_PYTHON = "aten::resolve_conj"  # called by tolist and numpy, which are no ops, and by matrix products


class NoGuard(Guard):
    """Guard that gives the optimizer no verdict."""

    def judge(self, *_):
        return None


class WaitingGuard(Guard):
    """Guard that reads its verdict with item() and tolist(), as a guard must not."""

    def judge(self, *numbers):
        verdict = super().judge(*numbers)
        assert verdict.item() == verdict.tolist() == 0.0  # two reads
        return verdict


def asker(event: FunctionEvent) -> str:
    """Name of the outermost op that this event is part of, or "" if it was called directly."""
    names = [""]
    while (event := event.cpu_parent) is not None and not event.name.startswith("update "):
        names.append(event.name)
    return names[-1] if names[-1] not in ("aten::item", "aten::is_nonzero") else ""


def is_read(event: FunctionEvent) -> bool:
    """Whether this event reads a tensor's value."""
    return event.name in READS or (event.name == TO_PYTHON and asker(event) == "")


with distributed.process_group() as ranks:
    tokens = torch.randint(257, (NUM_STEPS, ACCUMULATION, 2, 17), generator=torch.Generator().manual_seed(ranks.rank))
    profiles = {}
    for kind in (Guard, NoGuard, WaitingGuard):
        torch.manual_seed(0)
        raw_model = GPT2(MODEL)
        model, optimizer = distributed.wrap(raw_model, ranks), optim.build(raw_model, OptimConfig())
        guard, scaler = kind(ranks.device, skip_z_score=3.0), torch.amp.GradScaler("cpu", enabled=False)
        update = Step(model, optimizer, scaler, guard, 1, 1.0, ranks, Clock(ranks.device))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for step in range(NUM_STEPS):
                with record_function(f"update {step}"):
                    mine = [(b[:, :-1], b[:, 1:]) for b in tokens[step]]
                    update(step, mine, 1e-3)
        assert guard.counts().tolist() == [0.0, 0.0]  # no update was skipped
        events = profiler.events()
        spans = sorted(
            (event.time_range.start, event.time_range.end) for event in events if event.name[:7] == "update "
        )
        inside = [[event for event in events if start <= event.time_range.start <= end] for start, end in spans]
        sums = [[event.input_shapes[0] for event in events if event.name == "gloo:all_reduce"] for events in inside]
        reads = [Counter(asker(event) for event in events if is_read(event)) for events in inside]
        calls = [sum(event.name == "c10d::allreduce_" for event in events) for events in inside]
        profiles[kind.__name__] = {"sums": sums, "calls": calls, "reads": reads}
    everyone = ranks.gather(profiles)
    ranks.print0(json.dumps({"num_parameters": sum(p.numel() for p in raw_model.parameters()), "ranks": everyone}))
distributed.leave(0)
