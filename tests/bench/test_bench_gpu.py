"""bench.gpu without a GPU: its dry run, its arithmetic, and what it makes of failures, deaths and lack of time."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import gpu, gpu_cases, gpu_plan, gpu_timing, gpu_worker
from bench.gpu_plan import PLAN
from bench.gpu_report import Record

CONTESTANTS = {
    "attention": ("triton", "eager", "compile", "sdpa flash", "sdpa cudnn", "sdpa efficient"),
    "separate q, k, v": ("eager", "sdpa flash", "sdpa cudnn", "sdpa efficient"),
    "layer_norm": ("triton", "eager", "compile"),
    "add_layer_norm": ("triton", "eager", "compile"),
    "gelu": ("triton", "eager", "compile"),
    "bias_gelu": ("triton", "eager", "compile"),
    "linear_cross_entropy": ("triton", "eager", "compile", "chunked torch"),
}
STEPS = {
    "gpt2 bf16": (
        *("triton compiled", "torch compiled", "triton eager", "torch eager"),
        *("reference compiled", "reference eager", "transformers compiled", "transformers eager"),
    ),
    **{"gpt2 tf32": ("triton compiled",), "gpt2 fp16": ("triton compiled",)},
    **{f"{preset} bf16": ("triton compiled",) for preset in ("gpt2-medium", "gpt2-large", "gpt2-xl")},
}
LOSSES = {
    "gpt2 bf16 compiled": (
        "reference compiled against triton compiled",
        "transformers compiled against triton compiled",
    ),
    "gpt2 fp32": ("reference eager against triton eager", "transformers eager against triton eager"),
}
FIGURE = re.compile(r"\d\.\d|\d ?(ms|GB|TFLOP|MB|GiB|%|x\b)")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """On a machine without what only a command line or a picture needs, as the ones with GPUs are."""
    out, bare = tmp_path_factory.mktemp("dry"), tmp_path_factory.mktemp("bare")
    for name in ("tyro", "matplotlib", "tensorboard"):
        (bare / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out), "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(bare)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment), out


def empty_record(out: Path, is_dry: bool = False) -> Record:
    record = Record.new(out, dry_run=is_dry, started="today", began=time.time(), minutes=9)
    record.save()
    return record


def part(section: str, name: str) -> gpu_plan.Part:
    return next(part for part in PLAN if (part.section, part.name) == (section, name))


# The dry run


def test_dry_run_checks_every_op_with_every_contestant(dry_run):
    done, out = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    table = (out / "gpu.md").read_text().splitlines()
    assert done.stdout.rstrip().endswith("\n".join(table).rstrip())
    for op, contestants in (CONTESTANTS | STEPS).items():
        for contestant in contestants:
            assert any(line.startswith(f"| {op} | {contestant} | checked |") for line in table), (op, contestant)
    for op, pairs in LOSSES.items():
        for pair in pairs:
            assert any(line.startswith(f"| {op} | {pair} |") and line.endswith("checked |") for line in table), pair
    for name in ("bf16 matmul", "device copy"):
        assert any(line.startswith(f"| {name} | checked |") for line in table), name
    assert any("test_attention.py" in line and "checked" in line for line in table)
    assert not [line for line in table if line.startswith(("## Failed", "## Left out", "## Goals"))]


def test_dry_run_shows_and_keeps_no_figures(dry_run):
    _, out = dry_run
    rows = [line for line in (out / "gpu.md").read_text().splitlines() if line.startswith("|")]
    assert rows
    assert not [row for row in rows if FIGURE.search(row)]
    state = json.loads((out / "gpu.json").read_text())
    assert state["dry_run"] is True
    assert state["goals"] == []
    assert all(set(row) == {"section", "op", "contestant", "status"} for row in state["rows"])
    assert {row["status"] for row in state["rows"]} == {"checked"}
    assert state["machine"].keys() >= {"machine", "cpu", "commit", "torch", "triton", "transformers", "date"}
    assert "bench.gpu --out" in state["machine"]["command"]


def test_no_time_leaves_a_table_of_what_was_left_out(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--minutes", "0"]) == 0
    table = (tmp_path / "gpu.md").read_text()
    assert table.rstrip() in capsys.readouterr().out
    for each in PLAN:
        assert f"- {each}: " in table.partition("## Left out")[2]
    assert json.loads((tmp_path / "gpu.json").read_text())["left_out"] == [str(each) for each in PLAN]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refuses_to_time_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "bench.gpu: a CUDA device must be here, there is none; add --dry-run to check on a CPU\n"
    )
    assert not (tmp_path / "out").exists()


def test_some_sections_and_then_the_rest(tmp_path, monkeypatch, capsys):
    asked = []

    def work(out, parts, deadline, dry_run, environment):
        record = Record.load(out)
        asked.append([str(each) for each in parts])
        for each in parts:
            record.finish(each)

    monkeypatch.setattr(gpu, "work", work)
    dry = ["--out", str(tmp_path), "--dry-run", "--commit", "abc"]
    assert gpu.main([*dry, "--only", "loss,batch"]) == 0
    first = ["loss: fp32 eager", "batch: triton eager", "batch: reference compiled"]
    assert asked[0] == first
    assert "- step: bf16 compiled: not among --only" in (tmp_path / "gpu.md").read_text()
    assert gpu.main([*dry, "--resume"]) == 0
    state = json.loads((tmp_path / "gpu.json").read_text())
    assert asked[2] == [str(each) for each in PLAN if str(each) not in first and each.section != "tests"]
    assert state["left_out"] == []
    assert "--only loss,batch; python -m bench.gpu" in state["machine"]["command"]

    capsys.readouterr()
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--commit", "xyz", "--resume"]) == 2
    assert f"--resume needs the commit of the results in {tmp_path}, abc, got xyz" in capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path / "none"), "--dry-run", "--resume"]) == 2
    assert "holds none; leave --resume away" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*dry, "--only", "loss,lost"])
    assert "must name some of ceilings,accuracy,step," in capsys.readouterr().err


# Work and times


SIZES = gpu_cases.Sizes(B=3, T=10, H=2, D=5, V=7, Vp=8)  # N = 30, C = 10, F = 40


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        # B H heads, two products of T T D multiply-adds, half of them: 3 * 2 * 2 * 2 * 10 * 10 * 5 / 2
        ("attention", 6_000, 15_000),
        ("separate q, k, v", 6_000, 15_000),
        ("linear_cross_entropy", 2 * 30 * 10 * 8, 2 * 2 * 30 * 10 * 8),
        # two bytes an element; rows of 300, parameters of 10
        ("layer_norm", 2 * (300 + 300 + 10 + 10), 2 * (300 + 300 + 10 + 300 + 10 + 10)),
        ("add_layer_norm", 2 * (300 + 300 + 10 + 10 + 300 + 300), 2 * (300 + 300 + 300 + 10 + 300 + 10 + 10)),
        # rows of 1,200, a bias of 40
        ("gelu", 2 * 2_400, 2 * 3_600),
        ("bias_gelu", 2 * (1_200 + 40 + 1_200), 2 * (1_200 + 1_200 + 40 + 1_200 + 40)),
    ],
)
def test_work_is_what_a_hand_counts(op, forward, backward):
    work = gpu_cases.ops(SIZES, on_gpu=True)[op].work(2)
    assert work == {"forward": forward, "backward": backward}
    assert gpu_cases.amount(work, "both") == forward + backward
    assert gpu_cases.amount(work, "forward_no_grad") == forward


def test_summary_is_the_median_with_its_spread():
    assert gpu_timing.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {
        **{"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "samples": 6}
    }
    assert gpu_timing.summary([2.0])["p80_ms"] == 2.0


def test_slow_ops_get_fewer_samples_and_quick_ones_share_their_events():
    assert gpu_timing.plan(0.05) == (6, 4)
    assert gpu_timing.plan(2.0) == (6, 1)
    assert gpu_timing.plan(70.0) == (2, 1)
    assert gpu_timing.plan(10_000.0) == (1, 1)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_errors_that_are_no_number_never_pass(broken):
    with pytest.raises(ArithmeticError, match="the error of y must be at most"):
        gpu_worker.require_close(torch.tensor([1.0, broken]), torch.ones(2), torch.float32, "y")


# The worker


class HostTimer(gpu_timing.Timer):
    """Times the CPU, so that what goes on around a GPU's timing can be seen without one."""

    def __init__(self):
        self.times = []

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *error):
        self.times.append(1e3 * (time.perf_counter() - self.began))

    def read_ms(self):
        times, self.times = self.times, []
        return times


def double(x: Tensor) -> Tensor:
    return 2.0 * x


def wrong(x: Tensor) -> Tensor:
    return 2.1 * x


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("out of memory\nlong story")


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker that times on the CPU; its ops double their input, and some rivals are no good."""
    op = gpu_cases.Op(
        inputs=lambda dtype, device: [torch.randn(100, dtype=dtype, device=device)],
        reference=double,
        pytorch=double,
        triton=double,
        tensors="y dx",
        work=lambda itemsize: {"forward": 1e6, "backward": 2e6},
        unit="GB/s",
        rivals={"wrong": wrong, "broken": broken, "fine": double},
    )
    monkeypatch.setattr(gpu_cases, "ops", lambda sizes, on_gpu: {"gelu": op})
    monkeypatch.setattr(gpu_worker, "peak_bytes", lambda *_: 7)
    worker = gpu_worker.Worker(empty_record(tmp_path), time.time() + 300, dry_run=True)
    worker.dry_run, worker.timer = False, HostTimer()
    return worker


def test_a_contestant_that_raises_or_is_wrong_is_recorded_and_the_others_are_timed(worker):
    ceiling = {"section": "ceilings", "op": "ceiling", "contestant": "device copy", "status": "measured"}
    phase = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "rate": 1e3, "unit": "GB/s"}
    worker.record.put(ceiling | {"phases": {"forward": phase}})
    worker.run([part("gelu", "bias_gelu"), part("gelu", "gelu")])  # the first raises
    rows = {r["contestant"]: r for r in worker.record.state["rows"] if r["op"] == "gelu"}
    assert list(rows) == ["triton", "eager", "compile", "wrong", "broken", "fine"]
    assert rows["broken"]["reason"] == "RuntimeError: out of memory"
    assert rows["wrong"]["reason"].startswith("ArithmeticError: the error of y must be at most 1e-04, got 5.0e-02")
    assert "phases" not in rows["wrong"]
    for name in ("triton", "eager", "compile", "fine"):
        assert rows[name]["status"] == "measured"
        assert rows[name]["peak_bytes"] == 7
        for phase, work in (("forward", 1e6), ("backward", 2e6), ("both", 3e6)):
            figures = rows[name]["phases"][phase]
            assert figures["rate"] == pytest.approx(work / figures["median_ms"] / 1e6)  # GB/s
            assert figures["share_of_ceiling"] == pytest.approx(figures["rate"] / 1e3)
            assert figures["p20_ms"] <= figures["median_ms"] <= figures["p80_ms"]
    whole = worker.record.find("gelu", "bias_gelu", "inputs and timing")
    assert whole["reason"] == "KeyError: 'bias_gelu'"
    assert worker.record.state["done"] == ["gelu: bias_gelu", "gelu: gelu"]
    log = (worker.record.out / "failures.log").read_text()
    assert "long story" in log
    table = (worker.record.out / "gpu.md").read_text()
    assert "- gelu: gelu, broken: RuntimeError: out of memory" in table


def test_parts_that_do_not_fit_the_time_are_left_out_by_name(worker):
    worker.deadline = time.time() + 20.5  # gelu needs 25 s, the ceilings 20 s
    worker.ceilings = lambda part: None
    worker.run([part("gelu", "gelu"), part("ceilings", "matmul and copy")])
    assert worker.record.state["done"] == ["ceilings: matmul and copy"]
    assert "- gelu: gelu: needs up to 25 s, 20 s were left" in (worker.record.out / "gpu.md").read_text()


def test_accuracy_is_held_to_twice_pytorch_s_error(worker, monkeypatch):
    monkeypatch.setattr(gpu_worker, "PRECISIONS", {"fp32": (torch.float32, "highest", 1e-5)})
    errors = iter([{"y": (3e-5, 2e-5)}, {"y": (3e-5, 1e-5)}, {"y": (math.nan, 1e-5)}])
    monkeypatch.setattr(gpu_worker, "accuracy_errors", lambda *_: next(errors))
    reasons = []
    for _ in range(3):
        worker.record.state["rows"] = []
        worker.accuracy(part("accuracy", "gelu"))
        reasons.append(worker.record.find("accuracy", "gelu", "fp32").get("reason"))
    assert reasons == [
        None,
        "ArithmeticError: the error of y must be at most 2.0e-05, got 3.0e-05",
        "ArithmeticError: the error of y must be at most 2.0e-05, got nan",
    ]
    assert "y not finite / 1.0e-05" in worker.record.table()
    assert worker.record.find("accuracy", "gelu", "twice the same bits")["status"] == "checked"


# Processes


def test_a_process_that_dies_or_hangs_is_replaced_and_named(tmp_path, monkeypatch):
    record = empty_record(tmp_path)
    gelu, codes = part("gelu", "gelu"), iter([-11, None, 3, 0])

    def run_limited(command, environment, is_over):
        now = Record.load(tmp_path)
        place = f"contestant {len(now.state['rows'])}"
        now.begin(gelu, "gelu", "gelu", place, gelu.seconds)
        code = next(codes)
        if code == 3:  # the worker itself has said why
            now.put(
                {"section": "gelu", "op": "gelu", "contestant": place, "status": "failed", "reason": "illegal access"}
            )
        if code == 0:
            now.finish(gelu)
        return code

    monkeypatch.setattr(gpu, "run_limited", run_limited)
    gpu.work(tmp_path, [gelu], time.time() + 100, False, {})
    record = Record.load(tmp_path)
    assert [row["reason"] for row in record.state["rows"]] == [
        "the process ended with exit code -11 at this",
        "the process hung for 80 s at this",
        "illegal access",
    ]
    assert record.state["done"] == ["gelu: gelu"]


def test_what_an_earlier_process_failed_at_is_not_tried_again(worker):
    failed = {"section": "gelu", "op": "gelu", "contestant": "fine", "status": "failed", "reason": "died"}
    worker.record.put(failed)
    worker.contest(part("gelu", "gelu"))
    assert worker.record.find("gelu", "gelu", "fine") == failed
    assert worker.record.find("gelu", "gelu", "triton")["status"] == "measured"


def test_a_process_past_its_time_is_stopped_with_all_that_it_started(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/pid; sleep 60"
    began = time.monotonic()
    is_over = (tmp_path / "pid").exists
    assert gpu.run_limited(["sh", "-c", script], {"PATH": "/usr/bin:/bin"}, is_over) is None
    assert time.monotonic() - began < 30
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the second process is still running")


PLAIN = """\
tests/test_gelu.py::test_one[fp32] PASSED                [ 25%]
tests/test_gelu.py::test_two[bf16] FAILED                [ 50%]
tests/test_gelu.py::test_three SKIPPED (no reason)       [ 75%]
E   AssertionError: FAILED to match
=== 1 failed, 1 passed, 1 skipped in 2.00s ===
"""
XDIST = """\
tests/test_gelu.py::test_one[fp32]
[gw1] [ 50%] PASSED tests/test_gelu.py::test_one[fp32]
[gw0] [100%] PASSED tests/test_gelu.py::test_four
"""


def test_test_results_are_counted_even_when_cut_short():
    found = gpu.test_results(PLAIN, 1, 60.0)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["failures"] == [PLAIN.splitlines()[1]]
    assert (found["status"], found["reason"]) == ("failed", "1 tests failed; see tests.log")
    found = gpu.test_results(XDIST, None, 60.0)
    assert found["counts"] == {"passed": 2, "failed": 0, "skipped": 0}
    assert (found["status"], found["stopped"]) == ("measured", "stopped after 60 s")
    assert gpu.test_results("ImportError\n", 4, 60.0)["reason"] == "pytest ended with exit code 4; see tests.log"
