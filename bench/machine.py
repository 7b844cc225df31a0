"""Facts that every result carries: machine, versions, commit, command. Imports PyTorch only where a GPU is named."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

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
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "none"


def cpu() -> str:
    """The CPU's name, with its generation where the name alone hides it."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
        fields = {name.strip(): value.strip() for name, _, value in pairs}
    name = fields.get("model name") or platform.processor() or platform.machine()
    if name == "AMD EPYC" and fields.get("cpu family") == "25":  # a virtual machine's: models below 16 are Milan
        name += " Milan" if int(fields.get("model", "0")) < 16 else " Genoa"
    return re.sub(r"\((R|TM)\)|@.*| CPU", "", name).strip()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name(device: str = "cpu") -> str:
    """The machine in a few words, such as "2 cores of an AMD EPYC Milan" or "NVIDIA H200"."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    article = "an" if cpu()[:1] in "AEIOaeio" else "a"
    return f"{cores()} core{'s' if cores() > 1 else ''} of {article} {cpu()}"


def slug(device: str = "cpu") -> str:
    """The name of this machine's directory in bench/results."""
    words = name(device) if device.startswith("cuda") else f"{cpu()} {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def facts(device: str = "cpu") -> dict[str, str]:
    """Machine, versions, commit, command and date."""
    return {
        **{"machine": name(device), "cpu": cpu(), "cores": str(cores())},
        **(_gpu_facts() if device.startswith("cuda") else {}),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _gpu_facts() -> dict[str, str]:
    import torch

    from engine.checks.facts import machine

    gpu, driver = torch.cuda.get_device_properties(0), machine(torch.device("cuda"))["driver"]
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return {"gpu": gpu.name, "memory": memory, "driver": driver, "cuda": str(torch.version.cuda)}
