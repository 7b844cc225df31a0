"""What the pytest-benchmark suites of this directory share: check first, then time; what goes into the report.

    make bench [OUT=FILE]                      # quick: small sizes on a CPU, GPT-2 124M on a GPU
    make bench-full [OUT=FILE]                 # all sizes
    python -m pytest bench/bench_step.py -k tiny --benchmark-json=FILE

A case is timed after one call whose result has passed the case's own check; a case that fails it has no figures. Peak
memory is that of one more call, above what was held before. FILE is pytest-benchmark's JSON: machine_info holds
bench.machine.facts, extra_info the peak in bytes and the throughput, and the times of single rounds are left out.
"""

import contextlib
import ctypes
import gc
import math
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import machine  # noqa: E402
from kernels.dispatch import MODULES, triton_obstacle  # noqa: E402
from kernels.launch import INTERPRETED  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SEQUENCES = {"tiny": 16, "mini": 32, "gpt2": 1}  # of a micro-batch; tiny's and mini's are what they train with
if ON_GPU:
    SEQUENCES = {"gpt2": 16, "gpt2-medium": 16, "gpt2-large": 8, "gpt2-xl": 4}
QUICK = next(iter(SEQUENCES))  # the preset whose cases all run in the quick suite

BUDGET_S = 0.7  # of timed calls per case
ROUNDS = (5, 200)  # at least and at most
ROUND_S = 2e-3  # calls that are shorter share a round

# ---- Measuring ----------------------------------------------------------------------------------------------------


class Measure:
    """Checks one call of a function, then times others."""

    def __init__(self, benchmark):
        self.benchmark = benchmark

    def __call__(
        self,
        function: Callable[[], Any],
        check: Callable[[Any], None],
        *,
        before: Callable[[], None] | None = None,
        rounds: int | None = None,
        is_process: bool = False,
        keeps_memory: bool = False,
        device: torch.device | str = "cpu",
        **work: float,
    ) -> Any:
        """Times function() and returns its last result, once check(result) has raised nothing.

        before: done before every call, outside the time. rounds: as many instead of what the budget allows.
        is_process: the work is another process's, whose memory is not read here.
        device: where the work is done, and whose memory is meant.
        keeps_memory: later calls use the memory of the first, whose peak is reported; otherwise it is the second's.
        work: what a call gets through, such as tokens=1024; extra_info then has tokens_per_s.
        """

        def call() -> Any:
            result = function()
            if str(device).startswith("cuda"):
                torch.cuda.synchronize()
            return result

        def measured_call(is_warm: bool = False) -> tuple[Any, float, machine.Peak]:
            if before is not None:
                before()
            if not is_process and not is_warm:
                release_freed_memory()
            with contextlib.nullcontext(machine.Peak()) if is_process else machine.peak_memory(device) as peak:
                began = time.perf_counter()
                result = call()
                seconds = time.perf_counter() - began
            return result, seconds, peak

        result, seconds, peak = measured_call()
        check(result)
        del result
        if not is_process and not keeps_memory:
            _, seconds, peak = measured_call()
        if seconds < BUDGET_S / ROUNDS[0]:
            seconds = measured_call(is_warm=True)[1]
        self.benchmark.extra_info["peak_bytes"] = peak.above if peak.most else None
        least, most = ROUNDS
        iterations = 1 if before is not None else max(1, math.ceil(ROUND_S / seconds))
        if rounds is None:
            rounds = min(most, max(least, int(BUDGET_S / (seconds * iterations))))
        last = self.benchmark.pedantic(call, setup=before, rounds=rounds, iterations=iterations)
        self.throughput(**work)
        return last

    def throughput(self, **work: float) -> None:
        """Adds amounts per second to the figures: tokens=1024 gives tokens_per_s."""
        if self.benchmark.stats is not None:  # with --benchmark-disable there are none
            median = self.benchmark.stats.stats.median
            self.benchmark.extra_info.update({f"{what}_per_s": amount / median for what, amount in work.items()})


@pytest.fixture
def measure(benchmark) -> Measure:
    """Checks and times this case's function."""
    benchmark.group = benchmark.fullname.partition("::")[0]  # the table's, unless the case names another
    return Measure(benchmark)


def release_freed_memory() -> None:
    """Returns the memory of freed tensors to the system, so that the next call's peak counts what it takes again."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


@pytest.fixture(autouse=True, scope="session")
def memory_as_in_training() -> None:
    """On a CPU the engine keeps freed memory, and so do the suites: else page faults would be part of every time."""
    from engine.distributed import keep_freed_memory

    if not ON_GPU:
        keep_freed_memory()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each case compiles its own functions, in float32 as it was, and leaves no memory to the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    torch.set_float32_matmul_precision("highest")
    release_freed_memory()


# ---- Cases --------------------------------------------------------------------------------------------------------


def case(*values: str, is_quick: bool) -> Any:
    """A parameter set that is named by its values; what is not quick runs in the full suite alone."""
    return pytest.param(*values, id="-".join(values), marks=() if is_quick else pytest.mark.slow)


def require_triton(dtype: torch.dtype, head_dim: int) -> None:
    """Skips the case, with the reason, where Triton does not run its kernels on a GPU."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter runs here, whose time means nothing")
    for op in MODULES:
        if (reason := triton_obstacle(op, DEVICE, dtype, head_dim)) is not None:
            pytest.skip(f"Triton: {reason}")


# ---- Report -------------------------------------------------------------------------------------------------------

DEFAULTS = {"benchmark_columns": ["median", "iqr", "rounds"], "benchmark_sort": "name", "benchmark_group_by": "group"}


def pytest_configure(config: pytest.Config) -> None:
    """A narrow table, unless the command line asks for another; a directory for the JSON; no list of slow tests."""
    given = [word.partition("=")[0] for word in config.invocation_params.args if isinstance(word, str)]
    for option, value in DEFAULTS.items():
        if "--" + option.replace("_", "-") not in given:
            setattr(config.option, option, value)
    if "--durations" not in given:
        config.option.durations = None
    if config.getoption("benchmark_json", None):
        Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    """The machine of every figure; not the host's name."""
    command = shlex.join(["python", "-m", "pytest", *map(str, config.invocation_params.args)])
    return machine.facts(DEVICE) | {"threads": str(torch.get_num_threads()), "command": command}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Leaves out the time of each round."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """One line a case, then what was not measured and why."""
    session = getattr(config, "_benchmarksession", None)
    rows = [row for row in session.benchmarks if row and not row.has_error] if session is not None else []
    skipped = Counter(reason(report) for report in terminalreporter.stats.get("skipped", []))
    if not rows and not skipped:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"{machine.name(DEVICE)}, torch {machine.version('torch')}", sep="-")
    if rows:
        write(f"{'':<62}{'median ms':>11}{'iqr':>6}{'throughput':>25}{'peak MiB':>11}")
    suite = None
    for row in rows:
        if suite != (suite := row.fullname.partition("::")[0]):
            write(suite)
        write(summary_line(row.name, row.stats.data, row.extra_info))
    for why, count in skipped.items():
        write(f"not measured: {count} case{'s' if count > 1 else ''}: {why}")


def reason(report: pytest.TestReport) -> str:
    """Why a case was skipped."""
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ")


def summary_line(name: str, seconds: list[float], info: dict) -> str:
    """A case, its median and the spread around it, its throughput and its peak memory, within 120 columns."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else [median] * 3
    rate = next(((what, value) for what, value in info.items() if what.endswith("_per_s")), None)
    peak = info.get("peak_bytes")
    line = (
        f"  {name.removeprefix('test_'):<60}{median * 1e3:>11.5g}{(high - low) / median:>6.0%}"
        f"{in_words(*rate) if rate else '':>25}{'' if peak is None else f'{peak / 2**20:,.1f}':>11}"
    )
    return line + (f"\n    {info['note']}" if "note" in info else "")


def in_words(what: str, value: float) -> str:
    """A rate with its unit, such as "12,345 tokens/s" or "1.23 GB/s"."""
    what = what.removesuffix("_per_s")
    if what in ("bytes", "flops"):
        unit = {"bytes": "B/s", "flops": "FLOP/s"}[what]
        power = max(0, min(4, int(math.log10(value)) // 3))
        return f"{value / 1000**power:.3g} {' kMGT'[power].strip()}{unit}"
    return f"{value:,.0f} {what}/s"
