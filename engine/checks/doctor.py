"""The report of `gpt2 doctor`: what this machine has, and what each op runs on here and why."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable

import torch

from engine import output
from engine.device import COMPUTE_DTYPES, HAS_STREAMS, choose_precision, cpu_memory_bytes, current, is_nvidia, name
from kernels.dispatch import Ops, has_c_compiler, select


def report(
    head_dim: int,
    asked_precision: str,
    recall: Callable[[str, Ops], dict[str, str] | None],
    tuned: dict[str, str] | None = None,
    about_tuned: str = "",
) -> str:
    """What this machine has, and which implementation of each op runs here and why. Starts and
    writes nothing.

    asked_precision: as for gpt2 train. recall: failures that the self-check of ops in a precision
    found, or None if there was none. tuned: op -> implementation, from `gpt2 tune`; about_tuned: its
    file in words. Raises BadInput if this machine cannot do it.
    """
    device = current()
    precision, why = choose_precision(asked_precision, device, "doctor")
    ops = select("auto", device, COMPUTE_DTYPES[precision], head_dim, tuned=tuned)
    failed = recall(precision, ops)
    if failed:
        ops = select("auto", device, COMPUTE_DTYPES[precision], head_dim, tuned=tuned, failed=failed)
    memory = cpu_memory_bytes()
    facts = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in ("torch", "triton")),
        (
            "processor",
            f"{os.cpu_count()} cores, "
            + ("memory unknown" if memory is None else f"{memory / 2**30:.1f} GiB of memory"),
        ),
        *_gpus(),
        ("C compiler", "found" if has_c_compiler() else "none: neither Triton nor torch.compile can run"),
        ("disk", f"{shutil.disk_usage('.').free / 1e9:,.0f} GB free here"),
        ("precision", f"{precision}: {why}"),
        ("tuned", about_tuned or f"no, {output.program()} tune finds what is fastest here"),
        ("self-check", _self_check(failed, [choice.implementation for choice in ops.choices])),
    ]
    lines = [f"{name:<21} {text}" for name, text in facts]
    return "\n".join([*lines, "", f"ops at head_dim {head_dim}, {precision}", ops.explain()])


def _self_check(failed: dict[str, str] | None, implementations: list[str]) -> str:
    if failed:
        return f"failed: {', '.join(failed)}"
    if "triton" not in implementations:
        return "none needed: no op runs on Triton"
    return "not made yet, gpt2 train makes it" if failed is None else "passed"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[tuple[str, str]]:
    kind = current().type
    if kind not in HAS_STREAMS:
        return [("GPU", "no CUDA device" if kind == "cpu" else f"{name(current())}, on {kind}")]
    lines = []
    for index in range(torch.accelerator.device_count()):
        gpu = torch.get_device_module(kind).get_device_properties(index)
        named = f"sm_{gpu.major}{gpu.minor}" if is_nvidia(torch.device(kind)) else getattr(gpu, "gcnArchName", kind)
        lines.append((f"GPU {index}", f"{gpu.name}, {named.partition(':')[0]}, {gpu.total_memory / 2**30:.0f} GiB"))
    return lines
