"""The tables of README.md and docs/ come from bench/results, and say so where there is nothing."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import machine, report, results
from bench.results import Figure, Row, exact


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a result file of a machine."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")

    def write(name: str, facts: dict, rows: list[Row]) -> None:
        (tmp_path / "results" / "here").mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / "here" / name).write_text(results.dumps(facts, rows))

    return write


@pytest.fixture
def root(tmp_path, write):
    """A repository whose README has every table but one, which is in docs."""
    (tmp_path / "docs").mkdir()
    names = [*report.TABLES]
    (tmp_path / "README.md").write_text("before\n" + "".join(map(region, names[:-1])) + "after\n")
    (tmp_path / "docs" / "benchmarks.md").write_text(region(names[-1]))
    return tmp_path


def region(name: str, content: str = "old") -> str:
    return f"<!-- bench:{name} -->\n{content}\n<!-- /bench -->\n"


def test_every_table_has_its_place_and_holds_what_the_results_give():
    assert report.main(["--check"]) == 0


def test_nothing_measured_is_said(write):
    assert (
        report.cpu() == report.peers() == report.scaling() == report.suites() == report.gpu_all() == "not yet measured"
    )
    table = report.gpu().splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:5]] == [
        *("**this engine**, bf16", "H200", "not yet measured", "not yet measured")
    ]
    assert any("8 x H100" in line and "468,000" in line and "40.5%" in line for line in table)


def test_a_measured_step_takes_the_place_of_the_promise(write):
    def row(peer: str, tokens: float, **figures) -> Row:
        found = {"tokens": exact(tokens, "tokens/s")} | figures
        return Row("step", "gpt2 B=64 bf16", peer, facts={"precision": "bf16", "batch": 64}, figures=found)

    rows = [row("ours compiled", 123456.7, mfu=exact(0.456, "%")), row("reference compiled", 1000.0)]
    rows += [Row("step", "gpt2 B=64 bf16", "transformers compiled", "failed", "x")]
    write("gpu.json", {"gpu": "NVIDIA H200", "machine": "NVIDIA H200"}, rows)
    table = report.gpu()
    assert "not yet measured" not in table
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in table.splitlines()[2:4]]
    assert cells[0] == ["**this engine**, bf16, compiled, B = 64", "1 x H200", "123,457", "45.6%"]
    assert cells[1] == ["plain PyTorch, bf16, compiled, B = 64", "1 x H200", "1,000", ""]
    assert "`transformers`" not in table
    assert "reference compiled" in report.gpu_all()
    assert "transformers" not in report.gpu_all()


def test_a_cpu_case_is_held_against_its_fastest_and_its_leanest_peer(write):
    def row(peer: str, ms: float, size: float, speed: float | None = None, case: str = report.GOAL_CASE) -> Row:
        figures = {"step": exact(ms / 1e3, "s"), "step memory": exact(size, "B"), "of ceiling": exact(0.75, "%")}
        figures |= {"speed": Figure(speed, "x", 1.0, 9.0, 5)} if speed else {}
        return Row("step", case, peer, facts={"precision": "fp32"}, figures=figures)

    rows = [
        row("ours eager, malloc tuned", 100, 3e6, 1.8),
        row("ours compiled, malloc tuned", 90, 4e6, 2.0),
        row("reference eager, malloc tuned", 300, 9e6),
        row("transformers compiled, malloc tuned", 180, 20e6),
        row("ours eager", 100, 2e6, 1.8),
        row("reference compiled", 400, 9e6),
        Row("step", report.GOAL_CASE, "reference eager", "failed"),
        row("ours eager", 100, 2e6, 1.8, case="another"),
        row("reference compiled", 400, 9e6, case="another"),
    ]
    write("peers.json", {"machine": "one core", "torch": "t", "transformers": "f"}, rows)
    tuned, plain = ([cell.strip() for cell in line.split("|")[1:-1]] for line in report.cpu().splitlines()[2:4])
    assert tuned[1:] == [
        *("90 ms", "180 ms (`transformers` compiled, malloc tuned)", "**2x (1x to 9x)**", "75.0%", "4 MB / 9 MB")
    ]
    assert plain[1:] == ["100 ms", "400 ms (plain PyTorch compiled)", "4x", "75.0%", "2 MB / 9 MB"]
    assert "another" not in report.cpu()
    assert "another" in report.peers()


def test_a_suite_s_case_has_a_line(tmp_path, write):
    stats = {"median": 0.002, "q1": 0.001, "q3": 0.003, "rounds": 7}
    info = {"throughput": exact(5e9, "B/s")._asdict(), "note": "n"}
    case = {
        "fullname": "bench/suites/bench_ops.py::test_op[x]",
        "name": "test_op[x]",
        "stats": stats,
        "extra_info": info,
    }
    facts = {"machine": "m", "torch": "t", "command": "python -m pytest bench"}
    write("other.json", {}, [])
    (tmp_path / "results" / "here" / "bench.json").write_text(json.dumps({"machine_info": facts, "benchmarks": [case]}))
    line = report.suites().splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["op[x]", "2 ms (1 to 3 ms)", "5 GB/s", "n"]


def test_only_what_is_between_the_markers_changes_in_whatever_file(root, capsys):
    assert report.main(["--check"], root) == 1
    assert "README.md must hold what bench/results gives; run python -m bench.report" in capsys.readouterr().err
    assert report.main([], root) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert region("cpu", "not yet measured") in readme
    assert region([*report.TABLES][-1], "not yet measured") == (root / "docs" / "benchmarks.md").read_text()
    assert report.main(["--check"], root) == 0


def test_a_table_without_a_place_is_a_sentence(root, capsys):
    (root / "docs" / "benchmarks.md").unlink()
    report.main([], root)
    assert report.main(["--check"], root) == 1
    assert (
        f"every table must stand in README.md or docs/*.md, {[*report.TABLES][-1]} in none" in capsys.readouterr().err
    )


def test_a_marker_that_names_no_table_is_a_sentence(root, capsys):
    (root / "README.md").write_text(region("cpus"))
    assert report.main([], root) == 2
    assert "a table must be one of gpu, gpu_all, published, cpu, peers" in capsys.readouterr().err
