"""bench.prepare: both sides make as many tokens of the same text, and the figures are there."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import prepare, results


@pytest.mark.slow
def test_it_times_both_sides_on_the_same_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results.machine, "RESULTS", tmp_path / "results")
    for number in range(9):
        (tmp_path / "text" / f"{number}").parent.mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} <|endoftext|> is text\n" * 99)
    assert prepare.main(["text", "--rounds", "1", "--save"]) == 0
    assert "0 MB in 9 files, 2 workers" in capsys.readouterr().out
    (saved,) = (tmp_path / "results").rglob("prepare.json")
    ours, *_, plain = json.loads(Path(saved).read_text())["rows"]
    assert set(ours["figures"]) == {"memory", "largest worker", "time", "text", "speed"}
    assert set(plain["figures"]) == {"time", "text"}
    speed = plain["figures"]["time"]["value"] / ours["figures"]["time"]["value"] / 2
    assert abs(ours["figures"]["speed"]["value"] - speed) < 1e-9
