"""Two hosts on one machine: network, mount and process namespaces joined by a veth pair, and torchrun on each.

A host has its own address, interface and disk. Both have a directory `runs`, on which each mounts its own disk.
One process per host keeps its namespaces open. It ends with the tests, so nothing is left behind.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACES = ("veth0", "veth1")


class NotPermitted(Exception):
    """Raised if this machine does not allow namespaces. The message is the system's."""


@dataclass(frozen=True)
class Run:
    """torchrun on one host."""

    launcher: subprocess.Popen
    logs: Path

    def worker_output(self) -> str:
        """Output of the training process, without torchrun's report, which always has a traceback."""
        return "".join(path.read_text() for path in sorted(self.logs.rglob("std*.log")))

    def launcher_output(self) -> str:
        """Output of torchrun itself."""
        return (self.logs / "torchrun.log").read_text()

    def kill(self) -> None:
        """Kills torchrun and everything that it started."""
        self.launcher.kill()
        self.launcher.wait()


@dataclass(frozen=True)
class Host:
    """One of the two hosts."""

    index: int
    init: subprocess.Popen  # holds the namespaces of this host
    runs: Path  # where a run on this host writes
    disk: Path  # where the tests find what it wrote

    def command(self, *arguments: str) -> list[str]:
        """Command line that runs on this host."""
        namespaces = ["--user", "--preserve-credentials", "--net", "--mount"]
        return ["nsenter", f"--target={self.init.pid}", *namespaces, "--", *arguments]

    def set_link(self, state: str) -> None:
        """Sets this host's end of the link up or down."""
        subprocess.run(self.command("ip", "link", "set", INTERFACES[self.index], state), check=True)

    def start(self, port: int, *arguments: str, interface: str | None = None) -> Run:
        """Starts torchrun with these arguments, in a process namespace that ends with it."""
        logs = self.disk.parent / f"logs{self.index}_{port}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        torchrun += [f"--node_rank={self.index}", f"--master_addr={ADDRESSES[0]}", f"--master_port={port}"]
        torchrun += [f"--log-dir={logs}", "--redirects=3"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": interface or INTERFACES[self.index],
        }
        logs.mkdir()
        with (logs / "torchrun.log").open("w") as log:
            launcher = subprocess.Popen(
                self.command("unshare", "--pid", "--kill-child", *torchrun, *arguments),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return Run(launcher, logs)


def wait(started: list[Run], seconds: float) -> list[int]:
    """Exit codes of the launchers.

    Kills those that have not ended after `seconds` and raises TimeoutExpired with their output.
    """
    deadline = time.monotonic() + seconds
    try:
        return [run.launcher.wait(max(0.0, deadline - time.monotonic())) for run in started]
    except subprocess.TimeoutExpired as error:
        error.add_note("\n".join(run.worker_output() + run.launcher_output() for run in started))
        raise
    finally:
        for run in started:
            run.kill()


@contextmanager
def two_hosts(root: Path) -> Iterator[list[Host]]:
    """Both hosts, linked, with their disks in `root`. Raises NotPermitted if a namespace or link is refused."""
    runs = root / "runs"
    runs.mkdir()
    hosts: list[Host] = []
    try:
        for index in range(2):
            disk = root / f"disk{index}"
            disk.mkdir()
            # The second host is made inside the first one's user namespace, so that the link can reach into it.
            outside = hosts[0].command() if hosts else ["unshare", "--user", "--map-root-user"]
            setup = f"mount --bind '{disk}' '{runs}' && ip link set lo up && echo ready && exec cat"
            init = subprocess.Popen(
                [*outside, "unshare", "--net", "--mount", "sh", "-c", setup],
                stdin=subprocess.PIPE,  # cat ends when this end closes, also if this process is killed
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            hosts.append(Host(index, init, runs, disk))
            line = init.stdout.readline()
            if line != "ready\n":
                raise NotPermitted(line.strip() or "unshare ended without a word")
        _link(hosts)
        yield hosts
    except OSError as error:  # unshare, nsenter or ip is not installed
        raise NotPermitted(str(error)) from error
    finally:
        for host in hosts:
            host.init.communicate()


def _link(hosts: list[Host]) -> None:
    cable = f"ip link add {INTERFACES[0]} type veth peer name {INTERFACES[1]} netns {hosts[1].init.pid}"
    addresses = [f"ip address add {ADDRESSES[h.index]}/24 dev {INTERFACES[h.index]}" for h in hosts]
    links = [f"ip link set {INTERFACES[h.index]} up" for h in hosts]
    for host, line in zip([hosts[0], *hosts, *hosts], [cable, *addresses, *links], strict=True):
        done = subprocess.run(host.command(*line.split()), capture_output=True, text=True)
        if done.returncode:
            raise NotPermitted(f"{line}: {done.stderr.strip()}")
