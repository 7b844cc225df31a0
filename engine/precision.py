"""What the arithmetic is done in. Parameters, their gradients, optimizer state and statistics are float32 in all of it.

bf16: activations and matrix products in bfloat16. fp16: in float16, with the loss scaled so that small gradients
survive. tf32: float32 activations, products rounded to 10-bit mantissas on tensor cores. fp32: float32 throughout.
"""

import time

import torch

from engine.errors import BadInput

COMPUTE_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
WORTHWHILE = 1.5  # bf16 must beat fp32 by this factor on a CPU to be taken


def choose(asked: str, device: torch.device) -> tuple[str, str]:
    """(precision, why) for a device. Raises BadInput if the device cannot do what was asked."""
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked == "tf32" and not tensor_cores:
        raise BadInput(f"train: --precision tf32 needs an NVIDIA GPU from 2020 on (sm_80), got {device.type}; use fp32")
    if asked == "bf16" and device.type == "cuda" and not tensor_cores:
        raise BadInput("train: --precision bf16 needs an NVIDIA GPU from 2020 on (sm_80); use fp16 or fp32")
    if asked != "auto":
        return asked, "asked for"
    if device.type == "cuda":
        if tensor_cores:
            return "bf16", "this GPU has bf16 tensor cores"
        return "fp32", "this GPU has no bf16 tensor cores"
    speedup = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
    precision = "bf16" if speedup >= WORTHWHILE else "fp32"
    return precision, f"a bf16 matrix product ran at {speedup:.2g}x the speed of fp32 on this CPU"


def apply(precision: str) -> torch.dtype:
    """Sets PyTorch's float32 matrix products for this precision and returns the dtype of the activations."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    return COMPUTE_DTYPES[precision]


def _matmul_seconds(dtype: torch.dtype) -> float:
    """The best of three products of 256 x 256 matrices: 3 ms in fp32 on one slow core."""
    left = torch.ones(256, 256, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return best
