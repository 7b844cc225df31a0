"""What the hot paths of a CPU do, counted instead of timed.

    python -m bench.counts [--out FILE.json] [--case WORDS] [--no-callgrind]

Of one call of each case, after calls that fill every cache: calls of PyTorch's operators, tensors' allocations, their
bytes and the most that were held at once above the start, and calls of Python and of C functions. Each is counted
twice; one that differs is left out, and said to be. Where valgrind is installed, callgrind adds the instructions of the
paths that need no PyTorch; those repeat to within a fraction of a percent, and not exactly.

`python -m bench.compare A.json B.json` says what grew: the file's "counts" give the growth that is allowed. Counts
depend on the versions of Python and of the packages, which the file has, and not on what else runs.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import numpy as np

from bench import machine
from bench.counters import counted, inside_ffi_call, instructions
from engine.errors import BAD_INPUT, DONE

EXACT = ("op_calls", "allocations", "allocated_bytes", "peak_bytes", "python_calls", "c_calls")
INSTRUCTIONS_ALLOWED = 0.01  # relative; runs differed by 0.1% at most
WARM_UPS = 2
SEQUENCES = 4  # of a step
EVAL_BATCH_TOKENS = 512
PRESET = "tiny"
TEXT_BYTES = 20_000

Case = Callable[[contextlib.ExitStack], Callable[[], object]]  # what it needs ends with the stack


# ---- Cases: parts of training `tiny` on the torch backend, eager, in float32 ----------------------------------------


def config_of(stack: contextlib.ExitStack):
    """The preset with small batches and a run directory of its own."""
    from engine.config import PRESETS

    return dataclasses.replace(
        PRESETS[PRESET],
        out=stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_counts_")),
        tokens_per_step=SEQUENCES * PRESETS[PRESET].model.n_positions,
        eval_tokens=2 * EVAL_BATCH_TOKENS,
    )


def contestant():
    """This project's training step as bench.contestants has it, and tokens and targets for it."""
    from bench.contestants import TrainingStep, initial_weights
    from model.presets import PRESETS

    config = PRESETS[PRESET]
    step = TrainingStep("ours", config, initial_weights(config), "cpu", is_compiled=False, backend="torch")
    batch = stream_of().windows(np.arange(SEQUENCES), config.n_positions)
    return step, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def training_step(stack):
    step, tokens, targets = contestant()
    return lambda: step(tokens, targets)


def forward(stack):
    import torch

    step, tokens, targets = contestant()
    return torch.no_grad()(lambda: step.loss(tokens, targets))


def update(stack):
    import torch

    from engine import optim

    model = contestant()[0].model
    optimizer = optim.build(model, config_of(stack))  # tiny's own: Muon for the matrices

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optim.set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def evaluate(stack):
    import torch

    from engine import evaluation
    from engine.distributed import Ranks

    config, stream, model = config_of(stack), stream_of(), contestant()[0].model
    stack.enter_context(mock.patch.object(evaluation, "BATCH_TOKENS", EVAL_BATCH_TOKENS))
    chosen, ranks = evaluation.windows(stream, config), Ranks(0, 0, 1, torch.device("cpu"))
    return lambda: evaluation.mean_loss(model, stream, chosen, config, ranks)


def generate(stack):
    step, tokens, _ = contestant()
    return lambda: step.model.generate(tokens[:1, :8], 4, seed=0)


class AtOnce:
    """In place of the thread that reads ahead, so that its work is counted, and always in the same order."""

    def __init__(self, **_):
        pass

    def submit(self, function: Callable, *arguments) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def two_batches(stack):
    from engine import data
    from model.presets import PRESETS

    with mock.patch.object(data, "ThreadPoolExecutor", AtOnce):
        batches = data.Batches(stream_of(), PRESETS[PRESET].n_positions, SEQUENCES, accumulation=2, seed=1)

    def run() -> None:
        batches.at(0)  # not what was read ahead
        batches.at(1)

    return run


def metrics_row(stack):
    from engine import metrics, optim

    config, numbers = config_of(stack), itertools.count()
    stack.enter_context(mock.patch.object(metrics, "PLAIN_EVERY", math.inf))  # a line would come by the clock
    with contextlib.redirect_stdout(io.StringIO()):  # no terminal, whatever this program writes to
        record = stack.enter_context(contextlib.closing(metrics.Metrics(config, 0, True, "byte")))

    def run() -> None:
        step = next(numbers)
        record.log(step, lr=optim.learning_rate(step, config), loss=2.0, grad_norm=1.0)
        record.end_step(step)

    return run


TORCH: dict[str, Case] = {
    f"training step, {PRESET}": training_step,
    f"forward, {PRESET}": forward,
    f"update by its optimizer, {PRESET}": update,
    f"evaluation, {PRESET}": evaluate,
    f"4 tokens generated, {PRESET}": generate,
    "data: batches of two steps": two_batches,
    "metrics: a row with its learning rate": metrics_row,
}

# ---- Cases without PyTorch ------------------------------------------------------------------------------------------


def stream_of(num_tokens: int = 100_000):
    """Tokens below 257 in memory, as engine.data reads them."""
    from engine import data

    tokens = (np.arange(num_tokens, dtype=np.uint64) * 2654435761 % 257).astype(np.uint16)
    return data.TokenStream([Path("tokens")], [tokens], 257)


def order(stack):
    from engine import data

    return lambda: data.step_windows(3, 512, 1_000_003, 1)


def read_windows(stack):
    stream = stream_of()

    def run() -> None:
        for index in range(256):
            stream.read(64 * index, 65)

    return run


def encode(name: str) -> Case:
    def build(stack):
        from engine import tokenizer

        sentence = "The batch of step s is a pure function of (data, seed, s): one permutation; x_ptr += 1,024.\n\n"
        words, text = tokenizer.load(name), sentence * (TEXT_BYTES // len(sentence))
        return lambda: words.encode(text)

    return build


TORCH_FREE: dict[str, Case] = {
    "data: order of a step of 512 windows": order,
    "data: 256 windows of 65 tokens read": read_windows,
    "tokenizer: gpt2, encode": encode("gpt2"),
    "tokenizer: bytes, encode": encode("bytes"),
}

# ---- Counting -------------------------------------------------------------------------------------------------------


def row_of(case: str, function: Callable[[], object], *, has_torch: bool) -> tuple[dict, list[str]]:
    """A case's row, and what was left out of it because it did not repeat."""
    for _ in range(WARM_UPS):
        function()
    first, second = (counted(function, has_torch=has_torch) for _ in range(2))
    uneven = [name for name in EXACT if first.get(name) != second.get(name)]
    row = {"case": case} | {name: value for name, value in first.items() if name not in uneven}
    return row, [f"{case}: {name}: {first[name]} and {second[name]}" for name in uneven]


def all_rows(words: str = "") -> tuple[list[dict], list[str]]:
    """The rows of the cases whose names hold these words, on one thread, and what was left out of them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, left_out = [], []
    try:
        for cases, has_torch in ((TORCH, True), (TORCH_FREE, False)):
            for case in (name for name in cases if words in name):
                with contextlib.ExitStack() as stack:
                    row, uneven = row_of(case, cases[case](stack), has_torch=has_torch)
                rows.append(row)
                left_out += uneven
    finally:
        torch.set_num_threads(threads)
    return rows, left_out


def run_hot_paths(cases: list[str]) -> None:
    """What callgrind watches: each case once, after its warm-ups."""
    for case in cases:
        with contextlib.ExitStack() as stack:
            function = TORCH_FREE[case](stack)
            for _ in range(WARM_UPS):
                function()
            gc.collect()
            gc.disable()
            inside_ffi_call(function)
            gc.enable()


def add_instructions(rows: list[dict]) -> str:
    """Puts them into the rows of the cases without PyTorch; if it cannot, the reason."""
    watched = [row for row in rows if row["case"] in TORCH_FREE]
    cases = [row["case"] for row in watched]
    if not cases:
        return "all of these cases need PyTorch"
    program = f"from bench.counts import run_hot_paths; run_hot_paths({cases!r})"
    found, reason = instructions(program, len(cases))
    for row, number in zip(watched, found, strict=False):  # none if there is a reason
        row["instructions"] = number
    return reason


# ---- Report -------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """The rows as text."""
    names = [name for name in (*EXACT, "instructions") if any(name in row for row in rows)]
    heads = ["one call of", *names]
    lines = [heads, *([row["case"], *(f"{row[name]:,}" if name in row else "-" for name in names)] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def main(arguments: list[str] | None = None) -> int:
    """Counts every case; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the counts as JSON, for bench.compare")
    parser.add_argument("--case", default="", metavar="WORDS", help="only the cases whose names hold these words")
    parser.add_argument("--no-callgrind", action="store_true", help="leave out the instructions")
    args = parser.parse_args(arguments)
    rows, left_out = all_rows(args.case)
    if not rows:
        print(f"counts: --case must be part of a case's name, got {args.case!r}", file=sys.stderr)
        return BAD_INPUT
    reason = "--no-callgrind was given" if args.no_callgrind else add_instructions(rows)
    print(table(rows))
    for line in left_out:
        print(f"left out, it does not repeat: {line}")
    if reason:
        print(f"no instructions: {reason}")
    if args.out is not None:
        allowed = dict.fromkeys(EXACT, 0.0) | {"instructions": INSTRUCTIONS_ALLOWED}
        report = {"facts": machine.facts(), "counts": allowed, "left_out": left_out, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
