"""Presets: the config of each model, and the machine that it is for."""

import dataclasses
import math
from typing import Any, Literal

from engine.config.fields import OptimConfig, TrainConfig
from model.presets import PRESETS as MODEL_PRESETS
from model.presets import num_parameters, parameter_shapes

# Peak learning rate and tokens per step of each model, from table 2.1 of Brown et al. 2020,
# arXiv:2005.14165, with batches rounded to powers of two. GPT-2's were never published: each size
# takes those of the nearest GPT-3 model.
_GPT3_RECIPE = {
    "gpt2": (6.0e-4, 2**19),
    "gpt2-medium": (3.0e-4, 2**19),
    "gpt2-large": (2.5e-4, 2**19),
    "gpt2-xl": (2.0e-4, 2**20),
    "gpt3-small": (6.0e-4, 2**19),
    "gpt3-medium": (3.0e-4, 2**19),
    "gpt3-large": (2.5e-4, 2**19),
    "gpt3-xl": (2.0e-4, 2**20),
    "gpt3-2.7b": (1.6e-4, 2**20),
    "gpt3-6.7b": (1.2e-4, 2**21),
    "gpt3-13b": (1.0e-4, 2**21),
    "gpt3-175b": (0.6e-4, 2**22),
}


def _gpt(name: str) -> TrainConfig:
    lr, tokens_per_step = _GPT3_RECIPE[name]
    return TrainConfig(
        out=f"runs/{name}",
        num_steps=round(10e9 / tokens_per_step),
        tokens_per_step=tokens_per_step,
        model=MODEL_PRESETS[name],
        optim=OptimConfig(lr=lr),
    )


Recipe = Literal["preset", "fast"]
# Muon, half as many steps, linear decay: see docs/learning.md. The rates are of published runs of 124M parameters.
_FAST = OptimConfig("muon", lr=1.8e-3, muon_lr=0.02, schedule="wsd", decay_share=0.7, min_lr_ratio=0.0)


def with_recipe(preset: TrainConfig, recipe: Recipe) -> TrainConfig:
    """The preset with this recipe: "preset" is its own. "fast" changes the presets whose own is AdamW."""
    if recipe != "fast" or preset.optim.name == "muon":
        return preset
    lr = _FAST.lr * preset.optim.lr / _GPT3_RECIPE["gpt2"][0]  # smaller for larger models, as the preset's
    return dataclasses.replace(preset, num_steps=preset.num_steps // 2, optim=dataclasses.replace(_FAST, lr=lr))


_LINEAR = {"schedule": "wsd", "decay_share": 1.0, "min_lr_ratio": 0.0}  # linear decay to zero, from the warm-up on
_LAPTOP = TrainConfig(
    data="data/stdlib",
    out="runs/tiny",
    num_steps=760,
    tokens_per_step=1024,
    eval_every=190,
    eval_tokens=65_536,
    save_every=190,
    prompt="def ",
    sample_tokens=200,
    model=MODEL_PRESETS["tiny"],
    optim=OptimConfig("muon", lr=6e-3, muon_lr=0.04, muon_momentum=0.8, warmup_tokens=24 * 1024, beta2=0.99, **_LINEAR),
)

# What trains a preset; the others need GPUs.
MACHINES = {
    "tiny": "a laptop's CPU: two minutes, on bytes",
    "mini": "a CPU, on bytes",
    "small": "a laptop's CPU, on your own text",
}

PRESETS: dict[str, TrainConfig] = {
    "tiny": _LAPTOP,
    "mini": dataclasses.replace(
        _LAPTOP,
        out="runs/mini",
        num_steps=4000,
        tokens_per_step=4096,
        model=MODEL_PRESETS["mini"],
        optim=OptimConfig("muon", lr=2e-3, warmup_tokens=100 * 4096, **_LINEAR),
    ),
    "small": dataclasses.replace(
        _LAPTOP,
        data="data/mine",
        out="runs/small",
        num_steps=1000,
        tokens_per_step=2048,
        eval_every=100,
        eval_tokens=32_768,
        save_every=100,
        prompt="The ",
        sample_tokens=100,
        model=MODEL_PRESETS["small"],
        optim=dataclasses.replace(_LAPTOP.optim, warmup_tokens=50 * 2048),
    ),
} | {name: _gpt(name) for name in _GPT3_RECIPE}


def rows() -> list[dict[str, Any]]:
    """A row of JSON types for each preset. memory_bytes: weights, gradients and moments, without activations."""
    return [
        {
            "preset": name,
            "parameters": num_parameters(preset.model, padded=False),
            "n_layer": preset.model.n_layer,
            "n_head": preset.model.n_head,
            "n_embd": preset.model.n_embd,
            "context": preset.sequence_length,
            "tokens_per_step": preset.tokens_per_step,
            "num_steps": preset.num_steps,
            "tokens": preset.tokens_per_step * preset.num_steps,
            "optimizer": preset.optim.name,
            "peak_lr": preset.optim.lr,
            "peak_muon_lr": preset.optim.muon_lr if preset.optim.name == "muon" else None,
            "memory_bytes": _memory_bytes(preset),
            "machine": MACHINES.get(name, "GPUs"),
        }
        for name, preset in PRESETS.items()
    ]


def _memory_bytes(preset: TrainConfig) -> int:
    """Float32 numbers, as engine.planning.memory has them. Muon keeps one moment of the blocks' matrices, not two."""
    shapes = parameter_shapes(preset.model)
    matrices = [shape for name, shape in shapes.items() if name.startswith("h.") and len(shape) == 2]
    fewer = sum(map(math.prod, matrices)) - preset.optim.muon_rows * sum(rows for rows, _ in matrices)
    return 16 * num_parameters(preset.model) - 4 * fewer * (preset.optim.name == "muon")


COLUMNS = ("preset", "parameters", "L", "H", "C", "T", "a step", "in all", "lr", "memory")


def table() -> str:
    """The presets in 80 columns, and what the columns mean."""
    cells = [COLUMNS, *map(_cells, rows())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " ".join(f"{cell:>{width}}" if number else f"{cell:<{width}}" for number, (cell, width) in enumerate(zipped))
        for zipped in (zip(row, widths, strict=True) for row in cells)
    ]
    lines += ["", "L layers, H heads, width C, context T; tokens of a step and of the whole run;"]
    lines += ["peak learning rate of AdamW; memory of weights, gradients and moments alone (an"]
    lines += ["estimate; gpt2 plan adds the activations).", ""]
    lines += [f"{name}: {machine}" for name, machine in MACHINES.items()]
    return "\n".join([*lines, "The others need GPUs."])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    tokens, memory = row["tokens"], row["memory_bytes"]
    return (
        row["preset"],
        f"{row['parameters']:,}",
        *(f"{row[name]}" for name in ("n_layer", "n_head", "n_embd", "context")),
        f"{row['tokens_per_step']:,}",
        f"{tokens / 1e9:.1f}B" if tokens >= 1e9 else f"{tokens / 1e6:.1f}M",
        f"{row['peak_lr']:.1e}".replace("e-0", "e-"),
        f"{memory / 2**30:.1f} GiB" if memory >= 2**30 else f"{memory / 2**20:,.0f} MiB",
    )


def presets_help(prog: str) -> str:
    """What follows `gpt2 train --help`: the presets, and how to choose one."""
    return (
        f"usage: {prog} PRESET [--flag VALUE ...]\n       {prog} --config FILE [--flag VALUE ...]\n\n"
        f"Trains a GPT-2 on token shards; the same command goes on. PRESET is one of\n\n{table()}\n\n"
        f"{prog} PRESET --help lists all flags with the preset's values"
    )
