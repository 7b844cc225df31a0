"""bench.counts: the same numbers in every call and process, and one more of anything is seen."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import counts, steps
from model.gpt2 import MLP
from model.presets import PRESETS

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_counts
print(json.dumps(test_counts.of_a_step()))
"""


def of_a_step() -> dict:
    torch.set_num_threads(1)
    config, device = PRESETS["tiny"], torch.device("cpu")
    step = steps.build(steps.Setup(backend="torch"), config, steps.initial_weights(config), device)
    tokens = torch.arange(4 * config.n_positions).view(4, -1) % config.vocab_size
    for _ in range(2):
        step([(tokens, tokens)])
    return counts.counts(lambda: step([(tokens, tokens)]))


@pytest.fixture(scope="module")
def here() -> dict:
    return of_a_step()


@pytest.mark.slow
def test_every_count_is_the_same_in_a_fresh_process(here):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(ROOT / "tests" / "bench")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_a_training_step_counts_its_backward_pass_and_its_update(here):
    assert here["uneven"] == []
    assert here["op_calls"] == sum(here["op_calls_by_name"].values())
    assert here["op_calls_by_name"]["aten._fused_adamw_.default"] >= 1
    assert any("backward" in name for name in here["op_calls_by_name"])


def test_one_more_operator_in_the_model_is_seen(here, monkeypatch):
    before = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, h: before(self, h).clone())
    after, name = of_a_step(), "aten.clone.default"
    blocks = PRESETS["tiny"].n_layer
    assert after["op_calls_by_name"][name] == here["op_calls_by_name"].get(name, 0) + blocks
    assert after["allocated_bytes"] > here["allocated_bytes"]


def test_one_allocation_and_one_call_more_are_seen():
    kept = torch.ones(256)

    def once() -> None:
        torch.add(kept, kept)

    def twice() -> None:
        once()
        once()

    one, two = counts.counts(once), counts.counts(twice)
    assert (one["op_calls"], two["op_calls"]) == (1, 2)
    assert (one["allocations"], two["allocations"]) == (1, 2)
    assert (one["allocated_bytes"], two["allocated_bytes"]) == (1024, 2048)
    assert (one["peak_bytes"], two["peak_bytes"]) == (1024, 1024)  # the first is freed before the second comes


def test_what_does_not_repeat_is_named_instead():
    turns = iter(range(100))

    def more_each_time() -> None:
        for _ in range(next(turns)):
            torch.ones(2).add_(1)

    found = counts.counts(more_each_time)
    assert "op_calls" in found["uneven"]
    assert "op_calls" not in found
