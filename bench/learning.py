"""Tokens and seconds that each recipe needs to the same validation loss: `python -m bench.learning DIR`.

Every run is one `gpt2 train` with one thread on Python's standard library. DIR holds the run directories; the same
command goes on where it was stopped. `--tune` tries learning rates, with seeds of its own, and validates on the last
tenth of each training document. Reported is the loss on the validation documents. An arm is a recipe; a case's first
is its reference, and "adamw again" differs from it in its seeds alone. See engine.comparison.equal_loss for the ratios.
A run that another machine made counts if its directory is here. Exit codes: 0 done, 1 a run failed.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench import machine, measure, results, tables
from bench.results import Figure, Row, spread
from engine import start
from engine.comparison import equal_loss
from engine.config import CONFIG_FILE, TrainConfig, batch_shape, load, parse
from engine.device import tune_malloc
from engine.distributed import Ranks
from engine.run import plots
from engine.run.metrics import METRICS_FILE, read_rows
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


GPT3 = "--optim.name adamw --optim.schedule cosine --optim.min-lr-ratio 0.1 --optim.beta2 0.95"  # as the GPT presets


def arms(gpt3: str, tuned: str, recipe: str, lengths: tuple[int, ...]) -> tuple[Arm, ...]:
    """The arms that matter, by their flags. lengths: two of the recipe, two of AdamW with the full one last."""
    reference = Arm("adamw", f"{GPT3} {gpt3}", lengths[3:], EIGHT)
    return (
        reference,
        Arm("recipe", recipe, lengths[:2], EIGHT),
        Arm("adamw, tuned", f"--optim.name adamw --optim.beta1 0.8 {tuned}", lengths[2:], EIGHT),
        replace(reference, name="adamw again", seeds=range(9, 17), like="adamw, tuned"),
    )


WARM, RECIPE = "--optim.warmup-tokens", "--optim.lr 6e-3 --optim.muon-lr 0.04 --optim.muon-momentum 0.8"
TINY = f"--optim.lr 3e-3 {WARM} 77824", f"--optim.lr 3e-3 {WARM} 77824", ""
SMALL = f"--optim.lr 2e-3 {WARM} 204800", f"--optim.lr 2.5e-3 {WARM} 204800", f"{RECIPE} {WARM} 51200"
COSINE = Arm("recipe, cosine", "--optim.schedule cosine --optim.min-lr-ratio 0.1", (380,), like="recipe")
HEAVY = Arm("recipe, momentum 0.95", "--optim.muon-momentum 0.95", (380,), like="recipe")
CASES = (
    Case("tiny", "tiny", "bytes", (*arms(*TINY, (304, 380, 570, 760)), COSINE, HEAVY)),
    Case("small", "small --no-compile --eval-tokens 131072", "gpt2", arms(*SMALL, (350, 450, 800, 1000))),
)


def gpt2(*words: object) -> None:
    """Runs the command `gpt2` with one thread. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "engine.cli", *map(str, words)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)


def prepare(case: Case, directory: Path) -> tuple[Path, Path]:
    """Two data sets of the standard library: for tuning, the training documents, their tails apart; for the report."""
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


def run(words: list[str], config: TrainConfig) -> tuple[float, str]:
    """Final loss of a run, its precision and device. Its command's words make it if none has this config."""
    metrics = Path(config.out, METRICS_FILE)
    is_there = metrics.exists() and replace(load(config.out), resume=config.resume) == config
    if not is_there or [row["step"] for row in read_rows(metrics)][-1:] != [config.num_steps]:
        gpt2("train", *words, "--resume", "auto" if is_there else "never")
    loss = read_rows(metrics)[-1]["val_loss"]
    print(f"{config.out}: {loss:.4f}", flush=True)
    resolved = json.loads(Path(config.out, CONFIG_FILE).read_text(encoding="utf-8"))["resolved"]
    return loss, f"{resolved['precision']} on {resolved['device']}"


def in_parallel(workers: int, case: Case, wanted: list[tuple], data: Path, out: Path) -> dict[tuple, tuple]:
    """What `run` gives, by (name, flags, steps, seed), of some runs at a time, each with one thread."""
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
    losses: dict[str, equal_loss.Losses] = {arm.name: {} for arm in case.arms}
    for (name, _, steps, _), (loss, _) in found.items():
        losses[name][steps] = np.append(losses[name].get(steps, []), loss)
    seconds, rows = step_seconds(case), []
    for arm in case.arms:
        own, like, n = losses[arm.name], losses[arm.like or arm.name], len(arm.seeds)
        made_on = {where for (name, *_), (_, where) in found.items() if name == arm.name}
        row = Row("learning", case.name, arm.name)
        row.note = f"{arm.lengths[-1]} steps, {n} seeds, {' and '.join(sorted(made_on))}"
        rounded = {str(steps): each.round(4).tolist() for steps, each in own.items()}
        row.facts = {"flags": f"{case.flags} {arm.flags}", "losses": rounded}
        row.figures["loss"] = figure(equal_loss.mean(own[arm.lengths[-1]]), "nats", n)
        row.figures["step"] = spread(seconds[arm.name], "s")
        if rows:
            tokens = equal_loss.ratio(own, like, losses[case.arms[0].name])
            in_time = equal_loss.in_time(tokens, seconds[arm.name], seconds[case.arms[0].name])
            row.figures |= {"tokens": figure(tokens, "x", n), "seconds": figure(in_time, "x", n)}
        rows.append(row)
    return rows


def figure(estimate: equal_loss.Estimate, unit: str, n: int) -> Figure:
    """The figure of an estimate. Its low and high are those of the interval of 95%."""
    return Figure(estimate.value, unit, estimate.low, estimate.high, n)


def step_seconds(case: Case) -> dict[str, list[float]]:
    """Seconds of an update with each optimizer, with one thread, in turns, by the arms that have it."""
    tune_malloc()  # as in a run
    torch.set_num_threads(1)
    steps, watch = {}, measure.Stopwatch(cpu := torch.device("cpu"), is_cold=False)
    configs = {arm.name: parse(f"{case.flags} {arm.flags}".split(), "bench.learning") for arm in case.arms}
    for name, config in {config.optim.name: config for config in configs.values()}.items():
        step = start.build_step(config, GPT2(config.model), Ranks(0, 0, 1, cpu), "fp32", False)
        (B, count), T = batch_shape(config, 1), config.sequence_length
        tokens = (torch.arange(B * (T + 1)) % config.model.vocab_size).view(B, T + 1)
        update = functools.partial(step, 0, [(tokens[:, :-1], tokens[:, 1:])] * count, 1e-3)
        steps[name] = functools.partial(watch, lambda update=update: update)
    _ = [once() for once in steps.values()]  # the first update allocates
    taken = measure.in_turns(steps, measure.within(40.0 * len(steps), most=40))
    return {name: taken[config.optim.name] for name, config in configs.items()}


def tune(case: Case, directory: Path, workers: int) -> list[Row]:
    """A row for each arm of EIGHT: losses on the tuning text over the factors of its learning rates."""
    data, _ = prepare(case, directory)
    arms, wanted = [arm for arm in case.arms if arm.seeds == EIGHT], {}
    for arm, factor, seed in itertools.product(arms, FACTORS, TUNING_SEEDS):
        optim = parse(f"{case.flags} {arm.flags}".split(), "bench.learning").optim
        muon = f" --optim.muon-lr {optim.muon_lr * factor:.3g}" if optim.name == "muon" else ""
        rates = f"--optim.lr {optim.lr * factor:.3g}{muon}"
        wanted[arm.name, factor, seed] = (f"{arm.name} x{factor}", f"{arm.flags} {rates}", arm.lengths[-1], seed)
    found = in_parallel(workers, case, [*wanted.values()], data, directory / "tuning")
    rows = [Row("tuning", case.name, arm.name, facts={"flags": f"{case.flags} {arm.flags}"}) for arm in arms]
    for row, factor in itertools.product(rows, FACTORS):
        each = np.array([found[wanted[row.peer, factor, seed]][0] for seed in TUNING_SEEDS])
        row.figures[f"rate x {factor}"] = figure(equal_loss.mean(each), "nats", len(each))
    return rows


def picture(rows: list[Row], out: Path) -> None:
    """Losses over steps of the other arms of several lengths, above the reference's and as a part of its steps."""
    labels = ("steps, as a part of AdamW's", "validation loss above AdamW's, nats")
    drawn, axes = plots.new_figure("Loss at the end of a run", "bars: 95% of the mean", *labels)
    for row in rows:
        reference = next(each for each in rows if each.case == row.case)
        if row is not reference and len(row.facts["losses"]) > 1:
            steps = np.array([*map(int, row.facts["losses"])]) / int(*reference.facts["losses"])
            mean, low, high = np.array([equal_loss.mean(np.array(each)) for each in row.facts["losses"].values()]).T
            style = {"marker": "o", "capsize": 3, "label": f"{row.case}: {row.peer}"}
            axes.errorbar(steps, mean - reference.value("loss"), [mean - low, high - mean], **style)
    axes.axhline(0.0, color="#444444", linewidth=1, linestyle="--", label="adamw at its full length")
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
        rows = [row for case in cases for row in measured(case, args.directory, args.workers)]
    except subprocess.CalledProcessError as error:
        print(f"learning: a run must end well, got exit code {error.returncode} of {error.cmd}", file=sys.stderr)
        return 1
    print(tables.of(rows))
    if args.save:
        facts = machine.facts() | {"command": f"python -m bench.learning DIR{' --tune' * args.tune} --save"}
        kept = results.read(results.save("learning", facts, rows))[1]
        if studied := [row for row in kept if row.section == "learning"]:
            picture(studied, machine.ROOT / "docs/learning.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
