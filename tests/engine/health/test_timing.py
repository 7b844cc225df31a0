"""Clock: each millisecond is counted once, and communication begins at the last gradient."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from engine.health import timing
from engine.health.timing import Clock
from model.gpt2 import GPT2, GPT2Config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Time:
    """Fake clocks of a CPU and of a GPU with a queue. Time passes only when a test says so."""

    def __init__(self):
        self.cpu = self.gpu = 1000.0

    def perf_counter(self) -> float:
        return self.cpu

    def passes(self, seconds: float) -> None:
        self.cpu += seconds

    def launch(self, seconds: float) -> None:
        """Queues GPU work; the CPU does not wait."""
        self.gpu = max(self.gpu, self.cpu) + seconds

    def wait(self) -> None:
        self.cpu = max(self.cpu, self.gpu)


@pytest.fixture
def now(monkeypatch) -> Time:
    now = Time()
    monkeypatch.setattr(timing.time, "perf_counter", now.perf_counter)

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            self.at = max(now.gpu, now.cpu)

        def synchronize(self):
            now.cpu = max(now.cpu, self.at)

        def elapsed_time(self, other) -> float:
            assert now.cpu >= other.at, "the GPU has not come so far"
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return now


def update(clock: Clock, now: Time, data: float, compute: float) -> None:
    with clock.part("data"):
        now.passes(data)
    with clock.part("update"):
        now.passes(compute)


def test_a_step_is_data_and_compute_on_average(now):
    clock = Clock(CPU)
    update(clock, now, 0.010, 0.100)
    now.passes(7)  # logging belongs to no part
    update(clock, now, 0.030, 0.200)
    assert clock.read() == pytest.approx({"step_ms": 170, "data_ms": 20, "compute_ms": 150})


def test_data_belongs_to_the_update_after_it(now):
    clock = Clock(CPU)
    with clock.part("data"):
        now.passes(0.010)
    with clock.part("update"):
        now.passes(0.100)
    assert clock.read() == pytest.approx({"step_ms": 110, "data_ms": 10, "compute_ms": 100})


def test_evaluation_and_checkpoints_are_totals_outside_of_steps(now):
    clock = Clock(CPU)
    for _ in range(2):
        with clock.part("evaluation"):
            now.passes(3)
        with clock.part("checkpoint"):
            now.passes(0.5)
        update(clock, now, 0.0, 0.1)
    read = clock.read()
    assert read.pop("eval_ms") == pytest.approx(6000)
    assert read.pop("checkpoint_ms") == pytest.approx(1000)
    assert read == pytest.approx({"step_ms": 100, "data_ms": 0, "compute_ms": 100})


def test_a_reading_starts_afresh(now):
    clock = Clock(CPU)
    with clock.part("evaluation"):
        now.passes(3)
    update(clock, now, 0.01, 0.1)
    clock.read()
    update(clock, now, 0.02, 0.2)
    assert clock.read() == pytest.approx({"step_ms": 220, "data_ms": 20, "compute_ms": 200})


def test_after_the_last_update_only_evaluation_is_read(now):
    clock = Clock(CPU)
    with clock.part("evaluation"):
        now.passes(2)
    with clock.part("checkpoint"):
        pass
    assert clock.read() == pytest.approx({"eval_ms": 2000})


def test_a_part_that_fails_is_counted_and_its_error_goes_on(now):
    clock = Clock(CPU)

    def save():
        with clock.part("checkpoint"):
            now.passes(1)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    assert clock.read() == pytest.approx({"checkpoint_ms": 1000})


def test_communication_is_from_the_last_watched_gradient_of_the_last_backward(now):
    clock = Clock(CPU)
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    clock.watch(first, second)
    for communication in (0.020, 0.040):
        with clock.part("update"):
            for _ in range(3):  # micro-batches
                for parameter in (second, first):
                    now.passes(0.010)
                    parameter.sum().backward()
            now.passes(communication)
            clock.synchronized()
            now.passes(0.005)  # the optimizer
    expected = {"step_ms": 95, "data_ms": 0, "communication_ms": 30, "compute_ms": 65}
    assert clock.read() == pytest.approx(expected)


def test_without_a_watched_gradient_there_is_no_communication(now):
    clock = Clock(CPU)
    with clock.part("update"):
        clock.synchronized()
    assert "communication_ms" not in clock.read()


def test_the_gpu_s_communication_is_read_from_its_own_clock(now):
    clock = Clock(GPU)
    parameter = torch.nn.Parameter(torch.zeros(1))
    clock.watch(parameter)
    for _ in range(2):
        with clock.part("update"):
            for _ in range(2):  # micro-batches
                now.launch(0.100)
                now.passes(0.001)
                parameter.sum().backward()
            now.launch(0.030)  # the all-reduce
            clock.synchronized()
            now.launch(0.005)
            if now.cpu > 1000.002:
                now.wait()  # a logged step
    expected = {"step_ms": 235, "data_ms": 0, "communication_ms": 30, "compute_ms": 205}
    assert clock.read() == pytest.approx(expected)


def test_evaluation_is_not_charged_for_updates_that_a_gpu_still_had_queued(now):
    clock = Clock(GPU)
    for _ in range(4):
        with clock.part("update"):
            now.launch(0.100)
            now.passes(0.001)
    with clock.part("evaluation"):
        now.launch(1.0)
        now.wait()
    assert clock.read() == pytest.approx({"step_ms": 100, "data_ms": 0, "compute_ms": 100, "eval_ms": 1000})


def test_nothing_but_a_reading_waits_for_the_gpu(now):
    clock = Clock(GPU)
    parameter = torch.nn.Parameter(torch.zeros(1))
    clock.watch(parameter)
    began = now.cpu
    with clock.part("checkpoint"):
        now.launch(5)
    with clock.part("update"):
        parameter.sum().backward()
        now.launch(5)
        clock.synchronized()
    assert now.cpu == began
    clock.read()
    assert now.cpu == began + 10


def test_the_embedding_s_gradient_is_the_last_of_all():
    model = GPT2(GPT2Config(2, 2, 32, 16, 257))
    order = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    tokens = torch.randint(257, (2, 16))
    model(tokens, tokens).backward()
    assert len(order) == len(list(model.parameters()))
    assert order[-1] == "wte.weight"


@pytest.mark.slow
def test_the_early_of_two_ranks_sees_its_wait_for_the_late_one_as_communication():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("timing_replicas.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    early, late = (float(ms) for ms in re.findall(r"waited: (\S+) ms", done.stdout))
    assert early >= 30  # the other rank slept 50 ms; the scheduler may have delayed this one
    assert late < 100  # without the 100 ms that its own backward pass took after the first gradient
