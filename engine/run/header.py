"""The first lines that a run prints: sizes of model, data and step, epochs, and an estimate of the time.

The estimate is for a CPU alone, where a preset made for GPUs takes years: FLOPs of the run over the
speed of one matrix product, measured here. It is made before the first step, which may take hours.
"""

import time
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch

from engine.config import MACHINES, PRESETS, TrainConfig
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
    sets: Sequence[tuple[str, int, int]] = ()  # directory, weight and training tokens of each; one has no directory


def show(
    config: TrainConfig, ranks: Ranks, corpus: Corpus, past: tuple[int, int], dtype: torch.dtype, runs_on: str
) -> None:
    """Prints it all on rank 0.

    past: steps and tokens done. dtype: of the matrix products. runs_on: lines that say what the run runs on.
    """
    if not ranks.is_first:
        return
    tokens = past[1] + (config.num_steps - past[0]) * config.tokens_per_step
    ranks.print0(sizes(config, corpus, ranks) + epochs(config, corpus, tokens) + documents(config) + runs_on)
    for one in each_set(corpus):
        if one.share * tokens / one.train > MANY_EPOCHS:
            warn(often(config, corpus.unit, one, tokens, past))
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


class Set(NamedTuple):
    """One of the data sets of a run."""

    of: str  # " of DIRECTORY", or "" if there is one set
    share: Fraction  # of the run's sequences
    train: int  # its training tokens


def each_set(corpus: Corpus) -> list[Set]:
    """The data sets of a corpus."""
    if len(corpus.sets) < 2:
        return [Set("", Fraction(1), corpus.train)]
    whole = sum(parts for _, parts, _ in corpus.sets)
    return [Set(f" of {directory}", Fraction(parts, whole), train) for directory, parts, train in corpus.sets]


def epochs(config: TrainConfig, corpus: Corpus, tokens: int) -> str:
    """A line for each set that says how often its training tokens are read. tokens: of the whole run."""
    lines = []
    for of, share, train in each_set(corpus):
        read = round(share * tokens)
        count = read / train
        decimals = next(n for n, least in ((0, 9.95), (1, 0.995), (2, 0.0)) if count >= least)
        form = f"{count:,.{decimals}f}" if count >= 0.01 else "under 0.01"
        part = f", {100 * float(share):.3g}% of the sequences" if of else ""
        lines.append(
            f"epochs{of}: {form}, {read:,} of {train:,} training {corpus.unit}s in {config.num_steps:,} steps{part}\n"
        )
    return "".join(lines)


def documents(config: TrainConfig) -> str:
    """The line about --document-mask, "" without it."""
    positions = "begin at 0 in each" if config.document_positions else "go on"
    return f"documents: attention stays inside each, positions {positions}\n" if config.document_mask else ""


def often(config: TrainConfig, unit: str, one: Set, tokens: int, past: tuple[int, int]) -> str:
    """The loud line about a small set. tokens: of the whole run. past: steps and tokens done."""
    room = int(MANY_EPOCHS * one.train / one.share) - past[1]  # tokens of the run
    enough = past[0] + max(1, room // config.tokens_per_step)
    lower = f", or lower --num-steps to about {enough:,}" if room > 0 else ""
    weight = ", or a lower weight" if one.of else ""
    return (
        f"train: THE CORPUS{one.of} IS READ {float(one.share * tokens / one.train):,.0f} TIMES: after some "
        f"{MANY_EPOCHS} times a model learns little more from a text, or learns it by heart; give more than these "
        f"{one.train:,} {unit}s{weight}{lower}"
    )


def time_on_a_cpu(config: TrainConfig, corpus: Corpus, step: int, processes: int, dtype: torch.dtype) -> str | None:
    """The line with the estimate for the steps from `step` on, or None if they take minutes."""
    flops = flops_per_token(config.model, config.sequence_length)
    steps = config.num_steps - step
    evaluations = 1 if config.eval_every is None else 1 + steps // config.eval_every
    of_step, of_evaluation = flops * config.tokens_per_step, flops * FORWARD * corpus.evaluated
    total = steps * of_step + evaluations * of_evaluation
    if steps == 0 or total / SLOWEST < WORTHWHILE:  # need not be measured
        return None
    speed = processes * matmul_flops(dtype)
    return estimate(config, step, total, (of_step, of_evaluation), speed)


def estimate(config: TrainConfig, done: int, flops: float, parts: tuple[float, float], speed: float) -> str | None:
    """The line with the estimate, loud if it is more than a day, or None if it is minutes.

    done: steps. flops: of the rest of the run. parts: FLOPs of a step, of an evaluation. speed: FLOP/s.
    """
    seconds, step, evaluation = (number / speed for number in (flops, *parts))
    if seconds < WORTHWHILE:
        return None
    text = (
        f"about {words(seconds)} on this CPU, an estimate: {flops:.2g} FLOPs at the {speed / 1e9:,.0f} GFLOP/s of a "
        f"matrix product here, {words(step)} a step"
    )
    if (busy := load()) is not None and busy[0] > busy[1]:
        text += f", while the load average is {busy[0]:.1f} on {busy[1]} CPUs"
    if config.max_minutes is not None and 60 * config.max_minutes < seconds:
        return f"time: {text}; it stops after {config.max_minutes:g} minutes (--max-minutes)"
    if seconds < DAY:
        return f"time: {text}"
    advice = shorter(config, done, step, evaluation, seconds)
    return (
        f"train: THIS RUN IS TOO LONG FOR A CPU: {text}; it starts all the same. Presets for a CPU are "
        f"{small_presets(config)}; {advice}; or train on a GPU"
    )


def shorter(config: TrainConfig, done: int, step: float, evaluation: float, seconds: float) -> str:
    """What makes a run shorter. done: steps; the others are seconds of one step, one evaluation and the rest."""
    if seconds > 2 * (config.num_steps - done) * step:
        return f"an evaluation takes about {words(evaluation)}, raise --eval-every or lower --eval-tokens"
    if step >= DAY:
        return "lower --tokens-per-step too"
    each = step + (evaluation / config.eval_every if config.eval_every is not None else 0.0)
    steps = max(1, int((DAY / 2 - evaluation) / each))
    if done + steps >= config.num_steps:
        return "lower --tokens-per-step too, and --eval-tokens"
    return f"--num-steps {done + steps} takes about {words(steps * each + evaluation)}"


def small_presets(config: TrainConfig) -> str:
    """Names of the presets sized for a CPU, with their tokens."""
    kinds = {257: "bytes", config.model.vocab_size: "the same tokens"}
    return ", ".join(f"{name} ({kinds.get(PRESETS[name].model.vocab_size, 'other tokens')})" for name in MACHINES)


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
