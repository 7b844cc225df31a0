"""bench.gpu and its workers without a GPU: the dry run, and what becomes of failures, deaths and lack of time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import gpu, processes
from bench.gpu import PLAN, Record
from bench.processes import Failed, Worker
from bench.results import Figure, Row, exact, find

OPS = {
    "attention": ("triton", "torch", "compile", "sdpa flash", "sdpa cudnn", "sdpa efficient"),
    **{op: ("triton", "torch", "compile") for op in ("layer_norm", "add_layer_norm", "gelu", "bias_gelu")},
    "linear_cross_entropy": ("triton", "torch", "compile", "plain"),
    "attention_documents": ("triton", "torch", "compile"),
}
STEPS = {
    "gpt2 B=64 bf16": (
        *("ours compiled", "reference compiled", "transformers compiled", "ours on torch compiled"),
        *("ours eager", "reference eager", "transformers eager", "ours on torch eager"),
    ),
    **{"gpt2 B=64 tf32": ("ours compiled",), "gpt2 B=64 fp16": ("ours compiled",)},
    **{f"{size} bf16": ("ours compiled",) for size in ("gpt2-medium B=64", "gpt2-large B=32", "gpt2-xl B=16")},
}
FIGURE = re.compile(r"\d\.\d|\d ?(ms|us|GB|TFLOP|MB|%|x\b)")

# In place of bench.worker: answers requests, dies at one, hangs at another and refuses a third.
CHILD = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    answers = {answers!r}
    answer = answers.get(request.get("peer", request["do"]), answers.get(request["do"]))
    if answer == "dies":
        sys.exit("Segmentation fault")
    if answer == "hangs":
        time.sleep(60)
    failed = {{"failed": "ArithmeticError: the error of y must be at most 1e-05"}}
    failed |= {{"is_lost": False, "out_of_memory": False}}
    print(json.dumps(failed if answer == "wrong" else {{"answer": answer}}), flush=True)
"""


@pytest.fixture
def play(monkeypatch):
    """Sets what workers answer, by peer or request."""

    def set_answers(**answers) -> None:
        monkeypatch.setattr(processes, "WORKER", ("-c", CHILD.format(answers=answers)))

    return set_answers


def dry_run(tmp_path_factory, *flags: str) -> tuple[subprocess.CompletedProcess, Path]:
    """On a machine without what only a command line, a picture or a suite needs, as the ones with GPUs are."""
    out, bare = tmp_path_factory.mktemp("dry"), tmp_path_factory.mktemp("bare")
    for name in ("tyro", "matplotlib", "tensorboard", "pytest_benchmark"):
        (bare / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out), "--dry-run", *flags]
    environment = os.environ | {"PYTHONPATH": str(bare)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment), out


@pytest.fixture(scope="module")
def of_ops(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A dry run of the ops that take the least time."""
    return dry_run(tmp_path_factory, "--only", "ceilings,gelu")


def part(section: str, name: str) -> gpu.Part:
    return next(part for part in PLAN if (part.section, part.name) == (section, name))


def new_run(out: Path, seconds: float = 300.0, **facts) -> gpu.Run:
    """A run that keeps its figures although there is no GPU."""
    record = Record(out, facts)
    record.save()
    return gpu.Run(record, time.time() + seconds)


# ---- The dry run ----------------------------------------------------------------------------------------------------


def cases_of(rows: list[Row], section: str) -> set[tuple[str, str]]:
    return {(row.case, row.peer) for row in rows if row.section == section}


def each(cases: dict) -> set[tuple[str, str]]:
    return {(case, peer) for case, peers in cases.items() for peer in peers}


@pytest.mark.slow
def test_dry_run_checks_every_case(tmp_path_factory):
    done, out = dry_run(tmp_path_factory)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = Record.load(out).rows
    assert (cases_of(rows, "ops"), cases_of(rows, "step")) == (each(OPS), each(STEPS))
    for op in OPS:
        assert find(rows, "accuracy", f"{op} fp32", "triton")
    assert not re.search("^## (Failed|Left out)", (out / "gpu.md").read_text(), re.MULTILINE)


def test_dry_run_checks_every_op_that_is_asked_for(of_ops):
    done, out = of_ops
    assert done.returncode == 0, done.stdout + done.stderr
    rows = Record.load(out).rows
    assert cases_of(rows, "ops") == each({op: OPS[op] for op in ("gelu", "bias_gelu")})
    assert {row.peer for row in rows if row.section == "ceilings"} == {"matmul", "copy"}
    table = (out / "gpu.md").read_text()
    assert done.stdout.rstrip().endswith(table.rstrip())
    assert not re.search("^## Failed", table, re.MULTILINE)


def test_dry_run_shows_and_keeps_no_figures(of_ops):
    _, out = of_ops
    state = json.loads((out / "gpu.json").read_text())
    assert not [line for line in (out / "gpu.md").read_text().splitlines() if line[:1] == "|" and FIGURE.search(line)]
    assert state["dry_run"]
    assert all(row["figures"] == {} and row["status"] == "checked" for row in state["rows"])
    assert state["facts"].keys() >= {"machine", "cpu", "commit", "torch", "triton", "transformers", "date"}
    assert "bench.gpu --out" in state["facts"]["command"]


def test_the_first_nine_minutes_hold_the_headline_and_the_ops():
    needed = 0.0
    for each in PLAN:
        needed += each.seconds
        if each.section == "cross_entropy":
            break
    assert needed <= 9 * 60


def ended_with(arguments: list[str]) -> int:
    """The exit code of a command line that is refused."""
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    return ended.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refuses_to_time_without_a_gpu(tmp_path, capsys):
    assert ended_with(["--out", str(tmp_path / "out")]) == 2
    assert "a CUDA device must be here, there is none; add --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_time_leaves_a_table_of_what_was_left_out(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--minutes", "0"]) == 0
    table = (tmp_path / "gpu.md").read_text()
    assert table.rstrip() in capsys.readouterr().out
    for each in PLAN:
        assert f"- {each}: needs up to" in table.partition("## Left out")[2]


def test_some_sections_and_then_the_rest(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(run, parts):
        asked.append([str(each) for each in parts])
        for each in parts:
            run.record.note(each, None)

    monkeypatch.setattr(gpu.Run, "all", measure)
    dry = ["--out", str(tmp_path), "--dry-run", "--commit", "abc"]
    assert gpu.main([*dry, "--only", "ceilings,attention"]) == 0
    first = ["ceilings: matmul and copy", "attention: attention", "attention: attention_documents"]
    assert asked[0] == first
    assert "- step: bf16 compiled: not among --only" in (tmp_path / "gpu.md").read_text()
    assert gpu.main([*dry, "--resume"]) == 0
    record = Record.load(tmp_path)
    assert asked[1] == [str(each) for each in PLAN if str(each) not in first]
    assert sorted(record.done) == sorted(map(str, PLAN))
    assert "--only ceilings,attention; python -m bench.gpu" in record.facts["command"]

    capsys.readouterr()
    assert ended_with(["--out", str(tmp_path), "--dry-run", "--commit", "xyz", "--resume"]) == 2
    assert f"--resume needs the commit of the results in {tmp_path}, abc, got xyz" in capsys.readouterr().err
    assert ended_with(["--out", str(tmp_path / "none"), "--dry-run", "--resume"]) == 2
    assert "holds none; leave --resume away" in capsys.readouterr().err
    assert ended_with([*dry, "--only", "ceilings,lost"]) == 2
    assert "must name some of self-check,ceilings,accuracy,step," in capsys.readouterr().err


# ---- Processes ------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_hangs_or_refuses_is_named_and_the_next_request_goes_on(play):
    play(die="dies", hang="hangs", refuse="wrong", work=7)
    worker = Worker()
    try:
        assert worker.ask("work") == 7
        with pytest.raises(Failed, match="ended with exit code 1 at this: Segmentation fault"):
            worker.ask("die")
        assert worker.ask("work") == 7
        with pytest.raises(Failed, match="hung for 1 s at this"):
            worker.ask("hang", 1.0)
        with pytest.raises(Failed, match="the error of y must be at most 1e-05"):
            worker.ask("refuse")
        pid = worker.process.pid if worker.process else None
        assert worker.ask("work") == 7
        assert worker.process.pid == pid  # a refusal does not end it
    finally:
        worker.stop()


def test_the_self_check_comes_first_and_what_it_finds_is_recorded(tmp_path, play):
    assert PLAN[0].section == "self-check"
    play(self_check={"attention": "its self-check failed: dqkv is off by 3.1e-01", "gelu": ""})
    run = new_run(tmp_path)
    run.all([PLAN[0]])
    rows = {row.case: row for row in Record.load(tmp_path).rows}
    assert {case: row.status for case, row in rows.items()} == {"attention": "failed", "gelu": "checked"}
    assert "dqkv is off by 3.1e-01" in rows["attention"].reason


def test_a_peer_that_dies_or_is_wrong_is_recorded_and_the_others_are_timed(tmp_path, play):
    phase = [[1e-3, "s", 1e-3, 2e-3, 9], 1e6, "B/s"]
    checked = {"error": 1e-6, "peak": 7}
    peers = ["triton", "torch", "compile", "fine"]
    play(peers=peers, triton=checked, fine=checked, torch="wrong", compile="dies", time={"triton": {"both": phase}})
    run = new_run(tmp_path)
    run.record.put(Row("ceilings", "this GPU", "copy", figures={"rate": exact(4e9, "B/s")}))
    run.all([part("gelu", "gelu")])
    record = Record.load(tmp_path)
    rows = {row.peer: row for row in record.rows if row.section == "ops"}
    assert [(peer, row.status) for peer, row in rows.items()] == [
        ("triton", "measured"),
        ("torch", "failed"),
        ("compile", "failed"),
        ("fine", "checked"),
    ]
    assert rows["torch"].figures == rows["compile"].figures == {}
    assert rows["triton"].figures["both rate"] == Figure(1e9, "B/s", 0.5e9, 1e9, 9)
    assert rows["triton"].value("both of ceiling") == 0.25
    assert record.done == ["gelu: gelu"]
    assert "- ops, gelu, compile: the process ended with exit code 1 at this" in (tmp_path / "gpu.md").read_text()


def test_what_the_deadline_cuts_is_left_for_resume(tmp_path, play, monkeypatch):
    play(peers=["triton"], triton="hangs")
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu, "TIMING_S", 0.1)
    run = new_run(tmp_path, seconds=2.0)
    gelu = gpu.Part("gelu", "gelu", 1.0)
    run.all([gelu, part("step", "bf16 compiled")])
    record = Record.load(tmp_path)
    assert record.done == []
    assert record.reasons["gelu: gelu"] == "begun, not finished"
    assert record.reasons["step: bf16 compiled"] == "needs up to 220 s, 0 s were left"


@pytest.mark.slow
def test_a_kill_leaves_the_table_and_no_process(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--dry-run"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while "| checked" not in ((tmp_path / "gpu.md").read_text() if (tmp_path / "gpu.md").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(1.0)
    assert workers
    for stat in (Path(f"/proc/{pid}/stat") for pid in workers):
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert "## Left out" in (tmp_path / "gpu.md").read_text()
    assert Record.load(tmp_path).rows
