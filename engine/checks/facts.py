"""What is remembered from one run to the next: where, and the facts that it depends on with their
digest: device, driver, versions and code.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]  # where the packages lie
NAMED = ("model name", "flags")  # lines of /proc/cpuinfo that tell what compiled code a CPU can run


def machine(device: torch.device) -> dict[str, str]:
    """Names of the device and its driver, and the versions of what compiles for it."""
    facts = {name: _version(name) for name in ("torch", "triton")}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return facts | {"device": f"{gpu.name} sm_{gpu.major}{gpu.minor}", "driver": _driver()}
    return facts | {"device": _cpu(), "driver": platform.platform()}


def code(*packages: str) -> str:
    """Digest of every source file of these packages."""
    total = hashlib.sha256()
    for path in sorted(path for package in packages for path in (ROOT / package).rglob("*.py")):
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
    with suppress(FileNotFoundError):
        return path.read_bytes()
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


def _driver() -> str:
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return str(torch.version.hip or torch.version.cuda)


def _cpu() -> str:
    lines = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    return " ".join(lines.get(name, "") for name in NAMED) or platform.processor() or platform.machine()
