"""What a chip can do at most: matrix FLOP/s, bytes/s of its memory, bytes/s of its links.

`CHIPS` holds NVIDIA's data sheets: dense (no sparsity), at boost clock, which no program reaches. `measure` finds what
the machine at hand reaches with a large matrix product, and with a large copy or scaling in place; `from_rows` takes
product and copy from a record of bench.gpu. FLOP/s are by precision, as engine.precision names them.
"""

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from engine.metrics import PEAK_TFLOPS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Chip:
    """Ceilings of one device."""

    name: str
    source: str
    flops_per_s: dict[str, float]  # of matrix products, by precision
    bytes_per_s: float  # of its memory, reads and writes together
    links: dict[str, float] = field(default_factory=dict)  # bytes/s in one direction, to all other devices together
    is_measured: bool = False

    @property
    def kind(self) -> str:
        """Where the ceilings come from, in two words."""
        return "measured here" if self.is_measured else "data sheet"


def _sheet(name: str, source: str, tf32: float, fp32: float, gigabytes_per_s: float, **links: float) -> Chip:
    """A data sheet's figures: TFLOP/s, GB/s, and links in GB/s of both directions together, as it has them."""
    half = PEAK_TFLOPS[name]
    teraflops = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}
    return Chip(
        name,
        source,
        {precision: 1e12 * value for precision, value in teraflops.items()},
        1e9 * gigabytes_per_s,
        {link: 1e9 * both / 2 for link, both in links.items()},
    )


# tf32 is half of the sheets' figure where that counts sparsity; fp32 is that of the CUDA cores.
CHIPS: dict[str, Chip] = {
    "H200": _sheet("H200", "NVIDIA H200 Tensor Core GPU data sheet, SXM", 494, 67, 4800, NVLink=900, PCIe=128),
    "H100": _sheet("H100", "NVIDIA H100 Tensor Core GPU data sheet, SXM", 494, 67, 3350, NVLink=900, PCIe=128),
    "A100": _sheet("A100", "NVIDIA A100 80GB Tensor Core GPU data sheet, SXM", 156, 19.5, 2039, NVLink=600, PCIe=64),
    "RTX A6000": _sheet("RTX A6000", "NVIDIA RTX A6000 data sheet", 77.4, 38.7, 768, NVLink=112.5, PCIe=64),
}


def measure(device: "torch.device | str", precision: str) -> Chip:
    """The machine at hand, now: the fastest of several runs of each. Takes about a second."""
    import torch

    from bench import machine
    from engine import precision as arithmetic

    device = torch.device(device)
    on_gpu = device.type == "cuda"
    dtype = arithmetic.apply(precision)
    n, elements = (8192, 2**29) if on_gpu else (1536, 2**26)
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(elements, device=device)
    target = torch.zeros_like(source)
    product_s = fastest(lambda: left @ right, device)
    # A CPU reads what a copy overwrites before it does, so that an update in place moves more of what counts.
    pass_s = min(fastest(lambda: target.copy_(source), device), fastest(lambda: source.mul_(1.0), device))
    threads = "" if on_gpu else f", {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return Chip(
        machine.name(device) + threads,
        f"the fastest of several: a product of {n} x {n} matrices, a copy or a scaling of {source.nbytes // 2**20} MiB",
        {precision: 2.0 * n**3 / product_s},
        2.0 * source.nbytes / pass_s,
        is_measured=True,
    )


def faster(one: Chip, other: Chip) -> Chip:
    """Of two measurements of the same machine, the higher ceilings: something else may have run during either."""
    peaks = {name: max(one.flops_per_s[name], other.flops_per_s[name]) for name in one.flops_per_s}
    return replace(one, flops_per_s=peaks, bytes_per_s=max(one.bytes_per_s, other.bytes_per_s))


def fastest(fn, device: "torch.device", runs: int = 7) -> float:
    """Seconds of the fastest of several runs, the first of which does not count."""
    import torch

    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def from_rows(rows: list[dict], name: str) -> Chip | None:
    """The ceilings that bench.gpu measured in bf16, or None where a record has none."""
    rates = {
        row["contestant"]: row["phases"]["forward"]["rate"]
        for row in rows
        if row.get("section") == "ceilings" and "forward" in row.get("phases", {})
    }
    if not {"bf16 matmul", "device copy"} <= rates.keys():
        return None
    product, copy = 1e12 * rates["bf16 matmul"], 1e9 * rates["device copy"]
    return Chip(name, "bench.gpu, ceilings", {"bf16": product}, copy, is_measured=True)
