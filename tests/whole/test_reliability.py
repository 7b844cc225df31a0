"""Tests named in docs/reliability.md: each exists, and every fault has one."""

import ast
import re

from conftest import ROOT

TABLE = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if re.match(r"\| \d+ \| ", line)]


def test_every_fault_has_a_row_and_every_test_in_it_exists():
    assert [int(line.split("|")[1]) for line in TABLE if line.count("|") == 5] == list(range(1, 49))
    there = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for line in TABLE:
        named = re.findall(r"`(test_\w+)`", line)
        assert line.count("|") != 5 or named, line
        assert set(named) <= there, set(named) - there
