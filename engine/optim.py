"""AdamW with GPT-3's settings, Muon for the matrices of the blocks, and the learning rate of every step.

Sources: Loshchilov & Hutter 2019, arXiv:1711.05101; Brown et al. 2020, arXiv:2005.14165, appendix B;
Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

import math

import torch
from torch import Tensor

from engine.config import OptimConfig, TrainConfig
from model.gpt2 import GPT2

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iterates bring singular values near 1 (Jordan et al.)
NEWTON_SCHULZ_STEPS = 5


def warmup_steps(config: TrainConfig) -> int:
    """Steps of linear warm-up: warmup_tokens' worth, at most a tenth of the run."""
    asked = math.ceil(config.optim.warmup_tokens / config.tokens_per_step)
    return min(asked, max(1, config.num_steps // 10))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate at `step` (0-based): linear warm-up to lr, then a half cosine down to min_lr_ratio * lr."""
    peak, rise = config.optim.lr, warmup_steps(config)
    if step < rise:
        return peak * (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, config.num_steps - rise))
    lowest = peak * config.optim.min_lr_ratio
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets AdamW's learning rate, and Muon's in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each of (n, rows, columns): singular values of about 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.AdamW):
    """Muon for the groups marked so, AdamW for the others.

    Muon moves a matrix along its gradient's running mean with all singular values made equal, so that no direction
    is left behind. torch.optim.Muon works in bfloat16, which most CPUs do hundreds of times slower than float32.
    Every rank works out the same update.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Gradients of the matrices are gone afterwards."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)
        return super().step(closure)  # passes over parameters without gradients

    def _step_muon(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        found_inf = getattr(self, "found_inf", None)  # as fused AdamW takes it: 1.0 changes nothing
        skip = None if found_inf is None else found_inf.bool()
        for shape in dict.fromkeys(p.shape for p in parameters):  # matrices of one shape go through together
            alike = [p for p in parameters if p.shape == shape]
            ahead = []
            for p in alike:
                old = self.state[p].setdefault("momentum", torch.zeros_like(p))
                mean = old.lerp(p.grad, 1.0 - group["momentum"])
                ahead.append(p.grad.lerp(mean, group["momentum"]))  # Nesterov's: one step ahead
                old.copy_(mean if skip is None else torch.where(skip, old, mean))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(alike, orthogonalize(torch.stack(ahead)), strict=True):
                new = (p * (1.0 - group["lr"] * group["weight_decay"])).add_(update, alpha=-group["lr"] * scale)
                p.copy_(new if skip is None else torch.where(skip, p, new))
                p.grad = None


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the state that its first update would make: zeros, for a checkpoint to fill."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if group.get("muon"):
                state.setdefault("momentum", torch.zeros_like(p))
            elif not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)


def build(model: GPT2, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a raw model: matrices and embeddings decay, biases and LayerNorm do not."""
    named = list(model.named_parameters())
    uses_muon = optim.name == "muon"
    hidden = [p for name, p in named if uses_muon and p.ndim == 2 and name.startswith("h.")]
    taken = set(hidden)
    adamw = {"lr_scale": 1.0, "muon": False}
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2 and p not in taken], "weight_decay": optim.weight_decay} | adamw,
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0} | adamw,
    ]
    if uses_muon:
        muon = {"lr_scale": optim.muon_lr / optim.lr, "muon": True, "momentum": optim.muon_momentum}
        groups.append({"params": hidden, "weight_decay": optim.weight_decay} | muon)
    kind = Muon if uses_muon else torch.optim.AdamW
    return kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
