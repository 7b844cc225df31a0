"""Speed of bf16 over fp32 on this CPU, for a training step and not for one product.

A step also casts, normalises and adds, and bf16 makes that slower. So a small model's forward and
backward passes are timed: embedding, a block with attention, and a head. It is as wide as the model
that will train, because narrow ones gain less.
"""

import functools
import time
from dataclasses import replace

import torch

from model.gpt2 import GPT2, cast_once
from model.presets import GPT2Config

USUAL = GPT2Config(n_layer=1, n_head=4, n_embd=256, n_positions=256, vocab_size=4096)  # 5.6 GFLOP in a pass
TOKENS, ROUNDS = 512, 4  # of a pass; passes of each precision, at most
WIDEST = 1024
LIMIT = 1.2  # seconds, after which no pass begins


def matmul_seconds(dtype: torch.dtype) -> float:
    """Best time of three products of 256 x 256 matrices: 3 ms in fp32 on one slow core."""
    left = torch.ones(256, 256, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return best


def small_like(model: GPT2Config) -> GPT2Config:
    """One block of the model's width and context, with a vocabulary of 4,096 at most. A very wide model is cut."""
    small = replace(
        model,
        n_layer=1,
        n_positions=min(model.n_positions, TOKENS),
        vocab_size=min(model.vocab_size, USUAL.vocab_size),
        dropout=0.0,
    )
    return small if model.n_embd <= WIDEST else replace(small, n_head=WIDEST // 64, n_embd=WIDEST)


@functools.cache
def step_speedup(config: GPT2Config = USUAL) -> float:
    """Time of a small step in fp32 over its time in bf16, each the best of at most ROUNDS, in turns."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    with torch.random.fork_rng([]):
        model = GPT2(config)
    sequences = max(1, TOKENS // config.n_positions)
    tokens = torch.arange(sequences * config.n_positions).view(sequences, -1) % config.vocab_size
    for dtype in best:  # the first pass of a process imports modules, for two seconds on a slow core
        _pass_seconds(model, tokens[:1, :8], dtype)
    began = time.perf_counter()
    for place in range(2 * ROUNDS):
        if place >= 2 and time.perf_counter() - began > LIMIT:
            break
        dtype = [*best][place % 2]
        best[dtype] = min(best[dtype], _pass_seconds(model, tokens, dtype))
    return best[torch.float32] / best[torch.bfloat16]


def _pass_seconds(model: GPT2, tokens: torch.Tensor, dtype: torch.dtype) -> float:
    """Time of a forward and a backward pass, with the weights' casts."""
    model.configure("torch", dtype)
    model.zero_grad()
    start = time.perf_counter()
    with cast_once(model):
        model(tokens, tokens).backward()
    return time.perf_counter() - start
