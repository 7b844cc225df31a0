"""The pytest-benchmark suites: what they collect, that a wrong result is never timed, and what their JSON holds."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import machine
from bench.results import Figure
from bench.suites import conftest as suites
from kernels.dispatch import MODULES

PRESETS = tuple(suites.SEQUENCES)
ON_CPU = pytest.mark.skipif(suites.ON_GPU, reason="the cases of a CPU; a GPU's suite has others")

FAULTY = """
import kernels.layer_norm as file
right = file.layer_norm_torch
file.layer_norm_torch = lambda *args: right(*args) * 1.001
"""

# One process, which imports PyTorch once: the quick suite's cases, all of them, then two ops at the smallest size, one
# of them wrong by a thousandth, and a third in Triton's interpreter.
RUNS = """
import sys
import pytest
for marks in ("not slow", ""):
    pytest.main(["bench/suites", "--collect-only", "-q", "-o", "addopts=", "-m", marks])
    print("---- next ----", flush=True)
sys.exit(pytest.main(["-rs", "-p", "faulty_layer_norm", *sys.argv[1:]]))
"""
OPS = ("gelu-tiny-fp32-torch", "layer_norm-tiny-fp32-torch", "gelu-tiny-fp32-triton")


@dataclass
class Run:
    """What the three printed, how the last one ended and the JSON that it wrote."""

    quick: set[str]
    full: set[str]
    code: int
    output: str
    json: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    directory = tmp_path_factory.mktemp("suites")
    (directory / "faulty_layer_norm.py").write_text(FAULTY)
    out = directory / "new" / "bench.json"
    cases = [f"bench/suites/bench_ops.py::test_op[{case}]" for case in OPS]
    environment = os.environ | {"PYTHONPATH": str(directory), "TRITON_INTERPRET": "1", "COLUMNS": "120"}
    command = [sys.executable, "-c", RUNS, *cases, f"--benchmark-json={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    quick, full, output = done.stdout.split("---- next ----")
    names = ({line for line in part.splitlines() if "::" in line} for part in (quick, full))
    return Run(*names, done.returncode, output + done.stderr, out)


# ---- What is collected --------------------------------------------------------------------------------------------


def test_every_suite_has_quick_cases_and_more_in_full(run: Run):
    files = {f"bench/suites/{path.name}" for path in (ROOT / "bench" / "suites").glob("bench_*.py")}
    assert {name.partition("::")[0] for name in run.quick} == files
    assert run.quick < run.full


def test_each_op_has_each_implementation_at_each_preset_in_full(run: Run):
    precisions = ("bf16", "fp32") if suites.ON_GPU else ("fp32",)
    for op in MODULES:
        for precision in precisions:
            for how in ("torch", "compile", "triton"):
                wanted = {f"bench/suites/bench_ops.py::test_op[{op}-{p}-{precision}-{how}]" for p in PRESETS}
                assert wanted <= run.full
                assert len(wanted & run.quick) >= 1


@ON_CPU
def test_quick_suite_of_a_cpu_compiles_one_small_model_and_saves_no_large_one(run: Run):
    compiled = {name for name in run.quick if "test_step" in name and "torch-compiled" in name}
    assert compiled == {"bench/suites/bench_step.py::test_step[tiny-fp32-torch-compiled]"}
    assert not [name for name in run.quick if "test_op" in name and "mini" in name and "compile" in name]
    checkpoints = {name.partition("[")[2] for name in run.quick if "bench_checkpoint" in name}
    assert checkpoints == {"mini]"}
    assert {name.partition("[")[2] for name in run.full if "bench_checkpoint" in name} == {"mini]", "gpt2]"}


# ---- A whole run --------------------------------------------------------------------------------------------------


@ON_CPU
def test_wrong_result_fails_and_is_not_timed(run: Run):
    assert run.code == 1, run.output
    assert "the error of y must be at most 1e-05, got 1.0e-03" in run.output
    rows = json.loads(run.json.read_text())["benchmarks"]
    assert [row["param"] for row in rows] == ["gelu-tiny-fp32-torch"]


@ON_CPU
def test_interpreter_is_not_timed(run: Run):
    assert "Triton's interpreter runs here, whose time means nothing" in run.output


@ON_CPU
def test_json_holds_machine_peak_memory_and_throughput_but_no_single_times(run: Run):
    content = json.loads(run.json.read_text())
    assert content["machine_info"].keys() == machine.facts().keys() | {"threads"}
    assert content["machine_info"]["machine"] == machine.name()
    assert content["machine_info"]["command"].startswith("python -m pytest ")
    (row,) = content["benchmarks"]
    assert row["fullname"] == "bench/suites/bench_ops.py::test_op[gelu-tiny-fp32-torch]"
    elements = 16 * 64 * 512
    peak, throughput = (Figure(**row["extra_info"][name]) for name in ("peak", "throughput"))
    assert 1.9 * 4 * elements <= peak.value <= 3 * 4 * elements  # y and dx, but for odd pages
    assert (peak.unit, throughput.unit) == ("B", "B/s")
    assert throughput.value == pytest.approx(5 * 4 * elements / row["stats"]["median"])
    assert throughput.low <= throughput.value <= throughput.high
    assert row["stats"].keys() >= {"median", "iqr", "min", "rounds"}
    assert "data" not in row["stats"]


# ---- The measurement itself ---------------------------------------------------------------------------------------


class Recorder:
    """Stands for pytest-benchmark's fixture: writes down what it is asked to time."""

    def __init__(self, log: list[str]):
        self.log, self.extra_info, self.stats = log, {}, None

    def pedantic(self, function, setup=None, rounds=1, iterations=1):
        self.log.append("timed")
        self.rounds, self.iterations = rounds, iterations
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[0.5]))
        return function()


def test_check_comes_before_any_timing():
    log: list[str] = []
    suites.Measure(Recorder(log))(lambda: log.append("called"), lambda result: log.append("checked"))
    assert log[:2] == ["called", "checked"]
    assert log.index("checked") < log.index("timed")


def test_failed_check_leaves_no_figures():
    def check(result: int) -> None:
        raise AssertionError("wrong")

    recorder = Recorder([])
    with pytest.raises(AssertionError, match="wrong"):
        suites.Measure(recorder)(lambda: 1, check, work=(8, "tokens/s"))
    assert (recorder.log, recorder.extra_info, recorder.stats) == ([], {}, None)


def test_peak_is_that_of_a_second_call_although_malloc_is_tuned():
    kept = []

    def take_16_mib() -> None:  # and more in the first call, which compiles
        blocks = [torch.ones(2**14) for _ in range(256 if kept else 1024)]
        kept.append(torch.ones(2**14))  # on the heap: freed pages below it stay
        del blocks

    recorder = Recorder([])
    suites.Measure(recorder)(take_16_mib, lambda result: None, work=(8, "tokens/s"))
    assert recorder.extra_info["throughput"]["value"] == 16
    assert 15 * 2**20 <= recorder.extra_info["peak"]["value"] <= 20 * 2**20


def test_short_calls_share_a_round_and_long_ones_get_few():
    recorder = Recorder([])
    suites.Measure(recorder)(lambda: None, lambda result: None)
    assert recorder.iterations > 100
    recorder = Recorder([])
    suites.Measure(recorder)(lambda: None, lambda result: None, before=lambda: None)
    assert recorder.iterations == 1, "what is done before each call must be done before each call"
