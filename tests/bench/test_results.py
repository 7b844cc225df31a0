"""The one format of results: figures go to JSON and back, rows replace their like, and words carry units."""

import math
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import machine, results, tables
from bench.measure import in_turns, within
from bench.results import Figure, Row


def test_spread_is_the_median_with_percentiles():
    assert results.spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], "s") == Figure(3.5, "s", 2.0, 5.0, 6)
    assert results.spread([2.0], "s") == results.exact(2.0, "s") == Figure(2.0, "s", 2.0, 2.0, 1)
    assert results.rate(Figure(2.0, "s", 1.0, 4.0, 9), 8.0, "B/s") == Figure(4.0, "B/s", 2.0, 8.0, 9)


def test_figures_go_to_json_and_back(tmp_path):
    row = Row("step", "a", "ours", note="n", facts={"batch": 4}, figures={"step": Figure(1.5, "s", 1.0, 2.0, 5)})
    (tmp_path / "f.json").write_text(results.dumps({"machine": "m"}, [row]))
    assert results.read(tmp_path / "f.json") == ({"machine": "m"}, [row])
    row.figures["loss"] = results.exact(math.nan, "nats")  # JSON cannot hold it
    (tmp_path / "f.json").write_text(results.dumps({}, [row]))
    assert [*results.read(tmp_path / "f.json")[1][0].figures] == ["step"]


@pytest.mark.parametrize("text", ["[]", '{"facts": {}}', '{"facts": {}, "rows": [{"section": "x"}]}', "{"])
def test_another_format_is_refused(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json must hold|Expecting"):
        results.read(tmp_path / "f.json")


def test_saving_replaces_the_same_case_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for case, ms in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        row = Row("step", case, "ours", figures={"step": results.exact(ms, "ms")})
        path = results.save("peers", {"commit": "c", "command": f"{case} {ms}"}, [row])
    assert path == tmp_path / machine.slug() / "peers.json"
    rows = results.read(path)[1]
    assert {row.case: (row.value("step"), row.facts["command"]) for row in rows} == {
        "a": (3.0, "a 3.0"),  # each row has its own
        "b": (2.0, "b 2.0"),
    }


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (12345.6, "tokens/s", "12,346 tokens/s"),
        (999.0, "B/s", "999 B/s"),
        (1.5e9, "B/s", "1.50 GB/s"),
        (4.2e15, "FLOP/s", "4,200 TFLOP/s"),
        (0.0015, "s", "1.50 ms"),
        (0.456, "%", "45.6%"),
        (1.234, "x", "1.23x"),
        (0, "B", "0 B"),
    ],
)
def test_amounts_name_their_unit(value, unit, words):
    assert tables.amount(value, unit) == words


def test_a_table_has_the_figures_that_any_row_has():
    rows = [
        Row("s", "a", "ours", figures={"step": Figure(0.1, "s", 0.09, 0.12, 5)}),
        Row("s", "a", "b", "failed", "died"),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.of(rows).splitlines()]
    assert lines[0] == ["case", "peer", "status", "step"]
    assert lines[2:] == [["a", "ours", "", "100 ms (90 to 120 ms)"], ["a", "b", "failed: died", ""]]


def test_turns_alternate_and_stop_after_a_whole_round():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert in_turns(samplers, within(math.inf, 3, 3)) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert "".join(order) == "abbaab"
    assert len(in_turns(samplers, within(0.0, 2, 9))["a"]) == 2
