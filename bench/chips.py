"""What a chip can do at most: matrix FLOP/s, bytes/s of its memory and of its links.

`CHIPS` holds NVIDIA's data sheets: dense (no sparsity), at boost clock, which no program reaches.
"""

from dataclasses import dataclass, field

from engine.device import PEAK_TFLOPS


@dataclass(frozen=True)
class Chip:
    """Ceilings of one device."""

    name: str
    source: str
    flops_per_s: dict[str, float]  # of matrix products, by precision
    bytes_per_s: float  # of its memory, reads and writes together
    links: dict[str, float] = field(default_factory=dict)  # bytes/s in one direction, to all other devices together


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
