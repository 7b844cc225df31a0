"""bench.compare: what is a regression and what is not, on files made for it and on a small repository of commits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import commits, compare
from bench.figures import Figure, Results, read
from engine.errors import BadInput

FACTS = {"machine": "2 cores of a CPU", "cpu": "CPU", "cores": "2", "python": "3.11.7", "torch": "2.13.0"}


def timed(*cases: tuple, facts: dict = FACTS) -> dict:
    """pytest-benchmark's JSON of (name, median in seconds, relative half of the quartile range, peak in bytes)."""
    return {
        "machine_info": facts,
        "benchmarks": [
            {
                "name": name,
                "fullname": f"bench/bench_x.py::{name}",
                "stats": {"median": s, "q1": s * (1 - half), "q3": s * (1 + half), "iqr": 2 * s * half, "rounds": 20},
                "extra_info": {"peak_bytes": peak},
            }
            for name, s, half, peak in cases
        ],
    }


def counts(facts: dict = FACTS, **names: int) -> dict:
    row = {"case": "training step", **names}
    allowed = {"op_calls": 0.0, "instructions": 0.01}
    return {"facts": facts, "counts": allowed, "rows": [row]}


@pytest.fixture
def run(tmp_path, capsys):
    """Compares two contents: (exit code, what is printed)."""

    def run(a: dict, b: dict, *flags: str) -> tuple[int, str]:
        for name, content in (("a.json", a), ("b.json", b)):
            (tmp_path / name).write_text(json.dumps(content))
        code = compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), *flags])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def line_of(out: str, case: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(case))


# ---- Times --------------------------------------------------------------------------------------------------------


def test_a_doubled_time_is_a_regression_and_its_case_is_named(run):
    code, out = run(timed(("t[a]", 1e-3, 0.05, 100)), timed(("t[a]", 2e-3, 0.05, 150)))
    assert code == 1
    line = line_of(out, "bench_x.py::t[a]")
    assert " 1 ms" in line
    assert " 2 ms" in line
    low, high = 2 * 0.95 / 1.05, 2 * 1.05 / 0.95
    assert line.split()[-6:] == ["2.000", f"{low:.3f}", "to", f"{high:.3f}", "slower", "1.500"]  # last: peak memory
    assert "bench_x.py::t[a] (2.000)" in out.splitlines()[-1]


def test_a_time_inside_the_noise_is_no_regression_whatever_its_ratio(run):
    code, out = run(timed(("t", 1.0, 0.3, None)), timed(("t", 1.5, 0.3, None)))
    assert code == 0
    assert "same within noise" in line_of(out, "bench_x.py::t")


def test_a_time_outside_the_noise_but_within_the_threshold_is_no_regression(run):
    a, b = timed(("t", 1.0, 0.001, None)), timed(("t", 1.05, 0.001, None))
    code, out = run(a, b)
    assert code == 0
    assert "slower, within 1.10" in out
    assert run(a, b, "--threshold", "1.04")[0] == 1


def test_half_the_time_is_faster(run):
    code, out = run(timed(("t", 2.0, 0.05, None)), timed(("t", 1.0, 0.05, None)))
    assert (code, "faster" in line_of(out, "bench_x.py::t")) == (0, True)


def test_a_single_round_has_no_spread_and_is_not_judged(run):
    a, b = timed(("t", 1.0, 0.0, None)), timed(("t", 9.0, 0.0, None))
    for content in (a, b):
        content["benchmarks"][0]["stats"]["rounds"] = 1
    code, out = run(a, b)
    assert code == 0
    assert "not judged: no spread" in out


def test_more_peak_memory_is_said_although_it_is_not_judged(run):
    code, out = run(timed(("t", 1.0, 0.1, 100)), timed(("t", 1.0, 0.1, 200)))
    assert code == 0
    assert "more peak memory, beyond 1.10, which is not judged: bench_x.py::t (2.000)" in out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"machine": "NVIDIA H200"}, "different machines: machine 2 cores of a CPU / NVIDIA H200"),
        ({"torch": "2.11.0"}, "different versions: torch 2.13.0 / 2.11.0"),
    ],
)
def test_a_ratio_over_machines_or_versions_is_said_first_and_is_no_regression(run, changed, said):
    case = ("t", 1.0, 0.01, None)
    code, out = run(timed(case), timed(("t", 2.0, 0.01, None), facts=FACTS | changed))
    assert code == 0
    assert out.splitlines()[0].startswith(said)
    assert "different" not in run(timed(case), timed(case))[1]


def test_cases_of_one_file_alone_are_listed(run):
    shared, old, new = (("shared", 1.0, 0.1, None), ("old", 1.0, 0.1, None), ("new", 1.0, 0.1, None))
    code, out = run(timed(shared, old), timed(shared, new))
    assert code == 0
    assert "only in A:\n  bench_x.py::old\n" in out
    assert "only in B:\n  bench_x.py::new\n" in out


# ---- The project's own files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        lambda ms: {"step_ms": {"median": ms, "min": 0.9 * ms, "max": 1.1 * ms}},
        lambda ms: {"step_ms": ms, "step_ms_p20": 0.9 * ms, "step_ms_p80": 1.1 * ms},
        lambda ms: {"step_ms": {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms}},
        lambda ms: {"phases": {"forward": {"median_ms": ms, "q1_ms": 0.9 * ms, "q3_ms": 1.1 * ms}}},
        lambda ms: {"tokens_per_s": {"median": 1 / ms, "q1": 0.9 / ms, "q3": 1.1 / ms}},
    ],
    ids=["extremes", "beside", "with unit", "phases", "rate"],
)
def test_rows_of_results_are_compared_by_their_strings_and_whole_numbers(run, row):
    def rows(ms: float) -> dict:
        also = {"who": "ours", "status": "measured", "tokens_bound_ms": 1.0 / ms, "peak_bytes": int(100 * ms)}
        return {"facts": FACTS, "rows": [also | {"processes": n} | row(n * (ms if n == 2 else 1.0)) for n in (1, 2)]}

    code, out = run(rows(1.0), rows(2.0))
    assert code == 1
    assert "1 slower, 1 same within noise" in out
    assert "slower" in line_of(out, "ours, processes=2")


def test_a_rate_beside_a_time_and_estimates_are_not_compared(tmp_path):
    row = {"who": "ours", "step_ms": 2.0, "tokens_per_s": 5.0, "head_bound_ms": 1.0, "communication_ms_predicted": 3.0}
    (tmp_path / "f.json").write_text(json.dumps({"facts": FACTS, "rows": [row]}))
    assert read(tmp_path / "f.json").figures == {("ours", "step_ms"): Figure(2.0, "time")}


# ---- Counts -------------------------------------------------------------------------------------------------------


def test_a_count_that_grew_by_one_is_a_regression_and_its_part_is_named(run):
    a = counts(op_calls=100_000, op_calls_by_name={"aten.mm": 99_990, "aten.add": 10})
    b = counts(op_calls=100_001, op_calls_by_name={"aten.mm": 99_990, "aten.add": 9, "aten.clone": 2})
    code, out = run(a, b)
    assert code == 1
    assert "grew: aten.add -1, aten.clone +2" in line_of(out, "training step: op_calls")
    code, out = run(b, a)
    assert (code, "shrank" in out) == (0, True)


def test_equal_counts_are_only_counted(run):
    code, out = run(counts(op_calls=7), counts(op_calls=7))
    assert code == 0
    assert "1 equal (counts)" in out
    assert "training step" not in out


def test_a_count_may_grow_by_what_its_file_allows(run):
    assert run(counts(instructions=10_000), counts(instructions=10_100))[0] == 0
    assert run(counts(instructions=10_000), counts(instructions=10_101))[0] == 1


def test_a_count_from_nothing_is_growth(run):
    assert run(counts(op_calls=0), counts(op_calls=1))[0] == 1


def test_counts_of_another_machine_are_judged_and_of_another_version_are_not(run):
    assert run(counts(op_calls=1), counts(FACTS | {"machine": "another"}, op_calls=2))[0] == 1
    assert run(counts(op_calls=1), counts(FACTS | {"torch": "another"}, op_calls=2))[0] == 0


# ---- Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "must be a readable file, got No such file"),
        ("{", "must be JSON, got"),
        ("[1]", "got list"),
        ('{"epochs": 3}', "got an object with epochs"),
        ('{"benchmarks": [{"name": "t"}]}', "must have the rows of its format, got KeyError('stats')"),
        ('{"benchmarks": [{"name": "t", "stats": {"median": NaN, "rounds": 9}}]}', "must be a finite number, got nan"),
        ('{"rows": []}', "at least one figure must be in both"),
    ],
    ids=["missing", "no JSON", "list", "unknown", "cut", "NaN", "empty"],
)
def test_a_bad_file_is_a_sentence_and_exit_code_2(tmp_path, capsys, content, sentence):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(timed(("t", 1.0, 0.1, None))))
    if content is not None:
        bad.write_text(content)
    assert compare.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare: ")
    assert sentence in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["one.json"], ["a", "b", "--threshold", "0.9"], ["--commits", "--rounds", "2"]], ids=" ".join
)
def test_a_bad_command_is_a_sentence_and_exit_code_2(capsys, arguments):
    assert compare.main(arguments) == 2
    assert capsys.readouterr().err.startswith("compare: ")


def test_it_starts_without_pytorch():
    code = "import sys, bench.compare; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'tyro')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- Commits ------------------------------------------------------------------------------------------------------

BENCH = """
import time
import kernels

def test_work(benchmark):
    benchmark.extra_info["peak_bytes"] = 1000 * kernels.SLEEP_MS
    benchmark.pedantic(lambda: time.sleep(1e-3 * kernels.SLEEP_MS), rounds=3)
"""
CONFTEST = """
def pytest_benchmark_generate_machine_info():
    return {"machine": "any", "python": "any"}
"""


def git(repository: Path, *words: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
    subprocess.run(["git", "-C", repository, *identity, *words], check=True, capture_output=True)


def commit(repository: Path, message: str, **files: str) -> None:
    for name, content in files.items():
        path = repository / {"kernels": "kernels/__init__.py", "bench": "bench/bench_work.py"}[name]
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", message)


@pytest.fixture
def repository(tmp_path) -> Path:
    """Two commits, the second of which sleeps three times as long."""
    path = tmp_path / "repository"
    (path / "bench").mkdir(parents=True)
    (path / "bench" / "conftest.py").write_text(CONFTEST)
    (path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npython_files = ["bench_*.py"]\n')
    git(path.parent, "init", "-q", "repository")
    commit(path, "first", kernels="SLEEP_MS = 4\n", bench=BENCH.replace("test_work", "test_old"))
    commit(path, "second", kernels="SLEEP_MS = 12\nNEW = 1\n", bench=BENCH)
    return path


def test_a_commit_is_measured_against_its_parent_with_the_newer_benchmark(repository, capsys):
    a, b = commits.measure_both([], "work", 3, repository)
    key = "bench_work.py::test_work", "s"
    assert list(a.figures) == list(b.figures) == [key]  # the first commit's own is called test_old
    assert 4e-3 <= a.figures[key].value < 12e-3 <= b.figures[key].value
    assert (a.figures[key].peak, b.figures[key].peak) == (4000, 12000)
    assert (a.label.split()[1:], b.label.split()[1:]) == (["first"], ["second"])
    assert compare.report(a, b) == 1
    worktrees = subprocess.run(["git", "-C", repository, "worktree", "list"], capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1
    assert not list(repository.rglob("*.pyc"))


def test_what_the_older_engine_lacks_is_only_in_b_and_the_reason_is_said(repository, capsys):
    added = BENCH + "\ndef test_new(benchmark):\n    benchmark.pedantic(lambda: kernels.NEW, rounds=3)\n"
    (repository / "bench" / "bench_work.py").write_text(added)  # changes: the working tree is the second side
    (repository / "bench" / "bench_import.py").write_text("from kernels import NEW\n")
    (repository / "kernels" / "__init__.py").write_text("SLEEP_MS = 4\nNEW = 1\n")
    a, b = commits.measure_both(["HEAD~1"], "test", 1, repository)
    code = compare.report(a, b)
    out = capsys.readouterr().out
    assert code == 0
    assert "A: FAILED bench/bench_work.py::test_new - AttributeError: module 'kernels' has no attribute 'NEW'" in out
    assert "A: ERROR bench/bench_import.py" in out  # and the other file's cases are measured all the same
    assert "only in B:\n  bench_work.py::test_new" in out
    assert "bench_work.py::test_work" in out
    assert "B: the working tree, with changes since " in out


def test_an_expression_that_matches_nothing_is_reported(repository, capsys, monkeypatch):
    nothing = commits.measure(repository, "nothing_has_this_name", "here")
    assert nothing == (Results("here", {}), [])
    monkeypatch.setattr(commits, "measure", lambda tree, expression, name: nothing)
    figures = commits.in_turn({"A": repository, "B": repository}, {"A": "one", "B": "two"}, "x", 9)
    assert [len(rounds) for rounds in figures.values()] == [1, 1]
    with pytest.raises(BadInput, match="at least one figure must be in both"):
        compare.report(figures["A"][0], figures["B"][0])
    out = capsys.readouterr().out
    assert "A: no case was measured in one with -k 'x'\nB: no case was measured in two" in out


def test_sides_are_a_commit_and_its_parent_or_changes_and_the_commit_below_them(repository):
    def of(name: str) -> str:
        return commits.git(repository, "rev-parse", name).strip()

    assert commits.sides([], repository) == (of("HEAD~1"), of("HEAD"))
    assert commits.sides(["HEAD~1", "HEAD~1"], repository) == (of("HEAD~1"), of("HEAD~1"))
    (repository / "untracked").touch()
    assert commits.sides([], repository) == (of("HEAD"), None)
    assert commits.sides(["HEAD~1"], repository) == (of("HEAD~1"), None)
    with pytest.raises(BadInput, match="nowhere must be a commit"):
        commits.sides(["nowhere"], repository)


def test_another_copy_of_the_packages_is_never_measured(tmp_path, monkeypatch):
    # `kernels` is installed here, or on the path; a directory that has its own must win, and one that cannot must fail.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    commits.check_imports(tmp_path)
    monkeypatch.setattr(commits, "environment", lambda directory: {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"})
    with pytest.raises(BadInput, match="kernels must be imported from"):
        commits.check_imports(tmp_path)


def test_rounds_give_median_and_quartiles_of_the_cases_that_all_of_them_have():
    rounds = [Results("A", {}, {("t", "s"): Figure(s, "time", peak=s)}) for s in (3.0, 1.0, 2.0, 5.0, 4.0)]
    rounds[0].figures["once", "s"] = Figure(1.0, "time")
    assert commits.over_rounds(rounds).figures == {("t", "s"): Figure(3.0, "time", 2.0, 4.0, 3.0)}
