"""Busy: a step that is slow for lack of CPU time has the machine named as the reason, and no other."""

import itertools
import re

import pytest

from engine.health import busy
from engine.health.busy import Busy


class Machine:
    """A process that gets `cores` while logged steps pass."""

    def __init__(self, monkeypatch):
        self.wall, self.cpu, self.throttled, self.load = 100.0, 0.0, 0.0, (0.5, 2)
        monkeypatch.setattr(busy.time, "monotonic", lambda: self.wall)
        monkeypatch.setattr(busy.time, "process_time", lambda: self.cpu)
        monkeypatch.setattr(busy, "throttled_seconds", lambda: self.throttled)
        monkeypatch.setattr(busy, "load", lambda: self.load)
        self.busy = Busy()

    def step(self, seconds: float = 1.0, cores: float = 2.0, **fields: float) -> str | None:
        """A logged step."""
        self.wall, self.cpu = self.wall + seconds, self.cpu + cores * seconds
        return self.busy.check({"loss": 1.0, "step_ms": 1e3 * seconds, **fields})


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine(monkeypatch)
    for _ in range(20):
        assert machine.step() is None
    return machine


def test_a_slow_step_without_its_cpu_time_is_explained_by_what_else_runs(machine):
    machine.load = (7.25, 2)
    assert machine.step(3.0, 0.7) == (
        "SLOW, THE MACHINE IS BUSY: 3 s a step, 1 s is usual in this run; this process got 0.70 cores, 2.00 are usual; "
        "the load average is 7.2 on 2 CPUs: other processes have the rest"
    )


def test_a_container_s_limit_is_named_before_other_processes_and_a_disk_after_them(machine):
    machine.throttled, machine.load = 1.2, (7.25, 2)
    said = machine.step(3.0, 0.7)
    assert said.startswith("SLOW, THE MACHINE IS BUSY: 3 s a step")
    assert said.endswith("; the CPU limit of its container held it back")  # summed over CPUs: no share of the time
    machine.wall += busy.EVERY
    machine.cpu += 2 * busy.EVERY
    machine.step()
    machine.load = (0.5, 2)
    said = machine.step(3.0, 0.7)
    assert said.startswith("SLOW STEP: 3 s a step")
    assert said.endswith("the load average is 0.5 on 2 CPUs: it waited for a disk or for memory, or was suspended")


@pytest.mark.parametrize(
    ("seconds", "load", "wanted"),
    [
        pytest.param(61.0, 0.2, "SLOW STEP: .* most likely it was suspended, or it .*", id="suspended"),
        pytest.param(
            61.0, 2.3, "SLOW STEP: .* most likely it was suspended, or it .*", id="suspended, and its own load"
        ),
        pytest.param(9.0, 40.0, "SLOW, THE MACHINE IS BUSY: .* other processes have the rest", id="very busy"),
    ],
)
def test_a_step_much_slower_than_the_load_explains_is_a_suspension_and_no_busy_machine(machine, seconds, load, wanted):
    machine.load = (load, 2)
    assert re.fullmatch(wanted, machine.step(seconds, 2.0 / seconds))


@pytest.mark.parametrize(
    ("seconds", "cores", "fields"),
    [
        pytest.param(3.0, 2.0, {}, id="its own work"),
        pytest.param(1.2, 0.7, {}, id="hardly slow"),
        pytest.param(3.0, 0.7, {"communication_ms": 2000.0}, id="a late rank"),
        pytest.param(3.0, 0.7, {"eval_ms": 2000.0}, id="an evaluation between"),
        pytest.param(3.0, 0.7, {"checkpoint_ms": 2000.0}, id="a save between"),
        pytest.param(3.0, 0.7, {"step_ms": None}, id="no step"),
    ],
)
def test_another_reason_is_not_called_a_busy_machine(machine, seconds, cores, fields):
    assert machine.step(seconds, cores, **fields) is None


def test_the_warning_comes_at_most_every_ten_minutes_and_not_before_the_usual_is_known(monkeypatch):
    machine = Machine(monkeypatch)
    for _ in range(busy.LEAST - 1):
        machine.step()
    assert machine.step(3.0, 0.5) is None
    said = []
    for _ in range(100):
        for _ in range(9):
            assert machine.step() is None
        if machine.step(9.0, 0.5) is not None:
            said.append(machine.wall)
    assert len(said) == 3  # in 1,800 s
    assert min(later - earlier for earlier, later in itertools.pairwise(said)) >= busy.EVERY


@pytest.mark.parametrize(
    ("name", "text", "seconds"),
    [
        ("cpu.stat", "usage_usec 9\nnr_throttled 3\nthrottled_usec 2500000\n", 2.5),
        ("cpu.stat", "nr_periods 9\nnr_throttled 3\nthrottled_time 2500000000\n", 2.5),
        ("cpu.stat", "usage_usec 9\n", 0.0),
        ("cpu.stat", "throttled_usec many\n", 0.0),
        ("other", "", 0.0),
    ],
    ids=["v2", "v1", "no limit", "odd", "no file"],
)
def test_throttling_is_read_where_the_kernel_tells_of_it(tmp_path, monkeypatch, name, text, seconds):
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(busy, "CPU_STAT", (str(tmp_path / "none"), str(tmp_path / "cpu.stat")))
    assert busy.throttled_seconds() == seconds
    assert busy.load() is None or busy.load()[1] >= 1
