"""bench.counts: the same numbers in every call and process, one more of anything is seen, and what is not exact."""

import contextlib
import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import compare, counters, counts
from model.gpt2 import MLP

STEP = f"training step, {counts.PRESET}"
SOME = "step"  # one case of the model, two of the data
CHILD = """
import json, sys
from bench import counts
print(json.dumps(counts.all_rows(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def here() -> tuple[list[dict], list[str]]:
    return counts.all_rows(SOME)


def in_a_fresh_process(words: str) -> tuple[list[dict], list[str]]:
    done = subprocess.run([sys.executable, "-c", CHILD, words], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def counted(function) -> dict:
    for _ in range(counts.WARM_UPS):
        function()
    return counters.counted(function, has_torch=True)


@pytest.mark.slow
def test_every_count_is_the_same_in_two_calls_and_in_a_fresh_process(here):
    rows, left_out = here
    assert left_out == []  # of two calls in this process
    assert in_a_fresh_process(SOME) == here
    assert len(rows) == 3
    for row in rows:
        assert row["python_calls"] > 0
        if "op_calls" in row:
            assert row["op_calls"] == sum(row["op_calls_by_name"].values())


@pytest.mark.slow
def test_every_count_of_every_case_is_the_same_in_two_processes():
    rows, left_out = in_a_fresh_process("")
    assert left_out == []
    assert in_a_fresh_process("") == (rows, left_out)
    names = [row["case"] for row in rows]
    assert len(set(names)) == len(names) >= 10


def test_a_training_step_counts_its_backward_pass_and_its_update(here):
    by_name = next(row for row in here[0] if row["case"] == STEP)["op_calls_by_name"]
    assert by_name["aten._fused_adamw_.default"] >= 1
    assert any("backward" in name for name in by_name)


def test_one_more_operator_in_the_model_is_found_by_compare(here, monkeypatch, tmp_path, capsys):
    before = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, h: before(self, h).clone())
    with contextlib.ExitStack() as stack:
        case = counts.TORCH[STEP](stack)
        after = {"case": STEP} | counted(case)
    allowed = dict.fromkeys(counts.EXACT, 0.0)
    for name, row in (("a", next(row for row in here[0] if row["case"] == STEP)), ("b", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"facts": {}, "counts": allowed, "rows": [row]}))
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    out = capsys.readouterr().out
    assert f"{STEP}: op_calls" in out
    assert "aten.clone.default +4" in out  # one in each of the four blocks
    assert f"{STEP}: allocated_bytes" in out


def test_one_allocation_and_one_call_more_are_seen():
    kept = torch.ones(256)

    def once() -> None:
        torch.add(kept, kept)

    def twice() -> None:
        once()
        once()

    one, two = counted(once), counted(twice)
    assert (one["op_calls"], two["op_calls"]) == (1, 2)
    assert (one["allocations"], two["allocations"]) == (1, 2)
    assert (one["allocated_bytes"], two["allocated_bytes"]) == (1024, 2048)
    assert (one["peak_bytes"], two["peak_bytes"]) == (1024, 1024)  # the first is freed before the second comes
    assert two["python_calls"] == one["python_calls"] + 2


def test_garbage_is_not_collected_in_between():
    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            pass

    def make() -> None:
        for _ in range(5000):  # more than a collection waits for
            Cycle()

    assert counters.calls(make)[0] == 1 + 5000


def test_what_does_not_repeat_is_left_out_and_said():
    turns = iter(range(100))

    def more_each_time() -> None:
        for _ in range(next(turns)):
            time.sleep(0)

    row, left_out = counts.row_of("restless", more_each_time, has_torch=False)
    assert "c_calls" not in row
    assert len(left_out) == 1
    assert left_out[0].startswith("restless: c_calls: ")
    assert row["python_calls"] == 1


def test_without_valgrind_one_line_says_so(monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    row = {"case": next(iter(counts.TORCH_FREE))}
    assert counts.add_instructions([row]) == "valgrind is not installed"
    assert "instructions" not in row


def test_callgrind_s_last_parts_are_the_cases(tmp_path):
    for number, total in {1: 9, 2: 50, 10: 60, 11: 0}.items():  # 11: what came after the last case
        (tmp_path / f"out.{number}").write_text(f"version: 1\npart: {number}\nfn=(1) f\n1 {total}\ntotals: {total}\n")
    assert counters.totals(tmp_path, 2) == ([50, 60], "")
    none, reason = counters.totals(tmp_path, 4)
    assert (none, "libffi" in reason) == ([], True)


def test_the_file_holds_the_machine_and_what_may_grow(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(counts, "all_rows", lambda words: ([{"case": "c", "python_calls": 1}], []))
    assert counts.main(["--no-callgrind", "--out", str(tmp_path / "made" / "counts.json")]) == 0
    content = json.loads((tmp_path / "made" / "counts.json").read_text())
    assert content["facts"].keys() >= {"machine", "python", "torch", "commit", "command"}
    assert content["counts"]["python_calls"] == 0.0
    assert content["counts"]["instructions"] == counts.INSTRUCTIONS_ALLOWED
    assert "no instructions: --no-callgrind was given" in capsys.readouterr().out


def test_a_case_that_there_is_none_of_is_a_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(counts, "all_rows", lambda words: ([], []))
    assert counts.main(["--case", "nothing"]) == 2
    assert "--case must be part of a case's name, got 'nothing'" in capsys.readouterr().err


@pytest.mark.slow
def test_instructions_repeat_within_what_is_allowed():
    first, again = ([{"case": case} for case in counts.TORCH_FREE] for _ in range(2))
    if reason := counts.add_instructions(first):
        pytest.skip(reason)
    counts.add_instructions(again)
    for one, other in zip(first, again, strict=True):
        assert one["instructions"] == pytest.approx(other["instructions"], rel=counts.INSTRUCTIONS_ALLOWED)
        assert one["instructions"] > 10_000
