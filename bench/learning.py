"""Tokens and seconds that each recipe needs to the same validation loss: `python -m bench.learning DIR`.

Every run is one `gpt2 train` with one thread on Python's standard library. DIR holds the run directories; the same
command goes on where it was stopped. `--tune` tries learning rates, with seeds of its own, and validates on a tenth of
the training text. Reported is the loss on the validation documents.

The reference is a case's first arm. See engine.comparison.equal_loss for the ratios and their intervals. "adamw again"
differs from "adamw" in its seeds alone, so its ratio must be 1 within its interval. Exit codes: 0 done, 1 a run failed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench import machine, measure, results, tables
from bench.results import Figure, Row, spread
from engine import start
from engine.comparison import equal_loss
from engine.comparison.equal_loss import Losses
from engine.config import TrainConfig, batch_shape, load, parse
from engine.distributed import Ranks
from engine.run import plots
from engine.run.rows import METRICS_FILE
from engine.tokens import tokenizer
from engine.tokens.shards import TokenStream
from model.gpt2 import GPT2

EIGHT = range(1, 9)  # seeds of the arms that matter
FACTORS, TUNING_SEEDS = (0.6, 1.0, 1.7), range(101, 103)  # of an arm's learning rates; of no reported run
ALL = "--eval-every None --save-every None --save-every-minutes None --sample-tokens 1 --check-replicas-every None"


@dataclass(frozen=True)
class Arm:
    """A recipe, in flags of `gpt2 train`, and the runs that measure it."""

    name: str
    flags: str
    lengths: tuple[int, ...]  # steps, each with a whole schedule of its own
    seeds: range = range(1, 4)
    like: str = ""  # the arm whose slope one of a single length borrows


@dataclass(frozen=True)
class Case:
    """A model and its data. The first arm is the reference."""

    name: str
    flags: str
    tokenizer: str
    arms: tuple[Arm, ...]


WARM = "--optim.name adamw --optim.lr 3e-3 --optim.warmup-tokens 77824"
GPT3 = f"{WARM} --optim.schedule cosine --optim.min-lr-ratio 0.1 --optim.beta2 0.95"  # as the GPT presets have it
BYTES = (
    Arm("adamw", GPT3, (760,), EIGHT),
    Arm("recipe", "", (304, 380), EIGHT),
    Arm("adamw, tuned", f"{WARM} --optim.beta1 0.8", (570, 760), EIGHT),
    Arm("recipe, cosine", "--optim.schedule cosine --optim.min-lr-ratio 0.1", (380,), like="recipe"),
    Arm("recipe, momentum 0.95", "--optim.muon-momentum 0.95", (380,), like="recipe"),
    Arm("adamw again", GPT3, (760,), range(9, 13), like="adamw, tuned"),
)
CASES = (Case("tiny", "tiny", "bytes", BYTES),)


def gpt2(*words: object) -> None:
    """Runs the command `gpt2` with one thread. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "engine.cli", *map(str, words)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)


def prepare(case: Case, directory: Path) -> tuple[Path, Path]:
    """Two data sets of the standard library: for tuning, from the training documents alone, and for the report."""
    whole, part = (directory / f"data-{case.tokenizer}-{kind}" for kind in ("all", "tuning"))
    gpt2("prepare", "stdlib", "--out", whole, "--tokenizer", case.tokenizer, "--val-fraction", "0.2")
    text = part.with_name(f"{part.name}-text")
    if not text.exists():
        words, writing = tokenizer.load(case.tokenizer), text.with_name(f"{text.name}.writing")
        writing.mkdir(exist_ok=True)
        tokens = TokenStream.open(whole, "train", words.vocab_size)
        tokens = tokens.read(0, len(tokens))
        for number, document in enumerate(np.split(tokens, np.flatnonzero(tokens == words.end_of_text))):
            (writing / f"{number:05d}.txt").write_bytes(words.decode_bytes(document[1:].tolist()))
        writing.rename(text)
    gpt2("prepare", text, "--out", part, "--tokenizer", case.tokenizer, "--val-fraction", "0.1")
    return part, whole


def run(words: list[str], config: TrainConfig) -> float:
    """Final validation loss of one run, which is made if it is not there, or was made with other settings.

    words: of its command; config: what they say. Raises CalledProcessError if it fails.
    """
    metrics = Path(config.out, METRICS_FILE)
    is_there = metrics.exists() and replace(load(config.out), resume=config.resume) == config
    if not is_there or json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["step"] != config.num_steps:
        gpt2("train", *words, "--resume", "auto" if is_there else "never")
    loss = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["val_loss"]
    print(f"{config.out}: {loss:.4f}", flush=True)
    return loss


def in_parallel(workers: int, case: Case, wanted: list[tuple], data: Path, out: Path) -> dict[tuple, float]:
    """Losses of runs by (name, flags, steps, seed), some at a time, each with one thread."""
    commands = []
    for name, flags, steps, seed in wanted:
        where = out / case.name / name.replace(" ", "-") / f"{steps}-steps-seed-{seed}"
        words = f"{case.flags} {ALL} {flags} --num-steps {steps} --seed {seed}".split()
        commands.append([*words, "--data", str(data), "--out", str(where)])
    configs = [parse(words, "bench.learning") for words in commands]  # in one thread, as tyro asks for
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return dict(zip(wanted, pool.map(run, commands, configs), strict=True))


def rows_of(case: Case, directory: Path, workers: int) -> list[Row]:
    """A row for each arm: losses, tokens and seconds to the reference's loss."""
    _, data = prepare(case, directory)
    wanted = [(arm.name, arm.flags, steps, seed) for arm in case.arms for steps in arm.lengths for seed in arm.seeds]
    found = in_parallel(workers, case, wanted, data, directory / "runs")
    losses: dict[str, Losses] = {arm.name: {} for arm in case.arms}
    for (name, _, steps, _), loss in found.items():
        losses[name][steps] = np.append(losses[name].get(steps, []), loss)
    seconds, rows = step_seconds(case, data), []
    for arm in case.arms:
        own, like = losses[arm.name], losses[arm.like or arm.name]
        row = Row("learning", case.name, arm.name, note=f"{arm.lengths[-1]} steps, {len(arm.seeds)} seeds")
        rounded = {str(steps): each.round(4).tolist() for steps, each in own.items()}
        row.facts = {"flags": f"{case.flags} {arm.flags}", "losses": rounded}
        loss = figure(equal_loss.mean(own[arm.lengths[-1]]), "nats", len(arm.seeds))
        row.figures = {"loss": loss, "step": spread(seconds[arm.name], "s")}
        if rows:
            tokens = figure(equal_loss.ratio(own, like, losses[case.arms[0].name]), "x", len(arm.seeds))
            cost = row.value("step") / rows[0].value("step")
            row.figures |= {"tokens": tokens, "seconds": results.scaled(tokens, cost, "x")}
        rows.append(row)
    return rows


def figure(estimate: equal_loss.Estimate, unit: str, n: int) -> Figure:
    """The figure of an estimate. Its low and high are those of the interval of 95%."""
    return Figure(estimate.value, unit, estimate.low, estimate.high, n)


def step_seconds(case: Case, data: Path) -> dict[str, list[float]]:
    """Seconds of an update of each arm with one thread, in turns."""
    torch.set_num_threads(1)
    steps = {}
    for arm in case.arms:
        config = parse([*f"{case.flags} {arm.flags}".split(), "--data", str(data)], "bench.learning")
        step = start.build_step(config, GPT2(config.model), Ranks(0, 0, 1, torch.device("cpu")), "fp32", False)
        (B, count), T = batch_shape(config, 1), config.sequence_length
        tokens = (torch.arange(B * (T + 1)) % config.model.vocab_size).view(B, T + 1)
        batch, updates = [(tokens[:, :-1], tokens[:, 1:])] * count, itertools.count()

        def once(step=step, batch=batch, updates=updates) -> float:
            began = time.perf_counter()
            step(next(updates), batch, 1e-3)
            return time.perf_counter() - began

        steps[arm.name] = once
    _ = [once() for once in steps.values()]  # the first update allocates
    return measure.in_turns(steps, measure.within(20.0 * len(steps), most=40))


def tune(case: Case, directory: Path, workers: int) -> list[Row]:
    """A row for each arm of EIGHT: losses on the tuning text over the factors of its learning rates."""
    data, _ = prepare(case, directory)
    arms, wanted = [arm for arm in case.arms if arm.seeds == EIGHT], {}
    for arm, factor, seed in itertools.product(arms, FACTORS, TUNING_SEEDS):
        optim = parse(f"{case.flags} {arm.flags}".split(), "bench.learning").optim
        rates = f"--optim.lr {optim.lr * factor:.3g} --optim.muon-lr {optim.muon_lr * factor:.3g}"
        wanted[arm.name, factor, seed] = (f"{arm.name} x{factor}", f"{arm.flags} {rates}", arm.lengths[-1], seed)
    found = in_parallel(workers, case, [*wanted.values()], data, directory / "tuning")
    rows = []
    for arm in arms:
        row = Row("tuning", case.name, arm.name, facts={"flags": f"{case.flags} {arm.flags}"})
        for factor in FACTORS:
            each = np.array([found[wanted[arm.name, factor, seed]] for seed in TUNING_SEEDS])
            row.figures[f"rate x {factor}"] = figure(equal_loss.mean(each), "nats", len(each))
        rows.append(row)
    return rows


def picture(rows: list[Row], out: Path) -> None:
    """Losses over steps of the reference and of the arms of several lengths, with a line at the reference's."""
    reference = rows[0]
    note = f"{reference.case}; bars: 95% of the mean"
    drawn, axes = plots.new_figure("Loss at the end of a run", note, "steps of the run", "validation loss")
    for row in rows:
        points = [(int(steps), np.array(each)) for steps, each in row.facts["losses"].items()]
        if row is reference or len(points) > 1:
            means = [equal_loss.mean(each) for _, each in points]
            bars = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
            label = f"{row.peer}, n = {len(points[0][1])}"
            axes.errorbar([n for n, _ in points], [m.value for m in means], bars, marker="o", capsize=3, label=label)
    axes.axhline(reference.value("loss"), color="#444444", linewidth=1, linestyle="--")
    axes.legend(frameon=False)
    plots.save(drawn, out)


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, prints the table, and with --save writes it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of the run directories")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--tune", action="store_true", help="try factors of the learning rates, on the tuning text")
    parser.add_argument("--workers", type=int, default=machine.cores(), help="runs at a time, of one thread each")
    parser.add_argument("--save", action="store_true", help="write this machine's learning.json, and docs/learning.png")
    args = parser.parse_args(arguments)
    cases, measured = [case for case in CASES if args.case in (None, case.name)], tune if args.tune else rows_of
    try:
        made = [measured(case, args.directory, args.workers) for case in cases]
    except subprocess.CalledProcessError as error:
        print(f"learning: a run must end well, got exit code {error.returncode} of {error.cmd}", file=sys.stderr)
        return 1
    rows = [row for each in made for row in each]
    print(tables.of(rows))
    if args.save:
        results.save("learning", machine.facts(), rows)
        if not args.tune:
            picture(made[0], machine.ROOT / "docs/learning.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
