"""Launch configurations: tiles, warps and pipeline stages of every kernel whose best ones depend on the GPU."""

from collections.abc import Callable

import torch


def launch(name: str, size: int, device: torch.device, start: Callable) -> None:
    start(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
