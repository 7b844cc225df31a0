"""engine/train.py with injected faults: `torchrun tests/whole/faulty.py FAULT:RANK:STEP[,...] PRESET --flags`.

A fault happens on rank RANK at step STEP, in the first attempt only, so that a restart can succeed ("slow" in all):
    nan       its loss is NaN                   inf       one of its gradients is infinite
    nudge     one weight changes by one bit     hang      it sleeps for an hour
    kill      SIGKILL to itself                 term      SIGTERM to itself
    stop      SIGSTOP to itself                 slow      this and later steps take 50 ms more
    token     its data holds a bad token        bug       it raises an exception of no meaning
    eval      each batch of a validation from STEP on takes a second more
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from engine.tokens import batches  # noqa: E402
from model.gpt2 import GPT2  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
FAULTS = {}
for entry in sys.argv[1].split(","):
    name, rank, at_step = entry.split(":")
    if int(rank) == RANK and (name == "slow" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"):
        FAULTS[name] = int(at_step)
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}

now = -1
models = []
_at, _init, _forward = batches.Batches.at, GPT2.__init__, GPT2.forward


def at(self, step):
    """Records the current step and injects the faults that happen between two steps."""
    global now
    now = step
    if step >= FAULTS.get("slow", 10**9):
        time.sleep(0.05)
    for name in (name for name, at_step in FAULTS.items() if at_step == step):
        if name in SIGNALS:
            os.kill(os.getpid(), SIGNALS[name])
        elif name == "hang":
            time.sleep(3600)
        elif name == "bug":
            raise ZeroDivisionError("a bug of ours")
        elif name == "token":
            self.stream.vocab_size, self._ahead = 1, None  # so that the check of what is read fails
        elif name == "nudge":
            with torch.no_grad():
                models[0].h[0].mlp.c_fc.weight.view(torch.int32)[3, 5] += 1
    return _at(self, step)


def init(self, *args, **options):
    """Remembers each model; the first is the one that is trained."""
    _init(self, *args, **options)
    models.append(self)
    if "inf" in FAULTS:
        self.h[0].mlp.c_fc.weight.register_hook(lambda g: g * float("inf") if now == FAULTS["inf"] else g)


def forward(self, tokens, targets=None):
    """Makes the loss NaN at the step of that fault, and validation slow."""
    if not self.training and now >= FAULTS.get("eval", 10**9):
        time.sleep(1.0)
    out = _forward(self, tokens, targets)
    return out * float("nan") if self.training and now == FAULTS.get("nan") else out


batches.Batches.at, GPT2.__init__, GPT2.forward = at, init, forward
sys.argv = [str(ROOT / "engine" / "train.py"), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
