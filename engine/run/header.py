"""The first lines that a run prints: sizes of model, data and step, epochs, and an estimate of the time.

The estimate is for a CPU alone, where a preset made for GPUs takes years: FLOPs of the run over the
speed of one matrix product, measured here. It is made before the first step, which may take hours.
"""

import time
from typing import NamedTuple

import torch

from engine.config import PRESETS, TrainConfig
from engine.distributed import Ranks
from engine.errors import warn
from engine.health.busy import load
from engine.run.progress import FORWARD, words
from model.presets import flops_per_token, num_parameters

# Repeats of a corpus are worth less and less: up to 4 epochs cost almost nothing, many more gain almost
# nothing. Source: Muennighoff et al. 2023, arXiv:2305.16264, abstract. The bound is ours.
MANY_EPOCHS = 16
DAY = 86_400.0  # seconds
WORTHWHILE = 600.0  # seconds; an estimate below is not shown, the first steps say it soon enough
SLOWEST = 1e10  # FLOP/s; on the slowest CPU an estimate below needs no measurement
SIZE, LIMIT = 512, 0.3  # width of the matrices, whose product takes milliseconds; seconds of measuring


class Corpus(NamedTuple):
    """Sizes of a run's data, in tokens, and of its batches."""

    unit: str  # token, or byte
    train: int
    val: int
    evaluated: int  # by one evaluation
    micro_batch_size: int
    accumulation: int
    origin: str = ""  # ", nanoGPT's ..." of files that another project wrote


def show(
    config: TrainConfig, ranks: Ranks, corpus: Corpus, past: tuple[int, int], dtype: torch.dtype, runs_on: str
) -> None:
    """Prints it all on rank 0.

    past: steps and tokens done. dtype: of the matrix products. runs_on: lines that say what the run runs on.
    """
    if not ranks.is_first:
        return
    tokens = past[1] + (config.num_steps - past[0]) * config.tokens_per_step
    ranks.print0(sizes(config, corpus, ranks) + epochs(config, corpus, tokens) + runs_on)
    if tokens / corpus.train > MANY_EPOCHS:
        warn(often(config, corpus, tokens))
    if ranks.device.type == "cpu" and (line := time_on_a_cpu(config, corpus, past[0], ranks.world_size, dtype)):
        (warn if line.startswith("train:") else ranks.print0)(line)


def sizes(config: TrainConfig, corpus: Corpus, ranks: Ranks) -> str:
    """Lines of model, data and step."""
    unit, parameters = corpus.unit, num_parameters(config.model, padded=False)
    return (
        f"{config.name}: {parameters:,} parameters; {corpus.train:,} training and {corpus.val:,} validation {unit}s in "
        f"{config.data}{corpus.origin}\n"
        f"step: {config.tokens_per_step:,} {unit}s = {corpus.micro_batch_size} sequences x {config.sequence_length} x "
        f"{corpus.accumulation} micro-batches x {ranks.world_size} processes on {ranks.device.type}\n"
    )


def epochs(config: TrainConfig, corpus: Corpus, tokens: int) -> str:
    """The line that says how often the training tokens are read. tokens: of the whole run."""
    count = tokens / corpus.train
    form = f"{count:,.0f}" if count >= 100 else f"{count:.2g}"
    return f"epochs: {form}, {tokens:,} of {corpus.train:,} training {corpus.unit}s in {config.num_steps:,} steps\n"


def often(config: TrainConfig, corpus: Corpus, tokens: int) -> str:
    """The loud line about a small corpus."""
    enough = max(1, MANY_EPOCHS * corpus.train // config.tokens_per_step)
    return (
        f"train: THE CORPUS IS READ {tokens / corpus.train:,.0f} TIMES: after some {MANY_EPOCHS} times a model learns "
        f"little more from a text, or learns it by heart; give more than these {corpus.train:,} {corpus.unit}s, or "
        f"lower --num-steps to about {enough:,}"
    )


def time_on_a_cpu(config: TrainConfig, corpus: Corpus, step: int, processes: int, dtype: torch.dtype) -> str | None:
    """The line with the estimate for the steps from `step` on, or None if they take minutes."""
    flops = flops_per_token(config.model, config.sequence_length)
    steps = config.num_steps - step
    evaluations = 1 if config.eval_every is None else 1 + steps // config.eval_every
    total = flops * (steps * config.tokens_per_step + FORWARD * evaluations * corpus.evaluated)
    if steps == 0 or total / SLOWEST < WORTHWHILE:  # need not be measured
        return None
    speed = processes * matmul_flops(dtype)
    return estimate(config, total, flops * config.tokens_per_step, speed)


def estimate(config: TrainConfig, flops: float, flops_per_step: float, speed: float) -> str | None:
    """The line with the estimate, loud if it is more than a day, or None if it is minutes. speed: FLOP/s."""
    seconds, step = flops / speed, flops_per_step / speed
    if seconds < WORTHWHILE:
        return None
    text = (
        f"about {words(seconds)} on this CPU, an estimate: {flops:.2g} FLOPs at the {speed / 1e9:,.0f} GFLOP/s of a "
        f"matrix product here, {words(step)} a step"
    )
    if (busy := load()) is not None and busy[0] > busy[1]:
        text += f", while the load average is {busy[0]:.1f} on {busy[1]} CPUs"
    if seconds < DAY:
        return f"time: {text}"
    steps = max(1, int(DAY / 2 / step))
    advice = f"--num-steps {steps} takes about {words(steps * step)}" if step < DAY else "lower --tokens-per-step too"
    return (
        f"train: THIS RUN IS TOO LONG FOR A CPU: {text}; it starts all the same. Presets for a CPU are "
        f"{small_presets(config)}; {advice}; or train on a GPU"
    )


def small_presets(config: TrainConfig) -> str:
    """Names of the presets sized for a CPU, with their tokens."""
    kinds = {257: "bytes", config.model.vocab_size: "the same tokens"}
    names = [name for name in ("tiny", "mini", "small") if name in PRESETS]
    return ", ".join(f"{name} ({kinds.get(PRESETS[name].model.vocab_size, 'other tokens')})" for name in names)


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this CPU, the best of a few, with the threads that this process uses."""
    left, best, now = torch.ones(SIZE, SIZE, dtype=dtype), float("inf"), time.perf_counter()
    end = now + LIMIT
    while now < end:
        before = now
        left @ left
        now = time.perf_counter()
        best = min(best, now - before)
    return 2 * SIZE**3 / max(best, 1e-9)
