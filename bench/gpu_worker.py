"""The process that touches the GPU for bench.gpu: runs parts of the plan and records every result at once.

It may die (a kernel's illegal access ends the CUDA context) or hang. bench.gpu then notes what was running as failed
and starts another, which goes on from there. Exit codes: 0 every part was run or left out, 3 the CUDA context is lost.
"""

import argparse
import json
import os
import sys

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before kernels is imported

import contextlib
import gc
import math
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import gpu_batch, gpu_cases, gpu_step, machine
from bench.gpu_cases import Op
from bench.gpu_plan import PLAN, Part
from bench.gpu_report import Record
from bench.gpu_timing import (
    Timer,
    outputs_of,
    random_douts,
    relative_error,
    round_robin,
    spacer,
    summary,
    values,
    with_gradients,
)

CONTEXT_LOST = 3

# ||out - ref|| / ||ref|| up to which a contestant counts as right before it is timed; ref is float32 inside.
CHECK_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}

# The accuracy section's precisions, and the error that is fine even where PyTorch's own is smaller.
PRECISIONS = {
    "bf16": (torch.bfloat16, "highest", 4e-3),  # 2^-8
    "fp16": (torch.float16, "highest", 1e-3),  # 2^-10
    "fp32": (torch.float32, "highest", 1e-5),
    "tf32": (torch.float32, "high", 2e-3),  # 2^-9
}


class Worker:
    """What every part needs: the record, the device, the sizes and the time."""

    def __init__(self, record: Record, deadline: float, dry_run: bool):
        self.record, self.deadline, self.dry_run = record, deadline, dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.float32 if dry_run else torch.bfloat16
        self.sizes = gpu_cases.DRY if dry_run else gpu_cases.GPT2
        self.compiler = "aot_eager" if dry_run else "inductor"
        self.timer: Timer | None = None  # of ops; its buffer is given back before a training step

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{time.time() - self.record.state['began']:5.0f} s] {text}", flush=True)

    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.time()

    def run(self, parts: Sequence[Part]) -> None:
        """Each of these parts that fits the time left and is not done."""
        measure = {
            **{"ceilings": self.ceilings, "accuracy": self.accuracy},
            **{section: self.training for section in ("step", "sizes", "loss", "batch")},
        }
        for part in parts:
            if str(part) in self.record.state["done"]:
                continue
            left, needed = self.seconds_left(), 0.0 if self.dry_run else part.seconds
            if left <= needed:
                self.say(f"{part}: left out")
                self.record.leave_out(part, f"needs up to {needed:.0f} s, {max(0.0, left):.0f} s were left")
                continue
            torch.manual_seed(len(self.record.state["rows"]))  # fresh numbers in every process
            with self.attempt(part, part.name, "inputs and timing") as row:
                if row is not None:
                    measure.get(part.section, self.contest)(part)
            self.record.finish(part)
            torch.set_float32_matmul_precision("highest")  # a training step sets it for its own precision
            torch.compiler.reset()  # compiled functions hold on to models and buffers
            self.clean_up()

    @contextlib.contextmanager
    def attempt(
        self, part: Part, op: str, contestant: str, *, section: str | None = None, seconds: float | None = None
    ) -> Iterator[dict | None]:
        """Yields the row to fill. An exception makes it a failed one, and the caller goes on.

        Yields None, and nothing should be done, where an earlier process failed at this. The caller puts a row that
        it filled; one that failed is put here. section: the row's, if not the part's. seconds: what this should take
        at most, if not as long as the part.
        """
        section = section or part.section
        earlier = self.record.find(section, op, contestant)
        if earlier is not None and earlier["status"] == "failed":
            yield None
            return
        row = {"section": section, "op": op, "contestant": contestant, "status": "failed"}
        self.record.begin(part, section, op, contestant, seconds or part.seconds)
        try:
            yield row
        except Exception as error:
            row["status"] = "failed"
            row["reason"] = sentence(error)
            with (self.record.out / "failures.log").open("a", encoding="utf-8") as file:
                file.write(f"{part}, {contestant}\n{traceback.format_exc()}\n")
        if "reason" in row:
            self.record.put(row)
            self.say(f"{part}, {contestant}: FAILED: {row['reason']}")
        self.clean_up()

    def clean_up(self) -> None:
        """Gives memory back; ends the process if the CUDA context is lost, since nothing could run in it."""
        if self.device.type == "cpu":
            return
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            self.say("the CUDA context is lost: going on in a new process")
            os._exit(CONTEXT_LOST)  # an orderly exit would trip over the context

    def put(self, row: dict, said: str = "", **figures) -> None:
        """Records a row that went well: measured if there are figures, else checked. A dry run has none."""
        figures = {} if self.dry_run else figures
        status = "measured" if figures else "checked"
        self.record.put(row | figures | {"status": status})
        self.say(f"{row['section']}: {row['op']}, {row['contestant']}: {said if figures else status}")

    def skip(self, row: dict, reason: str) -> None:
        """Records that a row cannot be measured here, which is no failure."""
        self.record.put(row | {"status": "skipped", "reason": reason})
        self.say(f"{row['section']}: {row['op']}, {row['contestant']}: {reason}")

    def phase(self, times_ms: list[float], work: float, unit: str) -> dict:
        """A phase's times, rate and share of the ceiling. work: FLOPs or bytes."""
        times = summary(times_ms)
        rate = work / (times["median_ms"] * 1e-3) / {"TFLOP/s": 1e12, "GB/s": 1e9}[unit]
        ceiling = self.record.find("ceilings", "ceiling", {"TFLOP/s": "bf16 matmul", "GB/s": "device copy"}[unit])
        top = ceiling["phases"]["forward"]["rate"] if ceiling and "phases" in ceiling else None
        return {**times, "rate": rate, "unit": unit, "share_of_ceiling": None if top is None else rate / top}

    # The parts of the plan

    def ceilings(self, part: Part) -> None:
        """What this machine reaches: a large matrix product and a large copy, both of random data."""
        n, elements = (64, 4096) if self.dry_run else (8192, 2**30)

        def product(a: Tensor, b: Tensor) -> Tensor:
            return a @ b

        def copy(source: Tensor, target: Tensor) -> Tensor:
            return target.copy_(source)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype)

        with self.attempt(part, "ceiling", "bf16 matmul") as row:
            if row is not None:
                sets = [((randn(n, n), randn(n, n)), ()) for _ in range(2)]
                a, b = sets[0][0]
                require_close(product(a, b)[:64], a[:64].double() @ b.double(), self.dtype, "the product")
                self.time_ceiling(row, product, sets, 2.0 * n**3, "TFLOP/s")
        with self.attempt(part, "ceiling", "device copy") as row:
            if row is not None:
                sets = [((randn(elements), torch.empty(elements, device=self.device, dtype=self.dtype)), ())]
                require(torch.equal(copy(*sets[0][0]), sets[0][0][0]), "the copy must equal its source, it does not")
                work = 2.0 * elements * self.dtype.itemsize  # read and written
                self.time_ceiling(row, copy, sets, work, "GB/s")

    def time_ceiling(self, row: dict, fn: Callable, sets: list[tuple], work: float, unit: str) -> None:
        """Times one ceiling and records it."""
        if self.dry_run:
            return self.put(row)
        self.timer = self.timer or Timer(spacer())
        for _ in range(20):  # from idle clocks to busy ones
            fn(*sets[0][0])
        times = round_robin({"": fn}, sets, ("forward_no_grad",), self.timer, lambda: False)[""]["forward_no_grad"]
        phase = self.phase(times, work, unit)
        return self.put(row, f"{phase['rate']:.0f} {unit}", phases={"forward": phase})

    def accuracy(self, part: Part) -> None:
        """Ours and PyTorch's against the float64 definition, and ours against itself, bit for bit, at GPT-2's size."""
        sizes = gpu_cases.DRY if self.dry_run else gpu_cases.MODERATE
        op = gpu_cases.ops(sizes, not self.dry_run)[part.name]
        for precision, (dtype, float32_products, floor) in PRECISIONS.items():
            if self.dry_run and precision != "fp32":
                continue
            with self.attempt(part, part.name, precision) as row:
                if row is None:
                    continue
                torch.set_float32_matmul_precision(float32_products)
                try:
                    errors = accuracy_errors(op, dtype, self.device)
                finally:
                    torch.set_float32_matmul_precision("highest")
                if not self.dry_run:
                    row["errors"] = finite(errors)  # a failed row keeps them
                for name, (ours, theirs) in errors.items():
                    allowed = max(floor, 2.0 * theirs)
                    require(ours <= allowed, f"the error of {name} must be at most {allowed:.1e}, got {ours:.1e}")
                self.put(row)
        with self.attempt(part, part.name, "twice the same bits") as row:
            if row is not None:
                op = gpu_cases.ops(self.sizes, not self.dry_run)[part.name]
                inputs, douts = self.fresh(op)
                first = values(op.triton, inputs, douts)
                second = values(op.triton, inputs, douts)
                for name, one, other in zip(op.tensors.split(), first, second, strict=True):
                    require(torch.equal(one, other), f"{name} must be the same bits in two runs, it is not")
                self.put(row)

    def fresh(self, op: Op) -> tuple[list[Tensor], list[Tensor]]:
        """New random inputs and incoming gradients."""
        inputs = with_gradients(op.inputs(self.dtype, self.device))
        with torch.no_grad():
            douts = random_douts(outputs_of(op.pytorch, inputs))
        return inputs, douts

    def contest(self, part: Part) -> None:
        """Checks every contestant of an op against the definition, then times those that are right, in turns."""
        op = gpu_cases.ops(self.sizes, not self.dry_run)[part.name]
        sets = [self.fresh(op) for _ in range(1 if self.dry_run else 2)]
        truth = values(op.reference, *sets[0])
        right, rows = {}, {}
        for name, fn in op.contestants(self.compiler).items():
            with self.attempt(part, part.name, name) as row:
                if row is None:
                    continue
                errors = check(op, fn, *sets[0], truth, self.dtype)
                rows[name] = row if self.dry_run else row | {"errors": errors, "peak_bytes": peak_bytes(fn, *sets[0])}
                self.put(rows[name])
                right[name] = fn
        del truth
        self.clean_up()
        if self.dry_run or not right:
            return
        self.record.begin(part, part.section, part.name, "inputs and timing", part.seconds)
        self.timer = self.timer or Timer(spacer())
        samples = round_robin(right, sets, op.phases, self.timer, lambda: self.seconds_left() < 2.0)
        work = op.work(self.dtype.itemsize)
        for name, times in samples.items():
            phases = {p: self.phase(times[p], gpu_cases.amount(work, p), op.unit) for p in op.phases}
            self.put(rows[name], f"forward + backward {phases['both']['median_ms']:.3f} ms", phases=phases)

    def training(self, part: Part) -> None:
        """Whole training steps."""
        self.timer = None  # its buffer would be missing from the memory for the step
        self.clean_up()
        {"loss": gpu_step.agreement, "batch": gpu_batch.search}.get(part.section, gpu_step.measure)(self, part)


def sentence(error: Exception) -> str:
    """An exception in one line: its kind and the first line of what it says; the whole is in failures.log."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no message'}"[:300]


def require(holds: bool, what: str) -> None:
    """Raises ArithmeticError unless `holds`."""
    if not holds:
        raise ArithmeticError(what)


def require_close(got: Tensor, truth: Tensor, dtype: torch.dtype, name: str) -> float:
    """The relative error. Raises ArithmeticError if it is above the tolerance or not a number."""
    error, allowed = relative_error(got, truth), CHECK_TOLERANCE[dtype]
    require(error <= allowed, f"the error of {name} must be at most {allowed:.0e}, got {error:.1e}")
    return error


def finite(errors: dict[str, tuple[float, float]]) -> dict[str, tuple[float | None, float | None]]:
    """The same with None for NaN and infinity, which JSON cannot hold."""
    return {name: tuple(e if math.isfinite(e) else None for e in pair) for name, pair in errors.items()}


def check(
    op: Op, fn: Callable, inputs: list[Tensor], douts: list[Tensor], truth: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors by name. Raises ArithmeticError if one is too large. Compiles what the phases will run."""
    got = values(fn, inputs, douts)
    errors = {name: require_close(g, t, dtype, name) for name, g, t in zip(op.tensors.split(), got, truth, strict=True)}
    if "forward_no_grad" in op.phases:
        with torch.no_grad():
            got = outputs_of(fn, inputs)
        for name, g, t in zip(op.tensors.split(), got, truth, strict=False):  # outputs come first
            require_close(g, t, dtype, f"{name} without gradients")
    return errors


def peak_bytes(fn: Callable, inputs: list[Tensor], douts: list[Tensor]) -> int:
    """The most memory that forward and backward take beside what is allocated before, gradients included."""
    with machine.peak_memory(inputs[0].device) as peak:
        values(fn, inputs, douts)
    return peak.above


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, so that what an op forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def accuracy_errors(op: Op, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, float]]:
    """(our relative error, PyTorch's) of every output and gradient, against the definition in float64."""
    inputs = with_gradients(op.inputs(dtype, device))
    for targets in inputs:
        if not targets.is_floating_point():
            targets[::8] = -100  # ignored
    with torch.no_grad():
        douts = random_douts(outputs_of(op.pytorch, inputs))
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    truth = values(op.reference, with_gradients(wide), [d.double() for d in douts])
    theirs = values(op.pytorch, inputs, douts)
    with poisoned():
        ours = values(op.triton, inputs, douts)
    return {
        name: (relative_error(a, t), relative_error(b, t))
        for name, a, b, t in zip(op.tensors.split(), ours, theirs, truth, strict=True)
    }


def gpu_facts() -> dict[str, str]:
    """The GPU, its size and its driver."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "not known"
    return {
        "machine": properties.name,
        "gpu": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": driver.strip(),
        "cuda": str(torch.version.cuda),
    }


def main() -> None:
    """Runs the parts named on the command line; the record must exist."""
    parser = argparse.ArgumentParser(description="part of bench.gpu, which starts it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", required=True, help="their names, as a JSON list")
    parser.add_argument("--deadline", type=float, required=True, help="seconds of time.time")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    record = Record.load(args.out)
    if not args.dry_run:
        facts, known = gpu_facts(), record.state["machine"].get("gpu")
        if known not in (None, facts["gpu"]):
            sys.exit(f"bench.gpu: --resume goes on with the results of a {known}, here is a {facts['gpu']}")
        record.state["machine"] |= facts
        record.save()
    names = json.loads(args.parts)
    Worker(record, args.deadline, args.dry_run).run([part for part in PLAN if str(part) in names])


if __name__ == "__main__":
    main()
