"""A training step here against a plain PyTorch GPT-2 and `transformers`: `python -m bench.peers`, on a GPU or a CPU.

Each peer lives in a process of its own, because peak memory belongs to the process, and waits while another works. All
begin with the same weights and make the same updates; whose losses are not those of the plain reference in float32 is
not timed. Then each is timed in turn, beside the machine's ceiling, a large matrix product; ratios are taken within a
round. "malloc tuned" is engine.device.tune_malloc: all are timed with it and without. "step memory" is a step's peak
above weights and optimizer state. Exit codes: 0 done, 1 a peer failed or disagreed, 2 bad input.
"""

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench import machine, results, tables
from bench.measure import in_turns, within
from bench.processes import Failed, Worker
from bench.results import Row, exact, rate, spread
from bench.steps import OURS, absence
from model.presets import PRESETS, GPT2Config, flops_per_token

HEAD_DIM, MODES = 64, ("eager", "compiled")
CPU_CASES = ((4, 256, 256, 8), (4, 256, 256, 2), (4, 512, 256, 4), (6, 384, 512, 4))  # L, C, T, B; the goal's is first
GPU_CASES = ((12, 768, 1024, 64),)  # GPT-2 124M
LOSS_TOLERANCE = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 1e-2, "bf16": 2e-2}  # relative, of every loss
TRUTH_SEQUENCES = 2  # of the reference in float32 at a time, so that its activations fit whatever the model
DRY_MODEL = GPT2Config(1, 1, 16, n_positions=4, vocab_size=61)


class Peer(NamedTuple):
    """Who trains, and how."""

    who: str  # "ours", "ours on torch" (this model on PyTorch's ops), "reference" or "transformers"
    mode: str  # "eager" or "compiled"
    is_tuned: bool = False  # malloc

    def __str__(self) -> str:
        return f"{self.who} {self.mode}" + (", malloc tuned" if self.is_tuned else "")

    @property
    def is_ours(self) -> bool:
        return self.who.startswith(OURS)


def everyone(on_gpu: bool) -> list[Peer]:
    """All peers, ours first."""
    names = (OURS, *(["ours on torch"] if on_gpu else []), "reference", "transformers")
    return [Peer(who, mode, t) for who in names for t in ((False,) if on_gpu else (True, False)) for mode in MODES]


@dataclass(frozen=True)
class Trial:
    """What is trained: a model, B sequences of T tokens, a precision; what to try next where memory runs out."""

    name: str
    config: GPT2Config  # its n_positions are T
    precision: str
    choices: tuple[tuple[int, str], ...]  # B, and what is recomputed in the backward pass
    updates: int = 50  # that are checked
    checked: tuple[int, int] = (2, 32)  # sequences and tokens of each
    block: tuple[int, int] = (0, 1)  # untimed and timed updates of a sample

    @classmethod
    def of(cls, case: Sequence[int], precision: str, on_gpu: bool, choices: Sequence | None = None) -> "Trial":
        """A case L, C, T, B. On a GPU updates of the timed size are checked, since each size compiles for itself."""
        L, C, T, B = case
        config = GPT2Config(n_layer=L, n_head=C // HEAD_DIM, n_embd=C, n_positions=T, init="gpt2")
        known = {(p.n_layer, p.n_embd, p.n_positions): n for n, p in PRESETS.items() if p.vocab_size == 50257}
        name = f"{known.get((L, C, T), f'L={L} C={C} T={T}')} B={B} {precision}"
        if not on_gpu:
            return cls(name, config, precision, ((B, "none"),))
        choices = tuple(choices or ((B, "none"), (B // 2, "none"), (B // 4, "none")))
        return cls(name, config, precision, choices, updates=5, checked=(B, T), block=(2, 5))

    def dry(self) -> "Trial":
        """The same at a tiny size."""
        return dataclasses.replace(
            self, config=DRY_MODEL, precision="fp32", choices=((2, "none"),), updates=2, checked=(2, 4), block=(0, 1)
        )


@dataclass
class Comparison:
    """Compares peers on one machine. workers: processes to use again; without them each peer gets a fresh one."""

    goes_on: Callable[[], Callable[[int], bool]]  # makes the timing loop's condition
    say: Callable[[str], None] = print
    put: Callable[[Row], None] = lambda row: None  # is given every row as soon as something is known of it
    workers: list[Worker] | None = None
    setup: dict = field(default_factory=dict)  # of steps.Setup, for ours
    deadline: float = math.inf  # seconds of time.time
    limit_s: float = 900.0  # of one request
    truths: dict[tuple, list[float]] = field(default_factory=dict)

    def run(self, trial: Trial, peers: Sequence[Peer]) -> list[Row]:
        """A row for each peer."""
        rows = {peer: Row("step", trial.name, str(peer), "failed") for peer in peers}
        workers, ready = self.workers or [Worker() for _ in peers], {}
        try:
            for peer, worker in zip(peers, workers, strict=False):
                if reason := absence(peer.who):
                    rows[peer].status, rows[peer].reason = "skipped", reason
                elif self._tries(rows[peer], lambda peer=peer, worker=worker: self._prepare(trial, peer, worker, rows)):
                    ready[peer] = worker
                    rows[peer].status = "checked"
                self.put(rows[peer])
            samples = self._time(trial, ready, rows)
        finally:
            for worker in workers if self.workers is None else ():
                worker.stop()
        summarize(trial, rows, samples)
        for row in rows.values():
            self.put(row)
        return list(rows.values())

    def _ask(self, worker: Worker, do: str, **what):
        seconds = min(self.limit_s, self.deadline - time.time())
        if seconds <= 0:
            raise Failed("no time was left for this")
        return worker.ask(do, seconds, **what)

    def _tries(self, row: Row, what: Callable[[], object]) -> bool:
        try:
            what()
        except Failed as error:
            row.status, row.reason = "failed", str(error)
            self.say(f"{row.case}, {row.peer}: FAILED: {error}")
            return False
        return True

    def _prepare(self, trial: Trial, peer: Peer, worker: Worker, rows: dict[Peer, Row]) -> None:
        """Builds a peer, holds its losses against the truth, and takes its memory: the first choice that fits."""
        row, notes, truth = rows[peer], [], self._truth(trial, worker)
        for batch, recompute in trial.choices:
            try:
                setup = {"who": peer.who.split()[0], "is_compiled": peer.mode == "compiled"}
                setup |= {"precision": trial.precision, "recompute": recompute if peer.is_ours else "none"}
                if peer.is_ours:
                    setup |= {"backend": "torch"} if "torch" in peer.who else self.setup
                facts, losses = self._train(worker, trial, setup, batch, peer.is_tuned)
                memory = self._ask(worker, "warm_up")
                break
            except Failed as error:
                if not error.out_of_memory or (batch, recompute) == trial.choices[-1]:
                    raise Failed("; ".join([*notes, str(error)])) from error
            notes.append(f"out of memory at B = {batch}" + (f", recompute {recompute}" if recompute != "none" else ""))
            worker.stop()
        largest = max((abs(a / b - 1.0) for a, b in zip(losses, truth, strict=True)), key=lambda d: (d != d, d))
        allowed = LOSS_TOLERANCE[trial.precision]
        if not largest <= allowed:
            raise Failed(f"its losses must be the reference's to {allowed:.0e}, they differ by up to {largest:.1e}")
        row.facts |= {"precision": trial.precision, "batch": batch, "recompute": recompute} | facts
        row.note = "; ".join([*notes, *([f"SDPA: {facts['sdpa']}"] if facts["sdpa"] else [])])
        row.figures |= {f"{key} memory": exact(memory[key], "B") for key in ("step", "peak")}
        row.figures |= {"loss": exact(losses[-1], "nats"), "loss difference": exact(largest, "")}
        self.say(f"{trial.name}, {peer}: loss {losses[-1]:.5f}, {memory['step'] / 1e6:,.0f} MB")

    def _truth(self, trial: Trial, worker: Worker) -> list[float]:
        """The losses of the plain reference in float32, eager."""
        key = (trial.config, trial.updates, trial.checked)
        if key not in self.truths:
            batch = min(TRUTH_SEQUENCES, trial.checked[0])
            self.truths[key] = self._train(worker, trial, {"who": "reference"}, batch)[1]
            if self.workers is None:
                worker.stop()  # its memory would be missing from the step's
        return self.truths[key]

    def _train(self, worker: Worker, trial: Trial, setup: dict, batch: int, is_tuned: bool = False) -> tuple:
        model, (sequences, context) = dataclasses.asdict(trial.config), trial.checked
        facts = self._ask(worker, "build", model=model, batch=batch, is_tuned=is_tuned, setup=setup)
        shape = {"updates": trial.updates, "sequences": sequences, "context": context}
        return facts, self._ask(worker, "losses", **shape)

    def _time(self, trial: Trial, ready: dict[Peer, Worker], rows: dict[Peer, Row]) -> dict[Peer | str, list[float]]:
        """Seconds per update of every peer and the ceiling's FLOP/s, in turns; NaN of one that failed meanwhile."""
        untimed, timed = trial.block

        def sample(row: Row, worker: Worker, do: str, **what) -> float:
            found = []
            if not row.reason:
                self._tries(row, lambda: found.append(self._ask(worker, do, **what)))
            return found[0] if found else math.nan

        samplers = {
            peer: lambda row=rows[peer], worker=worker: sample(row, worker, "time_steps", untimed=untimed, timed=timed)
            for peer, worker in ready.items()
        }
        if not ready:
            return {}
        first, ceiling = next(iter(ready.values())), Row("step", trial.name, "ceiling")
        precision = trial.precision
        samplers["ceiling"] = lambda: sample(ceiling, first, "ceiling", kind="matmul", precision=precision)
        return in_turns(samplers, self.goes_on())


def summarize(trial: Trial, rows: dict[Peer, Row], samples: dict[Peer | str, list[float]]) -> None:
    """Adds what the samples say to the rows: times, rates, and ratios of time per token within each round."""
    measured = {peer: times for peer, times in samples.items() if peer in rows and not rows[peer].reason}
    each = {peer: [time / rows[peer].facts["batch"] for time in times] for peer, times in measured.items()}
    ours = min((t for p, t in each.items() if p.is_ours), key=statistics.median, default=None)
    fastest = min((t for p, t in each.items() if not p.is_ours), key=statistics.median, default=None)
    flops = flops_per_token(trial.config, trial.config.n_positions)
    for peer, times in measured.items():
        row, step = rows[peer], spread(times, "s")
        tokens = row.facts["batch"] * trial.config.n_positions
        row.status = "measured"
        row.figures |= {"step": step, "tokens": rate(step, tokens, "tokens/s")}
        row.figures |= {"ceiling": spread(samples["ceiling"], "FLOP/s")}
        row.figures |= {"of ceiling": rate(step, tokens * flops / row.value("ceiling"), "%")}
        if peak_flops := row.facts.pop("peak_flops"):
            row.figures["mfu"] = rate(step, tokens * flops / peak_flops, "%")
        if peer.is_ours and fastest:
            row.figures["speed"] = spread([f / s for f, s in zip(fastest, each[peer], strict=True)], "x")
        elif ours:
            row.figures["time / ours"] = spread([s / o for s, o in zip(each[peer], ours, strict=True)], "x")


def case_of(text: str) -> tuple[int, ...]:
    """L,C,T,B as four numbers. Raises argparse.ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        case = tuple(int(part) for part in text.split(","))
        if len(case) == 4 and min(case) > 0 and case[1] % HEAD_DIM == 0:
            return case
    raise argparse.ArgumentTypeError(f"must be L,C,T,B, with C a multiple of {HEAD_DIM}, got {text!r}")


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table per case, and with --save writes them; the exit code."""
    import torch

    on_gpu = torch.cuda.is_available()
    field_ = {str(peer): peer for peer in everyone(on_gpu)}
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    cases = GPU_CASES if on_gpu else CPU_CASES
    parser.add_argument("--case", type=case_of, nargs="+", default=cases, metavar="L,C,T,B", help="what to train")
    parser.add_argument("--precision", choices=LOSS_TOLERANCE, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each peer")
    parser.add_argument("--only", choices=field_, nargs="+", default=[*field_], metavar="NAME", help="; ".join(field_))
    parser.add_argument("--save", action="store_true", help="write peers.json to this machine's directory")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    device, rows = "cuda" if on_gpu else "cpu", []
    facts = machine.facts(device)
    comparison = Comparison(
        lambda: within(math.inf, args.rounds, args.rounds), say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    for case in args.case:
        began = time.monotonic()
        found = comparison.run(Trial.of(case, args.precision, on_gpu), [field_[name] for name in args.only])
        rows += found
        print(f"{tables.of(found)}\n\n({time.monotonic() - began:.0f} s)\n", flush=True)
        if args.save:
            results.save("peers", facts, rows, machine.slug(device))
    return int(any(row.status != "measured" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
