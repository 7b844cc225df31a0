"""The report of `gpt2 doctor`: what this machine has, and what each op runs on here and why.

One list of facts is printed as text and as JSON. A fact that cannot be found out says so.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import device as devices
from engine import output, packages
from engine.checks import facts, network, scratch
from engine.checks.selfcheck import Unavailable
from engine.device import (
    COMPUTE_DTYPES,
    HAS_STREAMS,
    choose_precision,
    cpu_memory_bytes,
    current,
    format_bytes,
    is_nvidia,
)
from engine.errors import BadInput
from engine.tokens import tokenizer
from kernels.dispatch import Ops, select
from model.files import read

LABEL = 22  # columns in front of a fact's text
LISTS = ("gpus", "caches", "disks", "interfaces")  # keys of which there may be several facts
MOST_FILES = 50_000  # of a cache whose size is summed


class Fact(NamedTuple):
    """One line of the report."""

    label: str
    text: str
    key: str  # in JSON
    value: Any  # of JSON types; None if it is not known


class Report(NamedTuple):
    """Facts about this machine, and the ops at one width of heads."""

    facts: list[Fact]
    head_dim: int
    precision: str
    ops: Ops
    failed: dict[str, str] | None  # op -> why its self-check failed; None: not made

    def text(self, columns: int | None = None) -> str:
        """The report in lines, folded at so many columns."""
        lines = [f"{fact.label:<{LABEL}}{fact.text}" for fact in self.facts]
        lines += ["", f"ops at head_dim {self.head_dim}, {self.precision}", *self.ops.explain().splitlines()]
        if columns is None:
            return "\n".join(lines)
        fold = textwrap.TextWrapper(
            max(columns, 2 * LABEL), subsequent_indent=" " * LABEL, break_long_words=False, break_on_hyphens=False
        )
        return "\n".join(map(fold.fill, lines))

    def as_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        found: dict[str, Any] = {key: [] for key in LISTS}
        for fact in self.facts:
            if fact.key not in LISTS:
                found[fact.key] = fact.value
            elif fact.value is not None:
                found[fact.key] += fact.value if isinstance(fact.value, list) else [fact.value]
        ops = [
            {"op": each.op, "implementation": each.implementation, "reason": each.reason} for each in self.ops.choices
        ]
        return found | {"head_dim": self.head_dim, "ops": ops}


def report(
    head_dim: int,
    asked_precision: str,
    recall: Callable[[str, Ops], dict[str, str] | None],
    tuned: dict[str, str] | None = None,
    about_tuned: str = "",
    out: str | None = None,
    is_new: bool = False,
) -> Report:
    """What this machine has, and which implementation of each op runs here and why. Writes nothing.

    asked_precision: as for gpt2 train. recall: failures that the self-check of ops in a precision
    found, or None if there was none; is_new: it makes the check now. tuned: op -> implementation,
    from `gpt2 tune`; about_tuned: its file in words. out: a run directory, for its disk. Raises
    BadInput if this machine cannot do it.
    """
    device = current()
    precision, why = choose_precision(asked_precision, device, "doctor")
    ops = select("auto", device, COMPUTE_DTYPES[precision], head_dim, tuned=tuned)
    failed, check = _checked(recall, precision, ops, is_new)
    if failed:
        ops = select("auto", device, COMPUTE_DTYPES[precision], head_dim, tuned=tuned, failed=failed)
    known = about_tuned or f"no, {output.program()} tune finds what is fastest here"
    found = [
        *_machine(device),
        *_each("cache", "caches", _caches),
        *_each("disk", "disks", lambda: _disks(out)),
        *_each("network", "interfaces", _interfaces),
        *_each("Gloo", "gloo", lambda: [_taken("Gloo", network.gloo)]),
        *(_each("NCCL", "nccl", lambda: [_taken("NCCL", network.nccl)]) if device.type == "cuda" else []),
        *_each("tokenizer", "tokenizer", _tokenizer),
        *_each("packages", "packages", _packages),
        Fact("precision", f"{precision}: {why}", "precision", {"name": precision, "why": why}),
        Fact("tuned", known, "tuned", known),
        Fact("self-check", check, "self_check", {"text": check, "failed": failed}),
    ]
    return Report(found, head_dim, precision, ops, failed)


def _checked(recall: Callable, precision: str, ops: Ops, is_new: bool) -> tuple[dict[str, str] | None, str]:
    """(failures, or None if no check was made; the self-check in words)."""
    if not any(choice.implementation == "triton" for choice in ops.choices):
        return None, "none needed: no op runs on Triton"
    began = time.monotonic()
    try:
        failed = recall(precision, ops)
    except Unavailable as error:
        raise BadInput(f"doctor: --check needs a GPU that a new process can use, got: {error}; free it") from error
    if failed:
        return failed, f"failed: {', '.join(failed)}"
    if is_new:
        return failed, f"passed, made now in {time.monotonic() - began:.0f} s"
    return failed, "not made yet, gpt2 train makes it; --check makes it now" if failed is None else "passed"


def _each(label: str, key: str, find: Callable[[], list[Fact]]) -> list[Fact]:
    """The facts that `find` finds, or one that says why they are not known."""
    try:
        return find()
    except Exception as error:  # a machine nobody has seen: the other facts still count
        return [Fact(label, f"unknown: {type(error).__name__}: {error}"[:300], key, None)]


# ---- Hardware and software ----------------------------------------------------------------------------------------


def _machine(device: torch.device) -> list[Fact]:
    system = {"version": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    return [
        Fact("python", f"{system['version']} on {system['system']} {system['machine']}", "python", system),
        *(Fact(name, _version(name), name, _version(name)) for name in ("torch", "triton", "gigatoken")),
        *_each("processor", "processor", _processor),
        *(Fact(label, text, "gpus", None if device.type == "cpu" else text) for label, text in _gpu_lines()),
        *_each("GPU software", "gpu_software", lambda: _gpu_software(device)),
        *_each("C compiler", "c_compiler", _c_compiler),
        *_each("C++ compiler", "cxx_compiler", _cxx_compiler),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> list[Fact]:
    memory, cores = cpu_memory_bytes(), os.cpu_count()
    text = "memory unknown" if memory is None else f"{memory / 2**30:.1f} GiB of memory"
    return [Fact("processor", f"{cores} cores, {text}", "processor", {"cores": cores, "memory_bytes": memory})]


def _gpu_lines() -> list[tuple[str, str]]:
    try:
        return _gpus()
    except Exception as error:  # what a driver raises has many types
        return [("GPU", f"unknown: {type(error).__name__}: {error}"[:300])]


def _gpus() -> list[tuple[str, str]]:
    kind = current().type
    if kind not in HAS_STREAMS:
        return [("GPU", "no CUDA device" if kind == "cpu" else f"{devices.name(current())}, on {kind}")]
    lines = []
    for index in range(torch.accelerator.device_count()):
        gpu = torch.get_device_module(kind).get_device_properties(index)
        named = f"sm_{gpu.major}{gpu.minor}" if is_nvidia(torch.device(kind)) else getattr(gpu, "gcnArchName", kind)
        lines.append((f"GPU {index}", f"{gpu.name}, {named.partition(':')[0]}, {gpu.total_memory / 2**30:.0f} GiB"))
    return lines


def _gpu_software(device: torch.device) -> list[Fact]:
    """Versions of driver and libraries, or what is missing for a GPU."""
    label, key = "GPU software", "gpu_software"
    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    found = {name: version for name, version in built.items() if version}
    if device.type != "cpu":
        found["driver"] = facts.machine(device)["driver"]
    with suppress(Exception):  # each is missing in some builds
        if (cudnn := torch.backends.cudnn.version()) is not None:
            found["cuDNN"] = str(cudnn)
    with suppress(Exception):
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if found:
        return [Fact(label, ", ".join(f"{name} {version}" for name, version in found.items()), key, found)]
    is_driver_there = os.path.exists(facts.NVIDIA_VERSION)
    note = "; an NVIDIA driver is here: install PyTorch with CUDA" if is_driver_there else ""
    return [Fact(label, f"none: this PyTorch is built for a CPU{note}", key, found)]


def _c_compiler() -> list[Fact]:
    """The compiler that Triton takes: see kernels.dispatch.has_c_compiler."""
    named = os.environ.get("CC")
    paths = [shutil.which(name) for name in (["clang", "gcc"] if named is None else [named])]
    path = next((path for path in paths if path is not None), None)
    missing = "none: Triton cannot run, nor torch.compile on a GPU"
    return [Fact("C compiler", path or missing, "c_compiler", path)]


def _cxx_compiler() -> list[Fact]:
    """The compiler that torch.compile takes on a CPU: see engine.device.compile_obstacle."""
    path = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    return [Fact("C++ compiler", path or "none: torch.compile cannot run on a CPU", "cxx_compiler", path)]


# ---- Caches and disks ---------------------------------------------------------------------------------------------


def _cache_paths() -> dict[str, Path]:
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    found = {
        "gpt2-engine": facts.cache_directory(),
        "Triton": Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")),
    }
    with suppress(OSError):  # where no temporary directory can be written
        found["Inductor"] = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or scratch.inductor_folder())
        found["temporary"] = Path(tempfile.gettempdir())
    return found


def _caches() -> list[Fact]:
    """Where compiled code and results are kept, how much there is, and whether this user may write there."""
    found = []
    for name, path in _cache_paths().items():
        size, is_whole = (None, True) if name == "temporary" else _size(path)  # others' files are in that one
        is_writable = os.access(_nearest(path), os.W_OK | os.X_OK)
        much = "" if size is None else f", {'' if is_whole else 'at least '}{format_bytes(size)}"
        text = f"{name}: {path}{much}" + ("" if is_writable else ", which cannot be written")
        value = {"name": name, "path": str(path), "bytes": size, "is_writable": is_writable}
        found.append(Fact("cache", text, "caches", value))
    if "temporary" not in _cache_paths():
        found.append(Fact("cache", "temporary: no directory that can be written", "caches", None))
    return found


def _size(path: Path) -> tuple[int, bool]:
    """(bytes of the files below a directory, whether all were seen). What cannot be read counts nothing."""
    total = count = 0
    for folder, _, names in os.walk(path):
        for name in names:
            count += 1
            if count > MOST_FILES:
                return total, False
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total, True


def _disks(out: str | None) -> list[Fact]:
    """Free bytes of the disks of this directory, of the caches, and of `out`."""
    places = {"here": Path(".")} | {f"for the cache of {name}": path for name, path in _cache_paths().items()}
    if out is not None:
        places = {"here": places.pop("here"), f"for --out {out}": Path(out), **places}
    found, seen = [], set()
    for what, path in places.items():
        near = _nearest(path)
        if (disk := os.stat(near).st_dev) in seen and not what.startswith("for --out"):
            continue
        seen.add(disk)
        free = shutil.disk_usage(near).free
        value = {"path": str(path), "free_bytes": free}
        found.append(Fact("disk", f"{free / 1e9:,.0f} GB free {what}", "disks", value))
    return found


def _nearest(path: Path) -> Path:
    """The nearest of a path and its parents that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))


# ---- Network ------------------------------------------------------------------------------------------------------


def _interfaces() -> list[Fact]:
    """A line for each interface with an address, and one for the others."""
    found = network.interfaces()
    lines = [Fact("network", str(each), "interfaces", each._asdict()) for each in found if each.addresses]
    if rest := [each for each in found if not each.addresses]:
        names = ", ".join(each.name for each in rest[:8]) + (f" and {len(rest) - 8} more" if len(rest) > 8 else "")
        lines.append(Fact("network", f"without an address: {names}", "interfaces", [each._asdict() for each in rest]))
    return lines or [Fact("network", "no interface", "interfaces", None)]


def _taken(label: str, of: Callable) -> Fact:
    text, names = of(network.interfaces(), os.environ)
    return Fact(label, text, label.lower(), {"interfaces": names, "why": text})


# ---- This package -------------------------------------------------------------------------------------------------


def _tokenizer() -> list[Fact]:
    """Whether GPT-2's vocabulary in this package is the released one."""
    digest = hashlib.sha256(read(tokenizer.VOCABULARY)).hexdigest()
    is_released = digest == tokenizer.VOCABULARY_SHA256
    text = "GPT-2's as released" if is_released else "not GPT-2's as released: install the package again"
    value = {"sha256": digest, "is_released": is_released}
    return [Fact("tokenizer", f"{text}, sha256 {digest[:12]}...", "tokenizer", value)]


def _packages() -> list[Fact]:
    """Where our packages lie, and others of the same names that they hide."""
    others = [str(path) for path in packages.strangers()]
    text = f"kernels and model are those in {packages.ROOT}"
    if others:
        text += f"; hidden by ours: {', '.join(others)}"
    return [Fact("packages", text, "packages", {"path": str(packages.ROOT), "hidden": others})]
