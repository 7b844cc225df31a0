"""What the suites share: check first, then time; what goes into the report.

    make bench [OUT=FILE]                      # quick: small sizes on a CPU, GPT-2 124M on a GPU; bench-full: all
    make bench-compare A=OLD.json B=NEW.json   # pytest-benchmark's own comparison

FILE is pytest-benchmark's JSON: machine_info holds bench.machine.facts, extra_info the figures "throughput" and "peak"
(memory of one call, above what was held before) in the form of bench.results.
"""

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine
from bench.measure import Peak, peak_memory, release_freed_memory
from bench.results import exact, rate, spread
from engine.device import tune_malloc
from kernels.dispatch import MODULES, triton_obstacle
from kernels.launch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SEQUENCES = {"tiny": 16, "mini": 32, "gpt2": 1}  # of a micro-batch; tiny's and mini's are what they train with
if ON_GPU:
    SEQUENCES = {"gpt2": 16, "gpt2-medium": 16, "gpt2-large": 8, "gpt2-xl": 4}
QUICK = next(iter(SEQUENCES))  # the preset whose cases all run in the quick suite

BUDGET_S = 0.7  # of timed calls per case
ROUNDS = (5, 200)  # at least and at most
ROUND_S = 2e-3  # calls that are shorter share a round


class Measure:
    """Checks one call of a function, then times others."""

    def __init__(self, benchmark):
        self.benchmark, self.info = benchmark, benchmark.extra_info

    def __call__(
        self,
        function: Callable[[], Any],
        check: Callable[[Any], None],
        *,
        before: Callable[[], None] | None = None,
        work: tuple[float, str] | None = None,
        rounds: int | None = None,
        peak: str = "second",
    ) -> Any:
        """Times function() and returns its last result, once check(result) has raised nothing.

        before: done before every call, outside the time. work: what a call gets through, and the unit of its rate.
        peak: whose memory is reported: the "first" or "second" call's, or "none" for another process's work.
        """

        def call() -> Any:
            result = function()
            if ON_GPU:
                torch.cuda.synchronize()
            return result

        def measured_call(is_warm: bool = False) -> tuple[Any, float, Peak]:
            if before is not None:
                before()
            if peak != "none" and not is_warm:
                release_freed_memory()
            with contextlib.nullcontext(Peak()) if peak == "none" else peak_memory(DEVICE) as taken:
                began = time.perf_counter()
                result = call()
                seconds = time.perf_counter() - began
            return result, seconds, taken

        result, seconds, taken = measured_call()
        check(result)
        del result
        if peak == "second":
            _, seconds, taken = measured_call()
        if seconds < BUDGET_S / ROUNDS[0]:
            seconds = measured_call(is_warm=True)[1]
        if taken.most:
            self.info["peak"] = exact(taken.above, "B")._asdict()
        iterations = 1 if before is not None else max(1, math.ceil(ROUND_S / seconds))
        rounds = rounds or min(ROUNDS[1], max(ROUNDS[0], int(BUDGET_S / (seconds * iterations))))
        last = self.benchmark.pedantic(call, setup=before, rounds=rounds, iterations=iterations)
        if work is not None and self.benchmark.stats is not None:  # there are none with --benchmark-disable
            self.info["throughput"] = rate(spread(self.benchmark.stats.stats.data, "s"), *work)._asdict()
        return last


@pytest.fixture
def measure(benchmark) -> Measure:
    benchmark.group = benchmark.fullname.partition("::")[0]  # the table's, unless the case names another
    return Measure(benchmark)


@pytest.fixture(autouse=True, scope="session")
def tuned_malloc() -> None:
    """Tunes malloc on a CPU as training does: else page faults would be part of every time."""
    if not ON_GPU:
        tune_malloc()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield  # each case compiles its own functions, in float32 as it was, and leaves no memory to the next
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    torch.set_float32_matmul_precision("highest")
    release_freed_memory()


def case(*values: str, is_quick: bool) -> Any:
    """A parameter set that is named by its values; what is not quick runs in the full suite alone."""
    return pytest.param(*values, id="-".join(values), marks=() if is_quick else pytest.mark.slow)


def require_triton(dtype: torch.dtype, head_dim: int) -> None:
    """Skips the case, with the reason, where Triton does not run its kernels on a GPU."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter runs here, whose time means nothing")
    if reasons := [reason for op in MODULES if (reason := triton_obstacle(op, DEVICE, dtype, head_dim))]:
        pytest.skip(f"Triton: {reasons[0]}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_json", None):
        Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    """The machine of every figure; not the host's name."""
    command = shlex.join(["python", "-m", "pytest", *map(str, config.invocation_params.args)])
    return machine.facts(DEVICE.type) | {"threads": str(torch.get_num_threads()), "command": command}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
