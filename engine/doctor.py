"""What this machine has, and what each op of the model will run on here, with the reason.

Nothing is started and nothing is written: it is safe beside a running job.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shadow() -> str | None:
    """A sentence if `import kernels` or `import model` would bring somebody else's package, or None."""
    for name in ("kernels", "model"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != ROOT / name:
            return (
                f"doctor: `import {name}` must find {ROOT / name}, got {found or 'nothing'}; another package of this "
                f"name is installed or comes first on the path: uninstall it, or run from {ROOT}"
            )
    return None


def report(head_dim: int, precision: str) -> str:
    """The whole report. precision: as for gpt2 train. Raises BadInput if this machine cannot do it."""
    import torch

    from engine import precision as precisions
    from kernels.dispatch import has_c_compiler, select

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, why = precisions.choose(precision, device)
    ops = select("auto", device, precisions.COMPUTE_DTYPES[chosen], head_dim)
    facts = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in ("torch", "triton")),
        ("processor", f"{os.cpu_count()} cores, {_memory()}"),
        *_gpus(),
        ("C compiler", "found" if has_c_compiler() else "none: neither Triton nor torch.compile can run"),
        ("disk", f"{shutil.disk_usage('.').free / 1e9:,.0f} GB free here"),
        ("precision", f"{chosen}: {why}"),
    ]
    lines = [f"{name:<21} {text}" for name, text in facts]
    return "\n".join([*lines, "", f"ops at head_dim {head_dim}, {chosen}", ops.explain()])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB of memory"
    except (AttributeError, ValueError):  # not Linux
        return "memory unknown"


def _gpus() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return [("GPU", "no CUDA device")]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        (f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
        for index, gpu in enumerate(found)
    ]
