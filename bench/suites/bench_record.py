"""The record of a long run: what training waits for at an evaluation, and opening it for a resume.

The first must not grow with the rows of metrics.jsonl; the second reads each once.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.suites.conftest import case
from engine.config import PRESETS
from engine.run import rows
from engine.run.curves import MOST_POINTS
from engine.run.metrics import METRICS_FILE, Metrics

CONFIG = replace(PRESETS["tiny"], num_steps=10**9)
MEASURED = dict.fromkeys(("lr", "grad_norm", "tokens_per_s", "peak_gib", "step_ms", "data_ms", "compute_ms"), 0.123456)
ROWS = pytest.mark.parametrize("count", [case("10000", is_quick=True), case("1000000", is_quick=False)])


def opened(out: Path, count: int) -> Metrics:
    """The record of a run that resumes after `count` rows."""
    if not (out / METRICS_FILE).exists():
        with (out / METRICS_FILE).open("wb") as file:
            for step in range(count):
                row = {"step": step, "tokens": step * CONFIG.tokens_per_step, **MEASURED}
                file.write(rows.dump(row | {"loss": 3 + 2 / (step + 1)}))
    return Metrics(replace(CONFIG, out=str(out)), count, True, "byte")


@ROWS
def test_evaluation(measure, tmp_path: Path, count: str):
    record = opened(tmp_path, int(count))

    def evaluation() -> list[dict]:
        step = evaluation.step = evaluation.step + 1
        record.log(step, val_loss=3.0)
        record.sample(step, "a sample")
        points = record.rows()
        record.end_step(step)
        return points

    def check(points: list[dict]) -> None:
        assert points[-1]["val_loss"] == 3.0
        assert max(point.get("loss", 0) for point in points) == 5.0  # the first row's
        assert len(points) <= sum(MOST_POINTS.values()) + 16

    evaluation.step = int(count)
    measure(evaluation, check)
    record.close()


@ROWS
def test_open_for_a_resume(measure, tmp_path: Path, count: str):
    def check(record: Metrics) -> None:
        assert len((tmp_path / METRICS_FILE).read_bytes().splitlines()) == int(count)
        record.close()

    measure(lambda: opened(tmp_path, int(count)), check, work=(int(count), "rows"), rounds=3)
