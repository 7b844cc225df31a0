"""Busy: names the reason of a slow step, if that is a lack of CPU time.

Between two logged steps the process gets cores = CPU time / wall time. A step counts as slow for lack
of CPU time if it takes SLOWER times the run's median, and the cores fall below FEWER of theirs. A GPU
that is slow leaves the cores as they are, and so does a rank that is late: its peers wait in
communication, which is left out. The machine is called busy only where its load or a CPU limit
shows it: a process that was suspended lacks CPU time too.
"""

import contextlib
import os
import time
from collections import deque
from pathlib import Path
from statistics import median

SLOWER, FEWER = 1.5, 0.7
SUSPENDED = 5.0  # times the run's median, from which a step was suspended rather than short of CPUs
LEAST, MOST = 8, 200  # readings that a median needs, and those that it is of
EVERY = 600.0  # seconds between two warnings
CPU_STAT = ("/sys/fs/cgroup/cpu.stat", "/sys/fs/cgroup/cpu/cpu.stat")  # of cgroups v2 and v1
THROTTLED = {"throttled_usec": 1e-6, "throttled_time": 1e-9}  # the same: name of the field, seconds per unit


class Busy:
    """Compares each logged step with those before it."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, float]] = deque(maxlen=MOST)  # milliseconds per step, cores
        self._warned = -EVERY
        self._began = self._read()

    def check(self, fields: dict[str, float | None]) -> str | None:
        """A warning if the step of these fields of a row was slow for lack of CPU time, else None."""
        if (step_ms := fields.get("step_ms")) is None:
            return None
        (wall, cpu, throttled), self._began = self._began, self._read()
        wall, cpu, throttled = (now - then for now, then in zip(self._began, (wall, cpu, throttled), strict=True))
        if wall <= 0 or fields.get("eval_ms") or fields.get("checkpoint_ms"):  # they have other cores
            return None
        own_ms, cores = step_ms - (fields.get("communication_ms") or 0.0), cpu / wall
        before = list(self._readings)
        self._readings.append((own_ms, cores))
        if len(before) < LEAST or self._began[0] - self._warned < EVERY:
            return None
        usual_ms, usual = (median(values) for values in zip(*before, strict=True))
        if own_ms <= SLOWER * usual_ms or cores >= FEWER * usual:
            return None
        self._warned = self._began[0]
        is_busy, why = reason(own_ms / usual_ms, throttled / wall)
        what = "SLOW, THE MACHINE IS BUSY" if is_busy else "SLOW STEP"
        return (
            f"{what}: {own_ms / 1e3:.3g} s a step, {usual_ms / 1e3:.3g} s is usual in this run; "
            f"this process got {cores:.2f} cores, {usual:.2f} are usual; {why}"
        )

    def _read(self) -> tuple[float, float, float]:
        return time.monotonic(), time.process_time(), throttled_seconds()


def throttled_seconds() -> float:
    """Seconds for which the cgroup's CPU limit has held its processes; 0.0 if that is not known."""
    for path in CPU_STAT:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name in THROTTLED:
                    return int(value) * THROTTLED[name]
    return 0.0


def reason(slower: float, throttled: float) -> tuple[bool, str]:
    """(whether the machine is busy, what took the CPU time in words).

    slower: the step's time over the usual. throttled: seconds, summed over CPUs, in which a CPU limit
    held the process, for each second.
    """
    if throttled > 0.05:
        return True, "the CPU limit of its container held it back"
    if (known := load()) is None:
        return False, "other processes may have the rest, or it was suspended"
    share, text = known[0] / known[1], f"the load average is {known[0]:.1f} on {known[1]} CPUs"
    if slower > max(SUSPENDED, share):  # more than the load can explain
        return False, f"{text}: most likely it was suspended, or it waited for a disk or for memory"
    if share > 1:
        return True, f"{text}: other processes have the rest"
    return False, f"{text}: it waited for a disk or for memory, or was suspended"


def load() -> tuple[float, int] | None:
    """(load average of a minute, CPUs that this process may use), or None if they are not known."""
    try:
        return os.getloadavg()[0], len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not Linux
        return None
