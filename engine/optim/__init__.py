"""AdamW with GPT-3's settings, Muon for the matrices of the blocks, and the learning-rate schedule.

`build` makes the optimizer of a model; `learning_rate` is a function of the step.
"""

from engine.optim.groups import allocate_state, build, set_learning_rate
from engine.optim.muon import Muon, orthogonalize
from engine.optim.schedule import learning_rate, warmup_steps

__all__ = [
    "Muon",
    "allocate_state",
    "build",
    "learning_rate",
    "orthogonalize",
    "set_learning_rate",
    "warmup_steps",
]
