"""A Run closes its parts so that the user is told what failed first, and counts all of an update."""

import errno
import sys
import time

import pytest
from conftest import SMALL
from runs import run

from engine.errors import BAD_INPUT, BadInput
from engine.run import checkpoint
from engine.run.metrics import METRICS_FILE, Metrics, read_rows
from engine.step import Mailbox


@pytest.fixture
def full_disk(monkeypatch):
    """Every save fails with ENOSPC."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", refuse)


def train(out, shards) -> int:
    return run("train", *SMALL, "--num-steps", "1", "--data", str(shards), "--out", str(out))


def test_a_failed_save_is_reported_although_closing_the_metrics_fails_too(
    full_disk, shards, tmp_path, monkeypatch, capfd
):
    def close(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Metrics, "close", close)
    assert train(tmp_path / "run", shards) == BAD_INPUT
    stderr = capfd.readouterr().err
    assert "checkpoint: saving must write" in stderr
    assert "nothing was saved" in stderr


def test_what_is_closed_after_a_failed_save_sees_its_exception(full_disk, shards, tmp_path, monkeypatch):
    seen = []  # Weights & Biases ends a run as failed by this
    close = Metrics.close
    monkeypatch.setattr(Metrics, "close", lambda self: (seen.append(sys.exc_info()[0]), close(self)))
    assert train(tmp_path / "run", shards) == BAD_INPUT
    assert seen == [BadInput]


def test_waiting_for_the_device_counts_as_time_of_the_update(shards, tmp_path, monkeypatch):
    exchange = Mailbox.exchange  # where a CPU that runs ahead waits for the GPU

    def wait(self, numbers):
        time.sleep(0.2)
        return exchange(self, numbers)

    monkeypatch.setattr(Mailbox, "exchange", wait)
    assert train(tmp_path / "run", shards) == 0
    rows = [row for row in read_rows(tmp_path / "run" / METRICS_FILE) if "step_ms" in row]
    assert rows
    assert all(row["step_ms"] >= 200 for row in rows)
