"""What every figure in bench/ carries: the machine, the versions, the commit; and how peak memory is read.

Free of PyTorch until a device is asked for, so that programs that only read results start at once.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"  # RESULTS / slug() holds what was measured on this machine
PACKAGES = ("torch", "triton", "transformers", "numpy", "tiktoken")


def commit() -> str:
    """The commit of this working tree, with "+ changes" if there are any, or "not known"."""
    try:
        git = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return git[0].strip() + (" + changes" if git[1].strip() else "")


def version(package: str) -> str:
    """An installed package's version, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cpu() -> str:
    """The CPU's name, with its generation where the name alone hides it."""
    fields = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if name == "AMD EPYC":  # a virtual machine's; family 25 with a model below 16 is Milan, 16 and on Genoa
        name += {("25", True): " Milan", ("25", False): " Genoa"}.get(
            (fields.get("cpu family", ""), int(fields.get("model", "0")) < 16), ""
        )
    return re.sub(r"\((R|TM)\)|@.*| CPU", "", name).strip()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name(device: "torch.device | str" = "cpu") -> str:
    """The machine in a few words, such as "2 cores of an AMD EPYC Milan" or "NVIDIA H200"."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    article = "an" if cpu()[:1] in "AEIOaeio" else "a"
    return f"{cores()} core{'s' if cores() > 1 else ''} of {article} {cpu()}"


def slug(device: "torch.device | str" = "cpu") -> str:
    """The name of this machine's directory in bench/results."""
    words = name(device) if str(device).startswith("cuda") else f"{cpu()} {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def facts(device: "torch.device | str" = "cpu") -> dict[str, str]:
    """Machine, versions, commit and command, for the head of a JSON file of results."""
    import shlex
    import time

    return {
        "machine": name(device),
        "cpu": cpu(),
        "cores": str(cores()),
        "system": platform.system() + " " + platform.release(),
        "python": sys.version.split()[0],
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


@dataclass
class Peak:
    """Memory of a region in bytes: the most while it ran, and what was held when it began."""

    before: int = 0
    most: int = 0

    @property
    def above(self) -> int:
        """What the region took beside what was there."""
        return self.most - self.before


@contextlib.contextmanager
def peak_memory(device: "torch.device | str" = "cpu") -> Iterator[Peak]:
    """Fills a Peak when the region ends: allocated memory on a GPU, resident memory of this process on Linux.

    On a GPU it waits for the device. Elsewhere, where the kernel cannot be asked, both numbers stay 0.
    """
    peak = Peak()
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        peak.before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.most = torch.cuda.max_memory_allocated()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        peak.before = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.most = _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])
