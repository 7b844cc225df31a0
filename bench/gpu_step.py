"""One training step of GPT-2 124M for bench.gpu: 64 sequences of 1,024 tokens, bf16, forward, backward, fused AdamW.

FLOPs are those of engine.metrics, 6 (N - wpe) + 12 L C T per token, which is not imported here: this program runs
where the engine's own requirements are not installed.
Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

import math

import torch
from torch import Tensor

from bench.gpu_timing import Timer, summary
from model.gpt2 import GPT2, PRESETS
from model.presets import GPT2Config

STEP = "training step"
PEAK_TFLOPS = {"H200": 989, "H100": 989}  # dense bf16, NVIDIA's data sheets
WARM_UP, STEPS = 3, 10
LOSS_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative


def flops_per_token(model: GPT2, context: int) -> int:
    """FLOPs of one token's forward and backward pass."""
    parameters = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    return 6 * parameters + 12 * model.config.n_layer * model.config.n_embd * context


def model_flops_utilization(tokens_per_s: float, model: GPT2, context: int, gpu: str) -> float | None:
    """The share of the GPU's data-sheet peak, or None where that is not known."""
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    return None if peak is None else tokens_per_s * flops_per_token(model, context) / peak


def adamw(model: GPT2) -> torch.optim.Optimizer:
    """Fused AdamW; matrices and embeddings decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)


def require_close(loss: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raises ArithmeticError unless the losses agree."""
    error = abs(loss.item() / expected.item() - 1.0)
    if not error <= LOSS_TOLERANCE[dtype]:
        raise ArithmeticError(f"{what} must be {expected.item():.4f} to {LOSS_TOLERANCE[dtype]}, got {loss.item():.4f}")


def measure(backend: str, compiled: bool, compiler: str, device: torch.device, dry_run: bool) -> dict:
    """Checks the loss, then times steps: times of a step, tokens/s, MFU, peak GiB of everything. Dry: only checks."""
    dtype = torch.float32 if dry_run else torch.bfloat16
    config = GPT2Config(1, 1, 16, n_positions=4, vocab_size=61) if dry_run else PRESETS["gpt2"]
    B, T = (2, 4) if dry_run else (64, 1024)
    torch.manual_seed(0)
    raw_model = GPT2(config).to(device)
    tokens = [torch.randint(config.vocab_size, (B, T + 1), device=device) for _ in range(1 if dry_run else 4)]
    batches = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]

    with torch.no_grad():
        few = [t[:2] for t in batches[0]]
        raw_model.configure("torch", torch.float32)
        expected = raw_model(*few)
        raw_model.configure(backend, dtype)
        loss = raw_model(*few)
        require_close(loss, expected, dtype, "the loss of two sequences, in float32 on PyTorch's ops,")
        expected = raw_model(*batches[0]) if B > 2 else loss
    optimizer = adamw(raw_model)
    model = torch.compile(raw_model, dynamic=False, backend=compiler) if compiled else raw_model

    def step(i: int) -> Tensor:
        loss = model(*batches[i % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    require_close(step(0), expected, dtype, "the first step's loss, uncompiled and without gradients,")
    if dry_run:
        return {}
    for i in range(1, WARM_UP):
        step(i)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    timer = Timer(None)
    for i in range(STEPS):
        with timer:
            loss = step(i)
    step_ms = summary(timer.read_ms())
    if not math.isfinite(loss.item()):
        raise ArithmeticError(f"the loss must stay finite, got {loss.item()}")
    tokens_per_s = B * T / (step_ms["median_ms"] * 1e-3)
    return {
        "step_ms": step_ms,
        "tokens_per_s": tokens_per_s,
        "mfu": model_flops_utilization(tokens_per_s, raw_model, T, torch.cuda.get_device_name()),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
