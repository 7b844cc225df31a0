"""What is remembered from one run to the next: where, and the facts that it depends on with their
digest: device, driver, versions and code.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
from contextlib import suppress
from pathlib import Path

import torch

from engine.device import is_nvidia, name
from model.files import BadFile, read

ROOT = Path(__file__).resolve().parents[2]  # where the packages lie
NVIDIA_VERSION = "/proc/driver/nvidia/version"


def machine(device: torch.device) -> dict[str, str]:
    """Names of the device and its driver, and the versions of what compiles for it."""
    facts = {"device": device_name(device), "driver": _driver(device)}
    facts |= {name: _version(name) for name in ("torch", "triton")}
    if device.type == "cpu":  # what compiled code it can run
        facts["instructions"] = hashlib.sha256(_cpuinfo("flags").encode()).hexdigest()[:8]
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and its number of cores."""
    if device.type != "cpu":
        return name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpuinfo('model name') or platform.machine()}, {cores} core{'s' * (cores != 1)}"


def code(*patterns: str) -> str:
    """Digest of every source file that matches one of these patterns, such as "kernels/*.py"."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        total.update(path.read_bytes())
    return total.hexdigest()


def key(facts: dict) -> str:
    """Digest of facts of JSON types, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cache_directory() -> Path:
    """This user's directory for what is remembered. It need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "gpt2-engine"


def secret() -> bytes:
    """This user's key, by which a file that this user wrote is told from any other. Made at first use.

    Raises OSError if it can be neither read nor made.
    """
    path = cache_directory() / "secret"
    try:
        return read(path, 1 << 10)
    except FileNotFoundError:
        pass
    except BadFile as error:
        raise OSError(f"{path} is {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".secret.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
    with suppress(FileExistsError):  # another process was first: its key counts
        os.link(temporary, path)
    temporary.unlink()
    return path.read_bytes()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver(device: torch.device) -> str:
    with suppress(OSError):
        if is_nvidia(device) and (found := re.search(r"\d+\.\d+(\.\d+)*", Path(NVIDIA_VERSION).read_text())):
            return found[0]
    if device.type == "mps":
        return f"macOS {platform.mac_ver()[0]}"
    return "none" if device.type == "cpu" else str(torch.version.hip or torch.version.xpu or torch.version.cuda)


def _cpuinfo(name: str) -> str:
    """A line's value in /proc/cpuinfo, of the first core; empty where there is none."""
    with suppress(OSError):
        if found := re.search(rf"^{name}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return ""
