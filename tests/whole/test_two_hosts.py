"""Two hosts with a link and a disk each: the same results as one host, and advice when one is lost."""

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from runs import assert_same_run, measured, newest, train
from two_hosts import ADDRESSES, Host, NotPermitted, Run, two_hosts, wait

from engine.run import metrics

STEPS = ["--num-steps", "120", "--save-every", "20", "--eval-every", "60"]
HINT = re.compile(r"interface|firewall|same command", re.IGNORECASE)
PORTS = itertools.count(29600)  # one per start; the network is private to the tests
SHOWS_RANKS = ["--no-python", "sh", "-c", 'echo "RANK $RANK LOCAL_RANK $LOCAL_RANK"; exec "$0" "$@"', sys.executable]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> list[Host]:
    try:
        with two_hosts(tmp_path_factory.mktemp("two_hosts")) as pair:
            yield pair
    except NotPermitted as error:
        pytest.skip(f"two hosts need network namespaces, which this machine refuses: {error}")


def start(hosts: list[Host], shards: Path, name: str, *flags: str, before=(), interfaces=(None, None)) -> list[Run]:
    """Starts the same command on both hosts, with the run directory `name` on each host's disk."""
    port = next(PORTS)
    arguments = [*before, str(ROOT / "engine" / "train.py"), *SMALL, "--data", str(shards), *STEPS, *flags]
    return [
        host.start(port, *arguments, "--out", str(host.runs / name), interface=interface)
        for host, interface in zip(hosts, interfaces, strict=True)
    ]


def wait_for_checkpoint_after(step: int, out: Path, started: list[Run]) -> None:
    """Waits for a checkpoint of a later step, at most a minute. Returns early if a launcher ends."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(run.launcher.poll() is None for run in started):
        if any(int(path.name.removeprefix("step_")) > step for path in (out / "checkpoints").glob("step_*")):
            return
        time.sleep(0.005)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def assert_says_what_to_do(run: Run, peer: int) -> None:
    """Asserts a sentence with the peer's rank or address and advice, no traceback, and exit code 4."""
    output = run.worker_output()
    assert re.search(rf"{re.escape(ADDRESSES[peer])}|rank {peer}\b", output), output
    assert HINT.search(output), output
    assert "Traceback" not in output
    assert re.search(r"exitcode *: 4 ", run.launcher_output()), run.launcher_output()


@pytest.fixture(scope="module")
def quiet(hosts, shards) -> list[Run]:
    """An undisturbed run on both hosts."""
    started = start(hosts, shards, "quiet", before=SHOWS_RANKS)
    assert wait(started, 120) == [0, 0], "".join(run.worker_output() for run in started)
    return started


@pytest.fixture(scope="module")
def cut(hosts, shards) -> tuple[list[Run], list[int]]:
    """A run whose link is cut after its first checkpoint, and the launchers' exit codes."""
    started = start(hosts, shards, "disturbed", "--timeout-minutes", "0.15")
    wait_for_checkpoint_after(0, hosts[0].disk / "disturbed", started)
    hosts[1].set_link("down")
    try:
        return started, wait(started, 45)
    finally:
        hosts[1].set_link("up")


@pytest.fixture(scope="module")
def lost(hosts, shards, cut) -> tuple[list[Run], int, int]:
    """The `cut` run resumed, the first host's exit code, and the step that it resumed from.

    The second host is killed after a further checkpoint.
    """
    before = step_of(newest(hosts[0].disk / "disturbed"))
    started = start(hosts, shards, "disturbed", "--timeout-minutes", "0.15")
    wait_for_checkpoint_after(before, hosts[0].disk / "disturbed", started)
    started[1].kill()
    return started, wait(started[:1], 45)[0], before


@pytest.mark.slow
def test_ranks_count_over_hosts_and_local_ranks_on_each(quiet):
    assert "RANK 0 LOCAL_RANK 0\n" in quiet[0].worker_output()
    assert "RANK 1 LOCAL_RANK 0\n" in quiet[1].worker_output()


@pytest.mark.slow
def test_two_hosts_follow_one_process_s_loss_curve(hosts, quiet, shards, tmp_path):
    assert train(tmp_path / "one", shards, *STEPS) == 0
    rows = [metrics.read_rows(out / "metrics.jsonl") for out in (tmp_path / "one", hosts[0].disk / "quiet")]
    for one, two in zip(*rows, strict=True):
        for name in ("loss", "val_loss"):
            assert one.get(name) == pytest.approx(two.get(name), abs=1e-4)  # after 120 steps


@pytest.mark.slow
def test_only_the_first_host_writes(hosts, quiet):
    assert not list((hosts[1].disk).rglob("*"))


@pytest.mark.slow
def test_a_cut_link_ends_both_hosts_and_each_says_what_to_do(hosts, cut):
    started, codes = cut
    assert 0 not in codes
    assert step_of(newest(hosts[0].disk / "disturbed")) < 120
    for run, peer in zip(started, (1, 0), strict=True):
        assert_says_what_to_do(run, peer)


@pytest.mark.slow
def test_a_lost_host_ends_the_other_which_says_what_to_do(hosts, lost):
    started, code, _ = lost
    assert code != 0
    assert step_of(newest(hosts[0].disk / "disturbed")) < 120
    assert_says_what_to_do(started[0], 1)


@pytest.mark.slow
def test_the_same_command_goes_on_from_the_disk_of_the_first_host(hosts, lost):
    started, _, before = lost
    assert re.search(rf"going on from \S*step_{before:08d}", started[0].worker_output()), started[0].worker_output()
    assert step_of(newest(hosts[0].disk / "disturbed")) > before


@pytest.mark.slow
def test_after_a_cut_link_and_a_lost_host_the_same_command_ends_where_a_quiet_run_does(hosts, quiet, lost, shards):
    started = start(hosts, shards, "disturbed")
    assert wait(started, 120) == [0, 0], "".join(run.worker_output() for run in started)
    assert_same_run(hosts[0].disk / "quiet", hosts[0].disk / "disturbed")
    steps = [row["step"] for row in measured(hosts[0].disk / "disturbed")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_wrong_interface_is_answered_with_the_variable_to_set(hosts, shards):
    started = start(hosts, shards, "wrong", "--timeout-minutes", "0.05", interfaces=("lo", "doesnotexist"))
    codes = wait(started, 60)
    assert 0 not in codes
    for run in started:
        assert "GLOO_SOCKET_IFNAME" in run.worker_output()
        assert "Traceback" not in run.worker_output()


def test_nothing_stays_behind(tmp_path):
    try:
        with two_hosts(tmp_path) as pair:
            raise KeyError
    except NotPermitted as error:
        pytest.skip(f"two hosts need network namespaces, which this machine refuses: {error}")
    except KeyError:
        pass
    assert all(host.init.poll() is not None for host in pair)
    mounts = subprocess.run(["mount"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in mounts
