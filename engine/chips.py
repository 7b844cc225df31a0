"""Ceilings of devices from their data sheets: FLOP/s, memory, links. Free of PyTorch."""

from dataclasses import dataclass, field

# Dense bf16 tensor-core peaks in TFLOP/s with float32 accumulation, which a GeForce has at half rate,
# and without sparsity: half of a figure that counts it. From NVIDIA's data sheets, and from its
# architecture white papers for GeForce (GA102, Ada, Blackwell) and RTX PRO. The first name that
# occurs as whole words counts, so narrower names come first. A name that has no certain figure is
# not here, and a run on it reports no MFU.
PEAK_TFLOPS = {
    "GB200": 2500,  # as in GB200 NVL72
    "B200": 2250,  # as in HGX B200
    "GH200": 989,
    "H200 NVL": 836,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A10": 125,
    "A10G": 70,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX A6000": 155,
    "RTX 6000 Ada": 364,
    "RTX PRO 6000 Blackwell Workstation": 504,  # Server and Max-Q editions have lower clocks
    "RTX 3080": 59.5,  # of 10 GB; the card of 12 GB has the same name and 61
    "RTX 3090": 71,
    "RTX 3090 Ti": 80,
    "RTX 4080": 97.5,
    "RTX 4090": 165,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
}


@dataclass(frozen=True)
class Chip:
    """Ceilings of one device."""

    name: str
    source: str
    flops_per_s: dict[str, float]  # of matrix products, by precision
    bytes_per_s: float  # of its memory, reads and writes together
    links: dict[str, float] = field(default_factory=dict)  # bytes/s in one direction, to all other devices together
    memory_bytes: float = 0.0
    watts: float = 0.0  # thermal design power


def _sheet(
    name: str, source: str, tf32: float, fp32: float, memory: tuple[float, float, float], **links: float
) -> Chip:
    """A data sheet's figures: TFLOP/s, memory, and links in GB/s of both directions together, as it has them.

    memory: GB/s, GB, and the watts of the whole card.
    """
    half, (gigabytes_per_s, gigabytes, watts) = PEAK_TFLOPS[name], memory
    teraflops = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}
    return Chip(
        name,
        source,
        {precision: 1e12 * value for precision, value in teraflops.items()},
        1e9 * gigabytes_per_s,
        {link: 1e9 * both / 2 for link, both in links.items()},
        1e9 * gigabytes,
        watts,
    )


# tf32 is half of the sheets' figure where that counts sparsity; fp32 is that of the CUDA cores.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _sheet("H200", "NVIDIA H200 Tensor Core GPU data sheet, SXM", 494, 67, (4800, 141, 700), NVLink=900, PCIe=128),
        _sheet("H100", "NVIDIA H100 Tensor Core GPU data sheet, SXM", 494, 67, (3350, 80, 700), NVLink=900, PCIe=128),
        _sheet(
            "A100", "NVIDIA A100 80GB Tensor Core GPU data sheet, SXM", 156, 19.5, (2039, 80, 400), NVLink=600, PCIe=64
        ),
        # Without NVLink, whose bridge joins two cards only.
        _sheet("RTX A6000", "NVIDIA RTX A6000 data sheet", 77.4, 38.7, (768, 48, 300), PCIe=64),
    )
}
