"""Training steps for bench.gpu: ours and its peers in turns, whether their losses agree, and the larger presets.

Every contestant is a bench.contestants.TrainingStep. They start from the same weights and see the same batches of
log-uniform tokens, which a model soon learns to expect. A contestant is timed only if its first loss is right, and
one that runs out of memory is tried again at half the batch.
"""

import contextlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import machine
from bench.contestants import TrainingStep, build, initial_weights
from bench.gpu_plan import PEERS, STEPS, Part
from bench.gpu_timing import Timer, summary
from engine import memory, metrics
from engine import precision as arithmetic
from model.presets import PRESETS, GPT2Config

CONTEXT = 1024  # T
CHUNK = 8  # sequences at a time of the loss that every contestant's first is held against
FIRST_TOLERANCE = {"fp32": 1e-4, "tf32": 1e-3, "fp16": 2e-3, "bf16": 1e-2}  # relative, of the first loss
TOLERANCE = {"fp32": 5e-4, "bf16": 1e-2}  # relative, of every loss while ours and another train side by side

# Every contestant of a part makes the same updates: 1 that is checked, 2 + 8 timed alone, and in each of three turns
# 2 + 11 timed.
WARM_UP, ALONE, TURNS, UNTIMED, IN_TURN = 2, 8, 3, 2, 11
TURNS_S = 40.0  # that the turns take at most
UPDATES = 1 + WARM_UP + ALONE + TURNS * (UNTIMED + IN_TURN)  # 50

Choice = tuple[int, str]  # B, and what is recomputed in the backward pass
CHOICES: tuple[Choice, ...] = ((64, "none"), (32, "none"), (16, "none"))  # the next where one does not fit
SIZES: dict[str, tuple[Choice, ...]] = {
    "gpt2-medium": ((64, "none"), (64, "block"), (32, "block")),
    "gpt2-large": ((32, "none"), (32, "block"), (16, "block")),
    "gpt2-xl": ((16, "none"), (16, "block"), (8, "block")),
}
SMALL = (8, 512)  # B and T of the section loss
DRY_CONFIG = GPT2Config(1, 1, 16, n_positions=4, vocab_size=61)
DRY_UPDATES = 2


@dataclass(frozen=True)
class Setting:
    """What the contestants of a part share. inputs, targets: (updates, B, T), cut from the same tokens."""

    config: GPT2Config
    precision: str
    device: torch.device
    triton: str  # the backend of the contestants called "triton"
    compilers: tuple[str, str]  # ours, the peers'
    weights: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor

    @classmethod
    def new(
        cls, worker, part: Part, preset: str, precision: str, batch: int, context: int, updates: int = UPDATES
    ) -> "Setting":
        """Weights and batches by fixed seeds.

        In a dry run tiny ones, in float32; and only the first two parts of the section step run on Triton, whose
        interpreter takes a second an update, and go through all of the compiler.
        """
        config, triton, compilers = PRESETS[preset], "triton", (worker.compiler, worker.compiler)
        if worker.dry_run:
            in_full = part.name in list(STEPS)[:2]
            triton, compilers = ("triton", (worker.compiler, "eager")) if in_full else ("torch", ("eager", "eager"))
            config, precision, batch, updates = DRY_CONFIG, "fp32", 2, DRY_UPDATES
            context = config.n_positions
        with worker.device:
            weights = initial_weights(config)
            torch.manual_seed(1)
            tokens = (config.vocab_size ** torch.rand(updates, batch, context + 1)).long() - 1  # 0 to V - 1
        inputs, targets = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
        return cls(config, precision, worker.device, triton, compilers, weights, inputs, targets)

    @property
    def context(self) -> int:
        """T."""
        return self.inputs.shape[-1]

    def batch(self, update: int, size: int) -> tuple[Tensor, Tensor]:
        """The first `size` sequences of a batch and their targets."""
        i = update % len(self.inputs)
        return self.inputs[i, :size], self.targets[i, :size]

    @torch.no_grad()
    def first_losses(self) -> list[float]:
        """The loss of the first batch before any update, CHUNK sequences at a time, in float32 on PyTorch's ops."""
        arithmetic.apply("fp32")
        with self.device:
            model = build("ours", self.config, self.weights).to(self.device)
        chunks = (tokens.split(CHUNK) for tokens in self.batch(0, len(self.inputs[0])))
        return [model(*chunk).item() for chunk in zip(*chunks, strict=True)]

    def enter(self, name: str, batch: int, recompute: str = "none") -> "Runner":
        """The contestant of this name, such as "triton compiled", with nothing run yet."""
        who, mode = name.split()
        ours = is_ours(name)
        before = allocated(self.device)
        with self.device:  # made where it runs: a CPU would take seconds to draw the weights that are then replaced
            step = TrainingStep(
                "ours" if ours else who,
                self.config,
                self.weights,
                self.device,
                is_compiled=mode == "compiled",
                precision=self.precision,
                backend={"triton": self.triton}.get(who, "torch"),  # of ours
                recompute=recompute,
                compiler=self.compilers[0 if ours else 1],
            )
        return Runner(step, self, batch, before)


@dataclass
class Runner:
    """A contestant with its weights, and the loss of every update that it has made."""

    step: TrainingStep
    setting: Setting
    batch: int
    before: int  # bytes allocated without it
    peak: int = 0  # most bytes that it had
    losses: list[Tensor] = field(default_factory=list)

    def advance(self, updates: int, timer: Timer | None = None) -> None:
        """Makes updates without waiting for them, each timed if there is a timer."""
        for _ in range(updates):
            batch = self.setting.batch(len(self.losses), self.batch)
            with timer or contextlib.nullcontext():
                loss = self.step(*batch)
            self.losses.append(loss)

    def figures(self, times_ms: Sequence[float]) -> dict:
        """What a row says of these steps. Raises ArithmeticError if the last loss is not finite."""
        loss = self.losses[-1].item()
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss must stay finite, got {loss} after {len(self.losses)} updates")
        step_ms, config, context = summary(times_ms), self.setting.config, self.setting.context
        tokens_per_s = self.batch * context / (step_ms["median_ms"] * 1e-3)
        top = metrics.peak_flops(self.setting.device, self.setting.precision)
        return {
            "step_ms": step_ms,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * metrics.flops_per_token(config, context) / top if top else None,
            "peak_gib": self.peak / 2**30,
        }


def allocated(device: torch.device) -> int:
    """Bytes that PyTorch holds for tensors on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, also where a compiler passes the error on as its own."""
    return memory.out_of_memory(error) or "out of memory" in str(error)


def is_ours(name: str) -> bool:
    """Whether a contestant of this name is this project's model."""
    return name.split()[0] not in PEERS


def absence(name: str) -> str | None:
    """Why a contestant cannot be here, or None."""
    if name.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def start(worker, setting: Setting, name: str, choice: Choice, first: list[float]) -> tuple[Runner, list[float]]:
    """A contestant whose first loss is right, warmed up, and the times of its first steps. Dry: no times."""
    runner = setting.enter(name, *choice)
    runner.advance(1)
    chunks = max(1, runner.batch // CHUNK)
    expected, loss = sum(first[:chunks]) / chunks, runner.losses[0].item()
    allowed = FIRST_TOLERANCE[setting.precision]
    if not abs(loss / expected - 1.0) <= allowed:
        raise ArithmeticError(f"the first loss must be {expected:.4f}, as in float32, to {allowed:.0e}, got {loss:.4f}")
    if worker.dry_run:
        runner.advance(DRY_UPDATES - 1)
        return runner, []
    runner.advance(WARM_UP)
    timer = Timer(None)
    with machine.peak_memory(setting.device) as peak:
        runner.advance(ALONE, timer)
    runner.peak = peak.most - runner.before
    return runner, timer.read_ms()


def fit(
    worker, setting: Setting, name: str, choices: Sequence[Choice], first: list[float]
) -> tuple[Runner, list, dict]:
    """The first choice that fits into memory: the contestant, its first times, and what its row says of the choice."""
    notes = []
    for choice in choices:
        said = {"batch": choice[0], "recompute": choice[1], "note": ", ".join(notes)}
        try:
            return *start(worker, setting, name, choice, first), said
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        recompute = "" if choice[1] == "none" else f" with recompute {choice[1]}"
        notes.append(f"out of memory at B = {choice[0]}{recompute}")
        worker.say(f"{name}: {notes[-1]}")
        worker.clean_up()  # out here the error is gone, and with it the frames that held the model
    raise MemoryError(", ".join(notes))


def measure(worker, part: Part) -> None:
    """A part of the sections step and sizes: each contestant alone, then all in turns, then their losses."""
    if part.section == "step":
        preset, (precision, names), choices = "gpt2", STEPS[part.name], CHOICES
    else:
        preset, (precision, names), choices = part.name, ("bf16", ("triton compiled",)), SIZES[part.name]
    if worker.dry_run:
        choices = ((2, "none"),)
    setting = Setting.new(worker, part, preset, precision, choices[0][0], CONTEXT)
    op, first = f"{preset} {precision}", setting.first_losses()
    worker.clean_up()
    ready: dict[str, tuple[Runner, dict]] = {}
    for name in names:
        with worker.attempt(part, op, name, seconds=part.seconds / len(names)) as row:
            if row is None:
                continue
            if reason := absence(name):
                worker.skip(row, reason)
                continue
            runner, times_ms, said = fit(worker, setting, name, choices, first)
            facts = {"preset": preset, "precision": precision, "context": setting.context, "in_turns": False, **said}
            row = row if worker.dry_run else row | facts
            put(worker, runner, row, times_ms)
            ready[name] = runner, row
    if len(ready) > 1 and not worker.dry_run:
        with worker.attempt(part, op, "in turns", seconds=TURNS_S) as row:
            if row is not None:
                take_turns(worker, ready)
    compare(
        worker, part, f"{op} {part.name.split()[-1]}", setting, {name: runner for name, (runner, _) in ready.items()}
    )


def put(worker, runner: Runner, row: dict, times_ms: Sequence[float]) -> None:
    """Records a contestant's row with the figures of these steps."""
    figures = {} if worker.dry_run else runner.figures(times_ms)
    said = f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['peak_gib']:.1f} GiB" if figures else ""
    worker.put(row, said, **figures)


def take_turns(worker, ready: dict[str, tuple[Runner, dict]]) -> None:
    """Times contestants A B C A B C ..., as many turns as the time allows, and records those times instead."""
    times: dict[str, list[float]] = {name: [] for name in ready}
    timer = Timer(None)
    turn_s = sum((UNTIMED + IN_TURN) * row_ms(worker, row) for _, row in ready.values()) / 1e3
    for _ in range(TURNS):
        if worker.seconds_left() < turn_s + 2.0:
            break
        for name, (runner, _) in ready.items():
            worker.clean_up()  # no contestant has to work around blocks that another left in the allocator's cache
            runner.advance(UNTIMED)
            runner.advance(IN_TURN, timer)
            times[name] += timer.read_ms()
    for name, (runner, row) in ready.items():
        if times[name]:
            put(worker, runner, row | {"in_turns": True}, times[name])


def row_ms(worker, row: dict) -> float:
    """The step time of a contestant's row as it was recorded."""
    return worker.record.find(row["section"], row["op"], row["contestant"])["step_ms"]["median_ms"]


def agreement(worker, part: Part) -> None:
    """A part of the section loss: ours and its peers make the same updates of a small batch."""
    precision, mode = part.name.split()
    names = [f"{who} {mode}" for who in ("triton", *PEERS)]
    setting = Setting.new(worker, part, "gpt2", precision, *SMALL)
    op, runners = f"gpt2 {precision}", {}
    for name in names:
        with worker.attempt(part, op, name, seconds=part.seconds / len(names)) as row:
            if row is None:
                continue
            if reason := absence(name):
                worker.skip(row, reason)
                continue
            runners[name] = setting.enter(name, len(setting.inputs[0]))
            runners[name].advance(len(setting.inputs))
    compare(worker, part, op, setting, runners)


def compare(worker, part: Part, op: str, setting: Setting, runners: dict[str, Runner]) -> None:
    """Holds the losses of every other contestant against the first one's, ours; a row for each in the section loss."""
    ours_name, ours = next(((name, runner) for name, runner in runners.items() if is_ours(name)), (None, None))
    for name, other in runners.items():
        if ours is None or other is ours or other.batch != ours.batch:
            continue
        with worker.attempt(part, op, f"{name} against {ours_name}", section="loss", seconds=10.0) as row:
            if row is None:
                continue
            left, right = (torch.stack(runner.losses).tolist() for runner in (ours, other))
            steps, tolerance = min(len(left), len(right)), TOLERANCE[setting.precision]
            differences = [abs(b / a - 1.0) for a, b in zip(left, right, strict=False)]
            largest = max(differences, key=lambda d: math.inf if math.isnan(d) else d)
            facts = {
                **{"precision": setting.precision, "batch": ours.batch, "context": setting.context, "steps": steps},
                **{"losses": [left[0], left[steps - 1]], "losses_against": [right[0], right[steps - 1]]},
                **{"largest_difference": largest, "tolerance": tolerance},
            }
            if not worker.dry_run and all(map(math.isfinite, (largest, *facts["losses"], *facts["losses_against"]))):
                row |= facts  # a failed row keeps them, but JSON cannot hold NaN
            if not largest <= tolerance:
                raise ArithmeticError(f"the losses must agree to {tolerance:.0e}, they differ by up to {largest:.1e}")
            worker.put(row, f"{steps} updates agree to {largest:.1e}", **({} if worker.dry_run else facts))
