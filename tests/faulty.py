"""engine/train.py with one fault put into it: `torchrun tests/faulty.py FAULT RANK STEP PRESET --flags`.

FAULT happens on rank RANK (of this attempt, so that a restart may go well: only attempt 0) when it comes to STEP:
    nan         its loss is not a number                inf_grad    one of its gradients is infinite
    nudge       one weight moves by one bit             hang        it sleeps for an hour
    kill        SIGKILL to itself                       oom         memory runs out
    term        SIGTERM to itself                       stop        SIGSTOP to itself
    slow        every step takes a tenth of a second    none        nothing
    nan_always  as nan, from STEP on
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch

from engine import data
from model.gpt2 import GPT2

fault, rank, at_step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
is_here = int(os.environ.get("RANK", 0)) == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
now = {"step": -1}
models = []

_at, _init, _forward = data.Batches.at, GPT2.__init__, GPT2.forward


def at(self, step):
    """Marks where training is, and does what happens between two steps."""
    now["step"] = step
    if fault == "slow":
        time.sleep(0.1)
    if is_here and step == at_step:
        if fault == "hang":
            time.sleep(3600)
        elif fault in ("kill", "term", "stop"):
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}[fault])
        elif fault == "oom":  # no machine has as much
            torch.empty(10**15)
        elif fault == "nudge":
            with torch.no_grad():
                models[0].h[0].mlp.c_fc.weight.view(torch.int32)[3, 5] += 1
    return _at(self, step)


def init(self, *args, **options):
    """Remembers the model, the first of which is the one that is trained."""
    _init(self, *args, **options)
    models.append(self)
    if fault == "inf_grad" and is_here:
        self.h[0].mlp.c_fc.weight.register_hook(lambda g: g * float("inf") if now["step"] == at_step else g)


def forward(self, tokens, targets=None):
    """Spoils the loss, or through it a gradient."""
    out = _forward(self, tokens, targets)
    hit = is_here and self.training and targets is not None
    if (
        hit
        and fault.startswith("nan")
        and (now["step"] == at_step or (fault == "nan_always" and now["step"] >= at_step))
    ):
        out = out * float("nan")
    return out


data.Batches.at, GPT2.__init__, GPT2.forward = at, init, forward
path = str(ROOT / "engine" / "train.py")
sys.argv = [path, *sys.argv[4:]]
runpy.run_path(path, run_name="__main__")
