"""README's tables come from bench/results, and say so where there is nothing."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import machine, report


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes a result file of a machine."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)

    def write(directory: str, name: str, content: dict) -> None:
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / name).write_text(json.dumps(content))

    return write


def test_readme_holds_what_the_results_give():
    assert report.main(["--check"]) == 0
    regions = report.REGION.finditer(report.README.read_text())
    assert [region[2] for region in regions] == list(report.TABLES)  # each table has its place


def test_nothing_measured_is_said(results):
    assert report.cpu() == report.scaling() == "not yet measured"
    first = report.gpu().splitlines()[2]
    assert first.startswith("| **this engine**, bf16 | H200 | not yet measured | not yet measured |")


def test_a_measured_step_takes_the_place_of_the_promise(results):
    step = {"section": "step", "op": "gpt2 bf16", "precision": "bf16", "batch": 64, "status": "measured"}
    rows = [
        step | {"contestant": "triton compiled", "tokens_per_s": 123456.7, "mfu": 0.456},
        step | {"contestant": "reference compiled", "tokens_per_s": 1000.0, "mfu": None},
        step | {"contestant": "transformers compiled", "status": "failed", "reason": "x"},
    ]
    results("nvidia-h200", "gpu.json", {"machine": {"gpu": "NVIDIA H200"}, "rows": rows})
    table = report.gpu()
    assert "not yet measured" not in table
    assert "| **this engine** on Triton, bf16, compiled, B = 64 | NVIDIA H200 | 123,457 | 45.6% |" in table
    assert "| plain PyTorch, bf16, compiled, B = 64 | NVIDIA H200 | 1,000 |  |" in table
    assert "`transformers`" not in table


def test_a_cpu_case_is_held_against_its_fastest_and_its_leanest_peer(results):
    def row(who, mode, ms, size, ratio=None):
        spread = {"median": ms, "min": ms, "max": ms}
        found = {"case": "L=4", "precision": "fp32", "contestant": who, "mode": mode, "memory": "kept"}
        found |= {"status": "measured", "step_ms": spread, "step_bytes": size, "share_of_ceiling": 0.75}
        return found | {"speed": {"median": ratio, "min": 1.0, "max": 9.0}}

    rows = [
        row("ours", "eager", 100, 3e6, 1.8),
        row("ours", "compiled", 90, 4e6, 2.0),
        row("reference", "eager", 300, 9e6),
        row("transformers", "compiled", 180, 20e6),
        row("ours", "eager", 100, 2e6, 1.8) | {"memory": "as it comes"},
        row("reference", "compiled", 400, 9e6) | {"memory": "as it comes"},
        {"case": "L=4", "precision": "fp32", "contestant": "reference", "status": "failed"},
    ]
    facts = {"machine": "one core", "torch": "t", "transformers": "f"}
    results("here", "peers.json", {"facts": facts, "rows": rows})
    line = report.cpu().splitlines()[2]
    assert "all without memory kept | 100 | 400 (plain PyTorch compiled) | 4.00x | 75% | 2 / 9 |" in report.cpu()
    assert line == (
        "| L=4, fp32 | 90 | 180 (`transformers` compiled, memory kept) | **2.00x** (1.00 to 9.00) | 75% | 4 / 9 |"
    )


def test_only_what_is_between_the_markers_changes(tmp_path, results, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nafter\n")
    assert report.main(["--check"], readme) == 1
    assert "run python -m bench.report" in capsys.readouterr().err
    assert report.main([], readme) == 0
    assert readme.read_text() == "before\n<!-- bench:cpu -->\nnot yet measured\n<!-- /bench -->\nafter\n"
    assert report.main(["--check"], readme) == 0


def test_a_marker_that_names_no_table_is_a_sentence(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:cpus -->\n<!-- /bench -->\n")
    assert report.main([], readme) == 2
    assert "a table must be one of gpu, cpu, scaling" in capsys.readouterr().err
