"""Two hosts on one machine: network, mount and process namespaces joined by a veth pair, and torchrun on each.

A host has an address, an interface and a disk of its own: both see the directory `runs`, each finds its own disk there.
One process per host holds everything and ends with the tests, so nothing stays behind.
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
    """This machine does not let us make namespaces; the message is its own."""


@dataclass(frozen=True)
class Run:
    """torchrun on one host."""

    launcher: subprocess.Popen
    logs: Path

    def worker_said(self) -> str:
        """What the training process wrote: without torchrun's own report, which always holds a traceback."""
        return "".join(path.read_text() for path in sorted(self.logs.rglob("std*.log")))

    def launcher_said(self) -> str:
        """What torchrun itself wrote."""
        return (self.logs / "torchrun.log").read_text()

    def kill(self) -> None:
        """Everything that this torchrun started, and itself, is gone at once."""
        self.launcher.kill()
        self.launcher.wait()


@dataclass(frozen=True)
class Host:
    """One of the two."""

    index: int
    init: subprocess.Popen  # whose namespaces are this host
    runs: Path  # where a run on this host writes
    disk: Path  # where the tests find what it wrote

    def command(self, *words: str) -> list[str]:
        """A command line that runs on this host."""
        namespaces = ["--user", "--preserve-credentials", "--net", "--mount"]
        return ["nsenter", f"--target={self.init.pid}", *namespaces, "--", *words]

    def set_link(self, state: str) -> None:
        """Takes this host's end of the cable up or down."""
        subprocess.run(self.command("ip", "link", "set", INTERFACES[self.index], state), check=True)

    def start(self, port: int, *words: str, interface: str | None = None) -> Run:
        """Starts torchrun with these words, in a process namespace that ends with it."""
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
                self.command("unshare", "--pid", "--kill-child", *torchrun, *words),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return Run(launcher, logs)


def wait(started: list[Run], seconds: float) -> list[int]:
    """Exit codes. Kills what has not ended after so many seconds, and raises TimeoutExpired with what was said."""
    deadline = time.monotonic() + seconds
    try:
        return [run.launcher.wait(max(0.0, deadline - time.monotonic())) for run in started]
    except subprocess.TimeoutExpired as error:
        error.add_note("\n".join(run.worker_said() + run.launcher_said() for run in started))
        raise
    finally:
        for run in started:
            run.kill()


@contextmanager
def two_hosts(root: Path) -> Iterator[list[Host]]:
    """Both hosts, joined, with their disks in `root`. Raises NotPermitted where a namespace or the cable is refused."""
    runs = root / "runs"
    runs.mkdir()
    hosts: list[Host] = []
    try:
        for index in range(2):
            disk = root / f"disk{index}"
            disk.mkdir()
            # The second host is made inside the first one's user namespace, so that the cable may reach into it.
            outside = hosts[0].command() if hosts else ["unshare", "--user", "--map-root-user"]
            setup = f"mount --bind '{disk}' '{runs}' && ip link set lo up && echo ready && exec cat"
            init = subprocess.Popen(
                [*outside, "unshare", "--net", "--mount", "sh", "-c", setup],
                stdin=subprocess.PIPE,  # cat ends when this end is closed, by us or by our death
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            hosts.append(Host(index, init, runs, disk))
            said = init.stdout.readline()
            if said != "ready\n":
                raise NotPermitted(said.strip() or "unshare ended without a word")
        _join(hosts)
        yield hosts
    except OSError as error:  # unshare, nsenter or ip is not installed
        raise NotPermitted(str(error)) from error
    finally:
        for host in hosts:
            host.init.communicate()


def _join(hosts: list[Host]) -> None:
    cable = f"ip link add {INTERFACES[0]} type veth peer name {INTERFACES[1]} netns {hosts[1].init.pid}"
    addresses = [f"ip address add {ADDRESSES[h.index]}/24 dev {INTERFACES[h.index]}" for h in hosts]
    links = [f"ip link set {INTERFACES[h.index]} up" for h in hosts]
    for host, line in zip([hosts[0], *hosts, *hosts], [cable, *addresses, *links], strict=True):
        done = subprocess.run(host.command(*line.split()), capture_output=True, text=True)
        if done.returncode:
            raise NotPermitted(f"{line}: {done.stderr.strip()}")
