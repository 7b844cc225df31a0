"""Training steps to be compared: this project's model, the plain reference, and `transformers`.

All of them start from the same weights, use the same fused AdamW in two groups, clip to the same norm and see the
same batches; what differs is the model's forward and backward. Each is eager or compiled, in fp32, tf32, bf16 or fp16:
this project's model casts by itself, the others run under autocast.
"""

import contextlib
from typing import Literal

import torch
from torch import Tensor, nn

from bench.reference import ReferenceGPT2
from engine import precision as arithmetic
from kernels.dispatch import Backend
from model.gpt2 import GPT2
from model.presets import GPT2Config

Who = Literal["ours", "reference", "transformers"]
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # released as (in, out)


class TrainingStep:
    """One contestant: `step(tokens, targets)` makes an update and returns the loss, detached, without waiting."""

    def __init__(
        self,
        who: Who,
        config: GPT2Config,
        weights: dict[str, Tensor],
        device: torch.device | str,
        *,
        is_compiled: bool,
        precision: str = "fp32",
        backend: Backend = "auto",
        recompute: str = "none",
        compiler: str = "inductor",
    ):
        """weights: those of `initial_weights`. precision: as engine.precision has them."""
        self.device, self.precision = torch.device(device), precision
        dtype = arithmetic.apply(precision)  # for the whole process: contestants of one process share it
        self.model = build(who, config, weights).to(self.device)
        self._autocast = contextlib.nullcontext()
        if who == "ours":
            self.model.configure(backend, dtype, recompute)
        elif dtype != torch.float32:
            self._autocast = torch.autocast(self.device.type, dtype)
        self.who, self._run = (
            who,
            torch.compile(self.model, dynamic=False, backend=compiler) if is_compiled else self.model,
        )
        self.optimizer = adamw(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of (B, T) int64 tokens and targets."""
        with self._autocast:
            if self.who == "transformers":  # shift_labels: it would otherwise drop the last position's target
                return self._run(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
            return self._run(tokens, targets)

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss(tokens, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def initial_weights(config: GPT2Config, seed: int = 0) -> dict[str, Tensor]:
    """Fresh float32 weights under their released names, on the CPU, the vocabulary padded."""
    torch.manual_seed(seed)
    return GPT2(config).state_dict()


def build(who: Who, config: GPT2Config, weights: dict[str, Tensor]) -> nn.Module:
    """The model, in training mode, with these weights."""
    if who == "ours":
        model = GPT2(config)
        model.load_state_dict(weights)
        return model
    weights = {
        name: tensor[: config.vocab_size] if name == "wte.weight" else tensor for name, tensor in weights.items()
    }
    if who == "reference":
        model = ReferenceGPT2(config)
        model.load_state_dict(weights | {"lm_head.weight": weights["wte.weight"]})
        return model
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    released = {"transformer." + name: t.T if name.endswith(TRANSPOSED) else t for name, t in weights.items()}
    model.load_state_dict(released | {"lm_head.weight": weights["wte.weight"]})
    return model.train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW as the GPT-3 paper has it; matrices and embeddings decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
