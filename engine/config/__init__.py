"""Config of a training run: its fields, presets and command line.

`gpt2 train PRESET --flag value`: the preset sets every field, and each flag changes one. Nested
fields are dotted (`--optim.lr 3e-4`, `--model.dropout 0.1`). A file of --config stands between the
two. Imports no PyTorch, so that --help is fast.
"""

from engine.config.fields import (
    GPT_PROMPT,
    OptimConfig,
    Precision,
    TrainConfig,
    batch_shape,
    is_read,
    parse_profile,
)
from engine.config.file import CONFIG_FILE, from_dict, load, to_dict
from engine.config.parse import Asked, parse, with_sizes_of_weights
from engine.config.presets import MACHINES, PRESETS, presets_help

__all__ = [
    "CONFIG_FILE",
    "GPT_PROMPT",
    "MACHINES",
    "PRESETS",
    "Asked",
    "OptimConfig",
    "Precision",
    "TrainConfig",
    "batch_shape",
    "from_dict",
    "is_read",
    "load",
    "parse",
    "parse_profile",
    "presets_help",
    "to_dict",
    "with_sizes_of_weights",
]
