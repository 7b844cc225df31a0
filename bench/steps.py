"""Training steps to compare: this engine's own, engine.step.Step, and small ones of the reference and `transformers`.

All start from the same weights, use fused AdamW in two groups and clip to the same norm. This engine's model casts by
itself, the others run under autocast.
"""

import contextlib
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.reference import ReferenceGPT2
from engine import optim
from engine.config import OptimConfig
from engine.device import apply_precision
from engine.distributed import Ranks
from engine.health.timing import Clock
from engine.step import Guard, Step
from kernels.dispatch import Backend
from model.gpt2 import GPT2
from model.presets import GPT2Config

OURS, PEERS = "ours", ("reference", "transformers")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # released as (in, out)
LR, CLIP = 6e-4, 1.0
MicroBatches = list[tuple[Tensor, Tensor]]  # (B, T) int64 tokens and targets


@dataclass(frozen=True)
class Setup:
    """How a step runs."""

    who: str = OURS  # or one of PEERS
    is_compiled: bool = False
    precision: str = "fp32"  # as engine.device has them
    backend: Backend = "auto"  # of our ops
    recompute: str = "none"  # of our model, in the backward pass
    compiler: str = "inductor"  # backend of torch.compile


def build(
    setup: Setup, config: GPT2Config, weights: dict[str, Tensor], device: torch.device
) -> Callable[[MicroBatches], Tensor]:
    """A step: given its micro-batches it makes one update and returns the mean loss, without waiting.

    weights: those of `initial_weights`. Sets the precision of the whole process: peers of one process share it.
    """
    dtype = apply_precision(setup.precision)
    with device:
        model = build_model(setup.who, config, weights).to(device)
    if setup.who == OURS:
        model.configure(setup.backend, dtype, setup.recompute)
    runs = torch.compile(model, dynamic=False, backend=setup.compiler) if setup.is_compiled else model
    scaler = torch.amp.GradScaler(device.type, enabled=setup.precision == "fp16")
    if setup.who == OURS:
        optimizer, ranks, updates = optim.build(model, OptimConfig(lr=LR)), Ranks(0, 0, 1, device), itertools.count()
        step = Step(runs, optimizer, scaler, Guard(device), 1, CLIP, ranks, Clock(device))
        return lambda micro_batches: step(next(updates), micro_batches, LR)[0]
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    return PeerStep(model, runs, scaler, autocast, pinned(device, dtype))


def pinned(device: torch.device, dtype: torch.dtype) -> SDPBackend | None:
    """The backend that the peers' attention is held to: PyTorch's preference here. None where nothing is pinned."""
    if device.type != "cuda" or torch.version.hip is not None or dtype == torch.float32:
        return None
    prefers_cudnn = torch.cuda.get_device_capability(device)[0] in (9, 10)
    return SDPBackend.CUDNN_ATTENTION if prefers_cudnn else SDPBackend.FLASH_ATTENTION


class PeerStep:
    """The same update as most people write it."""

    def __init__(self, model: nn.Module, runs: nn.Module, scaler: torch.amp.GradScaler, autocast, sdpa=None):
        self.model, self.runs, self.scaler, self.autocast, self.sdpa = model, runs, scaler, autocast, sdpa
        self.optimizer = adamw(model)

    def __call__(self, micro_batches: MicroBatches) -> Tensor:
        total = torch.zeros((), device=micro_batches[0][0].device)
        for tokens, targets in micro_batches:
            with self.autocast, sdpa_kernel(self.sdpa) if self.sdpa else contextlib.nullcontext():
                if isinstance(self.model, ReferenceGPT2):
                    loss = self.runs(tokens, targets)
                else:  # shift_labels: it would otherwise drop the last position's target
                    loss = self.runs(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
            loss = loss / len(micro_batches)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW as the GPT-3 paper has it; matrices and embeddings decay."""
    parameters = list(model.parameters())
    matrices, others = ([p for p in parameters if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)


def initial_weights(config: GPT2Config, seed: int = 0) -> dict[str, Tensor]:
    """Fresh float32 weights under their released names, the vocabulary padded."""
    torch.manual_seed(seed)
    return GPT2(config).state_dict()


def absence(who: str) -> str | None:
    """Why a peer cannot be here, or None."""
    is_missing = who == "transformers" and importlib.util.find_spec("transformers") is None
    return "transformers is not installed" if is_missing else None


def build_model(who: str, config: GPT2Config, weights: dict[str, Tensor]) -> nn.Module:
    """The model, in training mode, with these weights."""
    unpadded = {name: t[: config.vocab_size] if name == "wte.weight" else t for name, t in weights.items()}
    if who in (OURS, "reference"):
        model = GPT2(config) if who == OURS else ReferenceGPT2(config)
        model.load_state_dict(weights if who == OURS else unpadded | {"lm_head.weight": unpadded["wte.weight"]})
        return model
    import transformers

    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    shape = {name: getattr(config, name) for name in names}
    shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, use_cache=False, attn_implementation="sdpa"))
    released = {"transformer." + name: t.T if name.endswith(TRANSPOSED) else t for name, t in unpadded.items()}
    model.load_state_dict(released | {"lm_head.weight": unpadded["wte.weight"]})
    return model.train()
