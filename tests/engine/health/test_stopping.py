"""Signals and time limits: a run that is asked to stop ends in time, even if its main thread is stuck."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from engine.health import stopping
from engine.health.stopping import Stop, launched_at, time_is_up

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("TORCHELASTIC_RUN_ID", None)

# Enters Stop and blocks in C, on a mutex locked twice, where the main thread runs no Python. Another thread prints
# the first signal.
STUCK = """
import ctypes, sys, threading, time
from engine.health import stopping
grace, stopping.ECHO = map(float, sys.argv[1:])
stop = stopping.Stop(grace, None)
def tell():
    while not stop.flags(0.0)[0]:
        time.sleep(0.002)
    print(stop.signal.name, flush=True)
threading.Thread(target=tell, daemon=True).start()
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
with stop:
    libc.pthread_mutex_lock(mutex)
    print("stuck", flush=True)
    libc.pthread_mutex_lock(mutex)
    print("not stuck", flush=True)
"""


class Stuck:
    """A process that runs STUCK, killed when the context ends."""

    def __init__(self, grace_seconds: float, echo: float = stopping.ECHO):
        command = [sys.executable, "-c", STUCK, str(grace_seconds), str(echo)]
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.timer = threading.Timer(20, self.process.kill)  # so that a test fails if the exit never comes
        self.timer.start()
        assert self.read_line() == "stuck"
        time.sleep(0.05)  # until it is in the second lock

    def __enter__(self) -> "Stuck":
        return self

    def __exit__(self, *_) -> None:
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def read_line(self) -> str:
        return self.process.stdout.readline().strip()

    def ends(self, within: float) -> tuple[int, str]:
        """Exit code and stderr. Raises TimeoutExpired after `within` seconds."""
        _, output = self.process.communicate(timeout=within)
        return self.process.returncode, output


def answer(number: int, grace_seconds: float) -> str:
    return (
        f"\ngpt2 train: {signal.Signals(number).name}: stopping after this micro-batch, then saving; at the latest "
        f"{grace_seconds:g} s from now (--grace-seconds) it leaves\n"
    )


# ---- Signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
def test_a_stuck_process_takes_a_signal_as_a_request_and_a_second_as_an_order(number, code):
    with Stuck(grace_seconds=60, echo=0.2) as stuck:
        stuck.send(number)
        assert stuck.read_line() == number.name
        time.sleep(0.4)
        assert stuck.process.poll() is None
        stuck.send(number)
        assert stuck.ends(within=5) == (
            code,
            f"{answer(number, 60)}\ngpt2 train: a second signal: leaving at once; nothing was saved\n",
        )


def test_the_code_is_that_of_the_first_signal():
    with Stuck(grace_seconds=60, echo=0.0) as stuck:
        stuck.send(signal.SIGTERM)
        assert stuck.read_line() == "SIGTERM"
        stuck.send(signal.SIGINT)
        assert stuck.ends(within=5)[0] == 143


def test_the_same_ctrl_c_handed_on_by_torchrun_is_no_second_signal():
    with Stuck(grace_seconds=60) as stuck:
        for _ in range(3):
            stuck.send(signal.SIGINT)
            stuck.send(signal.SIGTERM)
            time.sleep(0.1)
        with pytest.raises(subprocess.TimeoutExpired):
            stuck.ends(within=0.3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
def test_a_stuck_process_leaves_when_its_grace_is_over(number, code):
    with Stuck(grace_seconds=0.6) as stuck:
        began = time.monotonic()
        stuck.send(number)
        ended = stuck.ends(within=5)
        assert 0.5 < time.monotonic() - began < 3
        assert ended == (
            code,
            f"{answer(number, 0.6)}\ngpt2 train: could not save within the 0.6 s of --grace-seconds: leaving at once; "
            "nothing was saved\n",
        )


def test_a_run_that_has_saved_ends_with_its_own_code_when_the_grace_is_over(monkeypatch, capfd):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(stopping.os, "_exit", leave)
    stop = Stop(25.0, None)
    stop.signal, stop.last_saved = signal.SIGTERM, lambda: "saved up to step 9"
    for is_over, code in ((False, 143), (True, 75)):
        stop.is_over = lambda is_over=is_over: is_over
        with pytest.raises(SystemExit, match=str(code)):
            stop._leave("a reason")
        assert "a reason: leaving at once; saved up to step 9" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")  # which does not know what rank 0 saved
    with pytest.raises(SystemExit):
        stop._leave("a reason")
    assert "leaving at once\n" in capfd.readouterr().err


def test_a_repeated_signal_does_not_lengthen_the_grace():
    with Stuck(grace_seconds=0.6) as stuck:
        began = time.monotonic()
        while stuck.process.poll() is None and time.monotonic() - began < 3:
            stuck.send(signal.SIGTERM)  # each within ECHO of the first
            time.sleep(0.1)
        assert stuck.process.returncode == 143
        assert "--grace-seconds" in stuck.process.stderr.read()


def test_warnings_of_queues_are_requests_too_and_never_an_order():
    with Stuck(grace_seconds=60, echo=0.0) as stuck:
        stuck.send(signal.SIGXCPU)
        assert stuck.read_line() == "SIGXCPU"
        for number in (signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM):
            stuck.send(number)
            time.sleep(0.02)
        with pytest.raises(subprocess.TimeoutExpired):
            stuck.ends(within=0.2)
        stuck.send(signal.SIGTERM)  # the second order
        assert stuck.ends(within=5)[0] == 128 + signal.SIGXCPU


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_each_signal_is_a_request(number):
    handlers = {other: signal.getsignal(other) for other in stopping.SIGNALS}
    try:
        with Stop(60, None) as stop:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 5
            while not stop.is_requested() and time.monotonic() < deadline:
                time.sleep(0.002)
            assert (stop.signal, stop.flags(0.0)) == (number, (True, False))
    finally:
        for other, handler in handlers.items():
            signal.signal(other, handler)


def test_a_hangup_that_nohup_ignores_stays_ignored_and_others_do_not():
    handlers = {other: signal.getsignal(other) for other in stopping.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background jobs have it
    try:
        with Stop(60, None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.is_requested()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert stop.signal == signal.SIGINT
    finally:
        for other, handler in handlers.items():
            signal.signal(other, handler)


def listeners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "signals"]


@pytest.mark.parametrize("is_asked", [True, False])
def test_handlers_wakeup_and_thread_are_gone_afterwards(is_asked):
    def mine(*_):
        raise AssertionError("my own handler, which is not there while Stop listens")

    before = {number: signal.signal(number, mine) for number in stopping.SIGNALS}
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup = signal.set_wakeup_fd(write)
    try:
        with Stop(0.2, None) as stop:
            stop.on_leave = print
            assert len(listeners()) == 1
            if is_asked:
                os.kill(os.getpid(), signal.SIGTERM)
                deadline = time.monotonic() + 5
                while stop.signal is None and time.monotonic() < deadline:
                    time.sleep(0.002)
            assert stop.flags(0.0) == (is_asked, False)
        # Asked once, the process ignores the rest until it ends: a late Ctrl-C must not change its exit code.
        expected = stopping._ignored if is_asked else mine
        assert {signal.getsignal(number) for number in stopping.SIGNALS} == {expected}
        assert signal.set_wakeup_fd(wakeup) == write
        assert not listeners(), "a thread that holds the model while Python ends may abort the process"
        assert stop.on_leave is None
        time.sleep(0.3)  # longer than the grace, which has ended with Stop: the process still runs
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def test_outside_the_main_thread_no_handler_is_touched_and_one_note_says_so(capfd):
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    seen = []

    def listen() -> None:
        with Stop(60, None) as stop:
            seen.append({number: signal.getsignal(number) for number in stopping.SIGNALS})
            seen.append((listeners(), stop.flags(0.0)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before, ([], (False, False))]
    assert capfd.readouterr().err.startswith("gpt2 train: no signal stops a run outside the main thread")


def test_with_a_caller_s_event_that_is_the_request_and_signals_stay_the_caller_s(capfd, monkeypatch):
    monkeypatch.setattr(stopping, "launched_at", lambda: -1e9)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    asked = threading.Event()
    with Stop(60, 10.0, asked) as stop:  # of the call, however old the process is
        assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before
        assert not listeners()
        assert stop.flags(0.0) == (False, False)
        asked.set()
        assert stop.is_requested()
        assert (stop.flags(0.0), stop.source) == ((True, False), "its caller")
    assert capfd.readouterr() == ("", "")


# ---- Time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elapsed", "limit", "step", "save", "wanted"),
    [
        (1e9, None, 1.0, 1.0, False),
        (0.0, 100.0, 0.0, 0.0, False),
        (94.9, 100.0, 0.0, 0.0, False),
        (95.0, 100.0, 0.0, 0.0, True),  # MARGIN, 5 s
        (64.9, 100.0, 10.0, 0.0, False),
        (65.0, 100.0, 10.0, 0.0, True),  # three steps: this one, and two until all ranks know
        (54.9, 100.0, 0.0, 20.0, False),
        (55.0, 100.0, 0.0, 20.0, True),  # a save, twice as long as the slowest so far
        (24.9, 100.0, 10.0, 20.0, False),
        (25.0, 100.0, 10.0, 20.0, True),
        (0.0, 4.0, 0.0, 0.0, True),
    ],
)
def test_the_time_is_up_when_another_step_could_miss_the_limit(elapsed, limit, step, save, wanted):
    assert time_is_up(elapsed, limit, step, save) == wanted


def test_the_slowest_step_counts_but_not_those_that_compile(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stopping, "now", lambda: now[0])
    monkeypatch.setattr(stopping, "launched_at", lambda: 900.0)
    stop = Stop(25.0, 10.0)  # limit: 600 s after 900
    for seconds in (0, 90, 10, 30, 5, 5):  # the second call comes 90 s after the first, which compiled
        now[0] += seconds
        assert stop.flags(20.0) == (False, False)
    now[0] = 900 + 600 - 3 * 30 - 2 * 20 - 5 - 1
    stop._last = now[0] - 1
    assert stop.flags(20.0) == (False, False)
    now[0] += 1
    assert stop.flags(19.0) == (False, False)
    assert stop.flags(20.0) == (False, True)


def test_without_a_limit_the_time_is_never_up(monkeypatch):
    monkeypatch.setattr(stopping, "launched_at", lambda: 0.0)
    stop = Stop(25.0, None)
    assert [stop.flags(1e9) for _ in range(4)] == [(False, False)] * 4


TELL = "from engine.health import stopping; print(stopping.launched_at(), flush=True)"


def test_the_launch_is_this_process_s_start_and_not_now():
    began = stopping.now()
    done = subprocess.run(
        [sys.executable, "-c", f"import time; time.sleep(0.7); {TELL}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) == pytest.approx(began, abs=0.5)


def test_under_torchrun_the_launch_is_torchrun_s_start_whatever_it_restarted():
    """A queue's time limit includes restarts."""
    began = stopping.now()
    parent = f"import subprocess, sys, time; time.sleep(0.7); subprocess.run([sys.executable, '-c', {TELL!r}])"
    launches = [
        subprocess.run(
            [sys.executable, "-c", parent],
            env={**ENVIRONMENT, **extra},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ({"TORCHELASTIC_RUN_ID": "none"}, {})
    ]
    assert float(launches[0]) == pytest.approx(began, abs=0.5)
    assert float(launches[1]) > float(launches[0]) + 1.2  # without torchrun: the second child's own start


def test_a_name_with_spaces_and_brackets_does_not_shift_the_fields(tmp_path):
    began = stopping.now()
    python = tmp_path / "a) b (c 1 2"
    python.symlink_to(sys.executable)
    output = subprocess.run(
        [str(python), "-c", f"import time; time.sleep(0.7); {TELL}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert float(output) == pytest.approx(began, abs=0.5)


def test_where_no_proc_is_the_launch_is_now(monkeypatch):
    monkeypatch.setattr(stopping.Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(stopping, "now", lambda: 123.0)
    assert launched_at() == 123.0


def test_a_clock_set_back_does_not_lengthen_the_limit(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(stopping, "launched_at", lambda: stopping.now() - 600)
    assert Stop(25.0, 10.0).flags(0.0) == (False, True)
