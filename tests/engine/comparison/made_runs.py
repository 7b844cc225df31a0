"""Run directories to compare, written without training."""

import dataclasses
import json
from pathlib import Path

from engine.config import OptimConfig, TrainConfig
from engine.run import directory
from model.presets import GPT2Config

TOKENS = 1000  # per step


def row(step: int, **fields) -> dict:
    return {"step": step, "tokens": TOKENS * step, **fields}


def rows(steps: int, every: int = 10, loss: float = 2.0, ms: float = 100.0) -> list[dict]:
    """A row per step, with a validation at every so many and at the end: the loss is `loss` + 1 / (1 + step)."""
    found = []
    for step in range(steps + 1):
        fields = {"val_loss": loss + 0.1 + 1 / (1 + step)} if step % every == 0 or step == steps else {}
        if step < steps:
            fields |= {"lr": 1e-3, "loss": loss + 1 / (1 + step), "grad_norm": 1.0, "tokens_per_s": 1e3 * TOKENS / ms}
            fields |= {"peak_gib": 0.5, "step_ms": ms, "data_ms": 0.1 * ms, "compute_ms": 0.9 * ms}
        found.append(row(step, **fields))
    return found


def make(path: Path, lines: list, tokenizer: str = "bytes", digest: str | None = "d1", **changes) -> Path:
    """A run with these rows; an item of `lines` may be bytes, which no row need be."""
    path.mkdir(parents=True)
    model = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=257 if tokenizer == "bytes" else 50257
    )
    config = TrainConfig(out=str(path), num_steps=100, tokens_per_step=TOKENS, model=model, optim=OptimConfig())
    config = dataclasses.replace(config, **changes)
    entry = {"step": 0, "tokenizer": tokenizer, "data_digest": digest, "precision": "fp32"}
    directory.write_config(config, tokenizer, {"precision": "fp32", "device": "cpu"}, [{**entry, "config": {}}])
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    (path / "metrics.jsonl").write_bytes(b"".join(texts))
    return path
