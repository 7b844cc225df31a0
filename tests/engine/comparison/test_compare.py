"""gpt2 compare: what a run's rows say of tokens and time, groups of seeds, and what is not compared."""

import json
import re

import numpy as np
import pytest
from made_runs import make, row, rows
from runs import run

from engine.comparison import compare, records
from engine.config import OptimConfig


def read(*paths) -> list[records.Record]:
    return records.read_all(tuple(map(str, paths)), "compare")


@pytest.fixture
def four(tmp_path) -> list:
    """Two seeds at each of two learning rates; those of the second are better by 0.5 and half as fast."""
    paths = []
    for name, loss, ms, lr in (("a", 2.0, 100.0, 1e-3), ("b", 1.5, 200.0, 2e-3)):
        for seed in (1, 2):
            changes = {"seed": seed, "optim": OptimConfig(lr=lr), "eval_every": 10 * seed}
            paths.append(make(tmp_path / f"{name}{seed}", rows(100, loss=loss + 0.01 * seed, ms=ms), **changes))
    return paths


# ---- Time ---------------------------------------------------------------------------------------------------------


def test_time_is_step_ms_times_the_updates_that_it_is_the_mean_of(tmp_path):
    lines = [row(0, loss=5.0, step_ms=100.0), row(10, loss=4.0, step_ms=200.0, eval_ms=1e6), row(15, val_loss=3.0)]
    (record,) = read(make(tmp_path / "run", [*lines, row(20, loss=2.0, step_ms=100.0), row(25, val_loss=2.0)]))
    # The updates 0; 1 to 10; 11 to 20 took 0.1, 2 and 1 s. The weights of step 10 had updates 0 to 9.
    seconds = [0.0, 1.9, 2.5, 3.0, 3.5]
    assert 3600 * record.columns["hours"] == pytest.approx(seconds)
    assert record.seconds() == pytest.approx({"evaluation": 1000.0})
    assert record.at("val_loss", 20 * 1000) == pytest.approx(2.5)
    assert record.at("val_loss", 10 * 1000) is None


def test_a_step_that_compiled_or_stood_still_counts_as_the_median(tmp_path):
    lines = [row(step, loss=5.0, step_ms=60_000.0 if step in (0, 7) else 100.0) for step in range(11)]
    (record,) = read(make(tmp_path / "run", lines))
    assert 3600 * record.last("hours") == pytest.approx(1.0)


# ---- Groups and noise ---------------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_and_in_what_computes_nothing_are_a_group(four):
    found = compare.groups(read(*four))
    assert [group.members for group in found] == [(0, 1), (2, 3)]
    assert set(compare.differing(read(*four))) == {"seed", "optim.lr", "eval_every"}


def test_the_summary_compares_at_what_all_runs_reached(four, tmp_path):
    short = make(tmp_path / "short", rows(40, loss=2.0), num_steps=40)
    found = compare.summary(read(*four, short))
    assert [one["tokens"] for one in found["loss_at_equal_tokens"]] == [10_000, 20_000, 30_000, 40_000]
    assert found["loss_at_equal_tokens"][-1]["val_loss"][0] == pytest.approx(2.11 + 1 / 41)
    assert found["loss_at_equal_time"][-1]["hours"] == pytest.approx(40 * 0.1 / 3600)
    assert found["loss_at_equal_time"][-1]["val_loss"][2] == pytest.approx(1.61 + 1 / 21)  # at 200 ms a step
    first, lone = (test for test in found["tests"] if "tokens" in test)
    assert first["value"] == pytest.approx(-0.5)
    assert first["error"] == pytest.approx(np.hypot(0.005, 0.005))
    assert first["is_more_than_noise"]
    assert lone == {"groups": ["A", "C"], "tokens": 40_000, "n": [2, 1]}


def test_the_command_prints_tables_of_80_columns_and_json(four, capfd):
    assert run("compare", *map(str, four)) == 0
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert re.search("optim.lr +0.001 +0.001 +0.002 +0.002\n", text)
    assert "B - A at 100,000 bytes: -0.5000, standard error 0.0071," in text
    assert "more than noise\n" in text
    assert run("compare", str(four[0]), str(four[2]), "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["differences"]["optim.lr"] == [0.001, 0.002]
    assert "value" not in found["tests"][0]
    assert run("compare", str(four[0]), str(four[2])) == 0
    assert "no statement about noise, one seed each" in capfd.readouterr().out
    assert run("compare", str(four[0]), str(four[1])) == 0
    assert "they show the noise, and no difference" in capfd.readouterr().out


def test_copies_of_a_run_count_once_and_prove_nothing(four, tmp_path, capfd):
    slow, fast = ({"optim": OptimConfig(lr=lr)} for lr in (1e-3, 2e-3))
    made = [("a", 2.02, 1, slow), ("b", 2.0, 1, slow), ("c", 2.01, 2, slow), ("d", 1.5, 1, fast), ("e", 1.5, 1, fast)]
    paths = [str(make(tmp_path / name, rows(100, loss=loss), seed=seed, **lr)) for name, loss, seed, lr in made]
    tests = compare.summary(read(*paths))["tests"]
    assert [test["n"] for test in tests] == [[2, 1], [2, 1]]
    assert "value" not in tests[0]
    assert run("compare", *paths) == 0
    text = capfd.readouterr().out
    assert "     runs 1, 2 have the same seed: they count once\n" in text
    assert "     runs 4, 5 have the same seed: they count once\n" in text
    assert "no statement about noise, B has one seed\n" in text
    assert run("compare", *paths[3:]) == 0
    assert "one seed: they show no noise, and no difference" in capfd.readouterr().out
    alike = [make(tmp_path / f"other{seed}", rows(100, loss=1.5), seed=seed, **fast) for seed in (1, 2)]
    assert compare.summary(read(paths[0], paths[2], *alike))["tests"][0]["n"] == [2, 2]
    alike += [make(tmp_path / f"slow{seed}", rows(100), seed=seed, **slow) for seed in (1, 2)]
    assert run("compare", *map(str, alike)) == 0
    assert "no statement about noise, equal losses within each group" in capfd.readouterr().out


# ---- What is not compared -----------------------------------------------------------------------------------------


def test_losses_on_other_data_are_not_compared_and_the_rest_is(four, tmp_path, capfd):
    other = make(tmp_path / "other", rows(100), digest="d2")
    assert run("compare", str(four[0]), str(other)) == 0
    text = capfd.readouterr().out
    assert "validation losses are not compared: the runs have different data" in text
    assert re.search("data_digest +d1 +d2\n", text)
    assert "bytes/s, median" in text
    assert " at 100,000 bytes" not in text


def test_contexts_and_units_that_differ_are_said_and_not_compared(four, tmp_path, capfd):
    short, whole = (make(tmp_path / f"at{context}", rows(100), context=context) for context in (8, 16))
    assert run("compare", str(four[0]), str(short)) == 0
    text = capfd.readouterr().out
    assert "validation losses are not compared: the runs have different contexts\n" in text
    assert re.search("  context +16 +8\n", text)
    assert "context" not in compare.differing(read(four[0], whole))  # None is the model's n_positions
    assert compare.obstacle(read(four[0], whole)) is None
    words = make(tmp_path / "words", rows(100), tokenizer="gpt2")
    assert run("compare", str(four[0]), str(words)) == 0
    text = capfd.readouterr().out
    assert re.search("  per second, median +10,000 bytes +10,000 tokens\n", text)
    assert "bytes/s" not in text
    assert run("report", str(four[0]), str(words), "--out", str(tmp_path / "x.html")) == 2
    assert "report: runs must have one tokenizer, got bytes in" in capfd.readouterr().err


def test_runs_without_rows_or_times_are_said_and_not_compared(four, tmp_path, capfd):
    untimed = [{name: value for name, value in one.items() if not name.endswith("_ms")} for one in rows(100)]
    pairs = {
        "a run has none yet": make(tmp_path / "empty", []),
        "a run has no step_ms in its rows": make(tmp_path / "untimed", untimed),
        "1 damaged line of metrics.jsonl is left out": make(tmp_path / "damaged", [b"\x00{half\n", *rows(100)]),
    }
    for said, path in pairs.items():
        assert run("compare", str(four[0]), str(path)) == 0
        assert said in capfd.readouterr().out
        assert run("compare", str(four[0]), str(path), "--json") == 0
        json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("command", ["compare", "report", "plot"])
def test_what_is_no_run_is_a_sentence(command, four, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a2" / "metrics.jsonl").unlink()
    (tmp_path / "a2" / "metrics.jsonl").mkdir()
    for paths, said in (
        ([str(four[0]), "nowhere"], "made by gpt2 train"),
        ([str(four[0]), str(four[0]) + "/"], f"{command}: runs must differ"),
        ([str(four[0]), str(four[1])], f"{command}: {four[1]}/metrics.jsonl must be a file of rows"),
        ([], " must be given, got "),
    ):
        assert run(command, *paths) == 2
        assert said in (error := capfd.readouterr().err)
        assert "Traceback" not in error
    assert not list(tmp_path.glob("*.*"))
