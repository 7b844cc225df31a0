"""`gpt2 tune`: ops first, then whole training steps, each within its share of the time.

A step begins as shipped. One field changes at a time; what is faster by more than the noise, and
computes the same, is kept: implementations and tiles, the micro-batch, what is recomputed, and on a
CPU malloc, threads, precision and compiling.
"""

import contextlib
import dataclasses
import datetime
import gc
import itertools
import math
import os
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine import device as devices
from engine import output
from engine.config import PRESETS, TrainConfig, batch_shape
from engine.errors import BadInput
from engine.planning import memory
from engine.tuning import steps
from engine.tuning.ops import OPS, Bench
from engine.tuning.record import Setup, Tuning, check_writable, machine_of, path_of, save, shape_of
from engine.tuning.search import ENOUGH, Race, descend, one_line, race
from kernels.cases import Sizes
from kernels.dispatch import select

OPS_SHARE = {"cuda": 0.45, "cpu": 0.1}  # of the time, for the ops
BATCHES = (64, 32, 16, 8)  # sequences per micro-batch, tried from the largest
RACE_SECONDS = 15  # of a race between two setups, after which no round begins
CLOSING_SECONDS = 10  # for the last race, of what was found against the shipped setup


def show(text: str) -> None:
    """Prints lines, broken at 80 columns."""
    for line in text.split("\n"):
        print(textwrap.fill(line, 80, subsequent_indent=" " * 4, break_long_words=False), flush=True)


def tune(preset: str, asked: TrainConfig, minutes: float, out: str | None) -> Path:
    """Tunes a preset on this machine and returns the file written.

    asked: the preset's config; a micro_batch_size or precision that it sets is kept. Raises BadInput
    if no step can run here.
    """
    warnings.filterwarnings("ignore", module=r"torch\.")  # of Inductor, and of the first product in a new thread
    began = time.monotonic()
    device = devices.current()
    if device.type not in OPS_SHARE:
        raise BadInput(
            f"tune: the device must be a CPU or a GPU of CUDA or ROCm, got {device.type}; train runs untuned"
        )
    model = dataclasses.replace(asked.model, n_positions=asked.sequence_length)
    precision, _ = devices.choose_precision(asked.precision, device, "tune", model)
    sequences = asked.tokens_per_step // asked.sequence_length
    most = 16  # as choices.largest_micro_batch has it
    if device.type != "cpu":
        most = memory.largest_micro_batch(asked, precision, devices.free_bytes(device))
    batch = batch_shape(asked, 1, most)[0]
    shipped = Setup(precision, batch, compile=devices.wants_compile(None, device)[0])
    shape, machine = shape_of(asked.model, asked.sequence_length), machine_of(device)
    path = path_of(shape, device) if out is None else Path(out)
    check_writable(path)
    if device.type == "cpu":
        devices.tune_malloc()  # as in a run
    show(f"{preset} on {machine['device']}: at most {minutes:g} minute{'s' * (minutes != 1)}")
    dtype, model = devices.apply_precision(precision), asked.model
    chosen = select("auto", device, dtype, model.head_dim, dropout_p=model.dropout).choices
    auto = {choice.op: choice.implementation for choice in chosen}
    bench = Bench(Sizes.of(model, batch, asked.sequence_length), precision, dtype, device, shipped.compile)
    races, tiles = tune_ops(bench, auto, began + 60 * minutes * OPS_SHARE[device.type])
    ops = [{op: name for op, name in each.items() if name != auto[op]} for each in combinations(races, model.n_layer)]
    works = {op: next(iter(met.seconds)) for op, met in races.items()}  # as shipped, or next if that was refused
    shipped = dataclasses.replace(shipped, ops={op: name for op, name in works.items() if name != auto[op]})
    most = batch * max(1, BATCHES[0] // batch)
    search = Steps(preset, min(sequences, most), device, began + 60 * minutes - CLOSING_SECONDS)
    with contextlib.closing(search):
        search.begin(shipped)
        search.run(moves(asked, device, ops, tiles, search))
        found, shipped_s, found_s = search.finish(began + 60 * minutes)
    tokens = search.sequences * asked.sequence_length
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    speeds = (tokens / shipped_s, tokens / found_s)
    tuning = Tuning(preset, shape, machine, date, search.shipped, found, *speeds)
    save(tuning, path)
    show(summary(tuning, path, time.monotonic() - began))
    return path


def summary(tuning: Tuning, path: Path, seconds: float) -> str:
    """The last lines."""
    shipped, found = tuning.shipped_tokens_per_s, tuning.tokens_per_s
    ends = "nothing is faster than the shipped setup" if tuning.setup == tuning.shipped else f"found: {tuning.setup}"
    return (
        f"\n{ends}\n{shipped:,.0f} -> {found:,.0f} tokens/s, {found / shipped:.2f}x, after {seconds:.0f} s\n"
        f"{path}\n{output.program()} train {tuning.preset} reads it; flags go before it, --tuned never ignores it"
    )


# ---- Ops ----------------------------------------------------------------------------------------------------------


def tune_ops(bench: Bench, shipped: dict[str, str], until: float) -> tuple[dict[str, Race], dict]:
    """The race of each op, and the tiles that its kernels were fastest with. shipped: op -> implementation."""
    races, tiles, left = {}, {}, 1.0
    B, T = bench.sizes.B, bench.sizes.T
    show(f"\nops, forward and backward, B = {B}, T = {T}, {bench.precision}; the first's speed is 1")
    for op, share in OPS.items():
        now = time.monotonic()
        try:
            races[op], tiles = bench.tune(op, shipped[op], tiles, now + (until - now) * share / left)
            show(table(op, races[op]))
        except Exception as error:  # out of memory, or nothing is right here: the step keeps what is shipped
            show(f"  {op:<21} left as it is: {one_line(error)}")
        left -= share
    for key, tile in tiles.items():
        show(f"  {key:<28} {tile}")
    with contextlib.suppress(RuntimeError):  # a kernel that broke the GPU's context: the steps have their own
        gc.collect()
        devices.forget_memory(bench.device)  # which need the memory
    return races, tiles


def table(op: str, found: Race) -> str:
    """A line for each implementation of an op."""
    lines, first = [], next(iter(found.seconds))
    for name in found.seconds | found.left:
        if not found.seconds.get(name):
            lines.append(f"{name:<10} {found.left[name]}"[:56])
            continue
        ratio = "" if name == first else f" {found.best(first) / found.best(name):5.2f}x"
        lines.append(f"{name:<10} {1e3 * found.best(name):9.3f} ms{ratio}{' taken' * (name == found.winner != first)}")
    return "\n".join(f"  {op if number == 0 else '':<21} {line}" for number, line in enumerate(lines))


def combinations(races: dict[str, Race], n_layer: int, most: int = 3) -> list[dict[str, str]]:
    """The most promising choices of all ops: each op's winner, then by the sum of their times in a step."""
    calls = {"attention": n_layer, "bias_gelu": n_layer, "add_layer_norm": 2 * n_layer, "linear_cross_entropy": 1}
    names = {op: sorted((name for name in met.seconds if met.seconds[name]), key=met.best) for op, met in races.items()}
    choices = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*names.values())]
    choices.sort(key=lambda choice: sum(calls[op] * races[op].best(name) for op, name in choice.items()))
    winners = {op: met.winner for op, met in races.items()}
    return [winners, *(choice for choice in choices if choice != winners)][:most]


# ---- Steps --------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Races between setups of the training step, each in a Worker. One is in use at any time."""

    preset: str
    sequences: int  # of one update
    device: torch.device
    until: float
    tell: Callable[[str], None] = show
    clock: Callable[[], float] = time.monotonic
    start: Callable[[dict, float], steps.Worker] = field(default_factory=lambda: steps.Worker)
    in_use: Setup | None = None
    shipped: Setup | None = None
    shipped_s: float = 0.0  # seconds of an update
    in_use_s: float = 0.0
    too_large: int | None = None  # smallest micro-batch that ran out of memory
    workers: list[tuple[Setup, steps.Worker]] = field(default_factory=list)

    def begin(self, shipped: Setup) -> None:
        """Starts the shipped setup, or with the largest micro-batch that fits. Raises BadInput if none runs."""
        self.tell(f"\ntraining steps of {self.sequences} sequences; the speed of what is in use is 1")
        for size in range(shipped.micro_batch_size, 0, -1):
            if self.sequences % size:
                continue
            setup = dataclasses.replace(shipped, micro_batch_size=size)
            try:
                self.shipped_s = self._start(setup)()
            except steps.Refused as error:
                if str(error) == steps.OUT_OF_MEMORY and size > 1:
                    self.too_large = size
                    continue
                raise BadInput(
                    f"tune: a step of {self.preset} must run here, {setup} got: {error}; try more --max-minutes, a "
                    "smaller --micro-batch-size or another preset"
                ) from error
            self.in_use, self.shipped, self.in_use_s = setup, setup, self.shipped_s
            self.tell(f"  {', '.join(setup.words()[:3]):<50} {1e3 * self.shipped_s:9.1f} ms")
            return

    def run(self, near: Iterator[Callable[[Setup], list[Setup]]]) -> None:
        """Changes one field after the other."""
        self.in_use = descend(self.in_use, near, self._contest)

    def finish(self, until: float) -> tuple[Setup, float, float]:
        """The setup found, and seconds of an update as shipped and as found, measured in turns."""
        shipped, found = self._worker(self.shipped), self._worker(self.in_use)
        both = {"shipped": shipped} | ({"found": found} if found is not shipped else {})
        try:
            last = race(both, until, self.clock, least=ENOUGH)
        except steps.Refused:  # it ran before: nothing can be said of what was found
            return self.shipped, self.shipped_s, self.shipped_s
        medians = [statistics.median(last.seconds[name]) for name in ("shipped", last.winner)]
        return (self.in_use if last.winner == "found" else self.shipped), *medians

    def close(self) -> None:
        """Ends all processes."""
        for _, worker in self.workers:
            worker.close()

    def _contest(self, setups: list[Setup]) -> Setup:
        self.in_use, *challengers = setups
        for setup in challengers:
            is_too_large = setup.recompute == "none" and setup.micro_batch_size >= (self.too_large or 2**62)
            if is_too_large or setup == self.shipped:  # which what is in use has beaten
                continue
            label = f"  {changes(self.in_use, setup)[:50]:<50}"
            if self.clock() + 2 * ENOUGH * self.in_use_s >= self.until:
                self.tell(f"{label} no time left")
                continue
            try:
                challenger = self._start(setup)
                wrong = steps.difference(challenger.losses, self._worker(self.shipped).losses, setup.precision)
                if wrong is not None:
                    raise steps.Refused(wrong)
                pair = {"in use": self._worker(self.in_use), "new": challenger}
                met = race(pair, min(self.until, self.clock() + RACE_SECONDS), self.clock, least=ENOUGH)
                if met.left.get("new", "slower") != "slower":
                    raise steps.Refused(met.left["new"])
            except steps.Refused as error:
                if str(error) == steps.OUT_OF_MEMORY:
                    self.too_large = min(self.too_large or setup.micro_batch_size, setup.micro_batch_size)
                self.tell(f"{label} {error}")
                continue
            before, after = (statistics.median(met.seconds[name]) for name in pair)
            taken = met.winner == "new"
            self.tell(f"{label} {1e3 * after:9.1f} ms {before / after:5.2f}x{' taken' * taken}")
            loser = self.in_use if taken else setup
            self.in_use, self.in_use_s = (setup, after) if taken else (self.in_use, before)
            if loser != self.shipped:
                self._worker(loser).close()
        return self.in_use

    def _start(self, setup: Setup) -> steps.Worker:
        worker = self.start(steps.job(self.preset, setup, self.sequences, self.device), self.until)
        self.workers.append((setup, worker))
        return worker

    def _worker(self, setup: Setup) -> steps.Worker:
        return next(worker for one, worker in self.workers if one == setup)


def changes(before: Setup, after: Setup) -> str:
    """What the second setup has that the first has not, in words."""
    return ", ".join(word for word in after.words() if word not in before.words()) or "as shipped"


def moves(
    asked: TrainConfig, device: torch.device, ops: list[dict[str, str]], tiles: dict, search: Steps
) -> Iterator[Callable[[Setup], list[Setup]]]:
    """For each field, the setups that differ from the one in use in that field."""
    on_cpu = device.type == "cpu"

    def choices(which: list[dict]) -> Callable[[Setup], list[Setup]]:
        return lambda one: differing(one, *({"ops": one_choice, "tiles": tiles} for one_choice in which))

    yield choices(ops[:1])
    if on_cpu:
        cores = torch.get_num_threads()
        fewer = sorted({2**power for power in range(cores.bit_length())} | {cores})
        if "OMP_NUM_THREADS" not in os.environ:  # which a run heeds too
            yield lambda one: differing(one, *({"threads": count} for count in fewer if count != cores))
        yield lambda one: differing(one, {"malloc_tuned": not one.malloc_tuned})
    if asked.micro_batch_size is None:
        sizes = [size for size in BATCHES if search.sequences % size == 0]
        yield lambda one: differing(one, *({"micro_batch_size": size} for size in sizes))
    if search.too_large is not None:  # recomputing buys memory for a larger micro-batch, and costs time
        yield lambda one: differing(
            one, *({"micro_batch_size": search.too_large, "recompute": part} for part in ("attention", "block"))
        )
    if on_cpu:
        if asked.precision == "auto":
            yield lambda one: differing(one, *({"precision": name} for name in ("fp32", "bf16")))
        if devices.compile_obstacle(device) is None:
            yield lambda one: differing(one, {"compile": True})
    yield choices(ops[1:])


def differing(setup: Setup, *fields: dict) -> list[Setup]:
    """The setup with each of these changes, without those that change nothing."""
    return [new for change in fields if (new := dataclasses.replace(setup, **change)) != setup]


def check(preset: str, micro_batch_size: int | None, precision: str, minutes: float) -> TrainConfig:
    """The preset's config with what was asked for. Raises BadInput if it is not valid."""
    asked = dataclasses.replace(PRESETS[preset], micro_batch_size=micro_batch_size, precision=precision)
    if wrong := asked.problems():
        raise BadInput("tune: " + "\n  ".join(wrong))
    if not 0 < minutes < math.inf:
        raise BadInput(f"tune: --max-minutes must be above 0 and finite, got {minutes}")
    sequences = asked.tokens_per_step // asked.sequence_length
    if micro_batch_size is not None and sequences % micro_batch_size:
        divisors = [size for size in range(1, sequences + 1) if sequences % size == 0]
        near = [max(d for d in divisors if d < micro_batch_size), *[d for d in divisors if d > micro_batch_size][:1]]
        raise BadInput(
            f"tune: --micro-batch-size must divide the {sequences} sequences of a step of {preset}, got "
            f"{micro_batch_size}; the nearest --micro-batch-size {' and '.join(map(str, near))}"
        )
    return asked
