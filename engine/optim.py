"""AdamW with GPT-3's settings, Muon for the matrices of the blocks, and the learning-rate schedule.

Sources: Loshchilov & Hutter 2019, arXiv:1711.05101; Brown et al. 2020, arXiv:2005.14165, appendix
B; Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

import math

import torch
from torch import Tensor

from engine.config import OptimConfig, TrainConfig
from model.gpt2 import GPT2

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iterates bring singular values near 1 (Jordan et al.)
NEWTON_SCHULZ_STEPS = 5


def warmup_steps(config: TrainConfig) -> int:
    """Warm-up steps: ceil(warmup_tokens / tokens_per_step), at most a tenth of the run."""
    wanted = math.ceil(config.optim.warmup_tokens / config.tokens_per_step)
    return min(wanted, max(1, config.num_steps // 10))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate at `step` (0-based): linear warm-up to lr, cosine down to min_lr_ratio * lr."""
    peak, warmup = config.optim.lr, warmup_steps(config)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.num_steps - warmup))
    lowest = peak * config.optim.min_lr_ratio
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets AdamW's learning rate to lr, and Muon's to lr * muon_lr / optim.lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrix to each of (n, rows, columns).

    Newton-Schulz iteration: x <- a x + (b G + c G^2) x, with G = x x^T. Singular values of the
    result are about 0.7 to 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    is_wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if is_wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if is_wide else x.mT


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with muon=True, AdamW for the others.

        m <- mu m + (1 - mu) g        running mean of the gradient
        g' = mu m + (1 - mu) g        Nesterov momentum
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) orthogonalize(g')

    The update's singular values are all made equal, so it is equally large in every direction.
    torch.optim.Muon computes in bfloat16, which is hundreds of times slower than float32 on most
    CPUs. Every rank computes the same update.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Makes one update. Sets the gradients of Muon's matrices to None."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)
        return super().step(closure)  # AdamW skips parameters without a gradient

    def _step_muon(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        found_inf = getattr(self, "found_inf", None)  # as for fused AdamW: 1.0 skips the update
        skip = None if found_inf is None else found_inf.bool()
        for shape in dict.fromkeys(p.shape for p in parameters):  # matrices of one shape form one batch
            matrices = [p for p in parameters if p.shape == shape]
            nesterov = []
            for p in matrices:
                momentum = _momentum(self.state[p], p)
                mean = momentum.lerp(p.grad, 1.0 - group["momentum"])
                nesterov.append(p.grad.lerp(mean, group["momentum"]))
                momentum.copy_(mean if skip is None else torch.where(skip, momentum, mean))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(matrices, orthogonalize(torch.stack(nesterov)), strict=True):
                new = (p * (1.0 - group["lr"] * group["weight_decay"])).add_(update, alpha=-group["lr"] * scale)
                p.copy_(new if skip is None else torch.where(skip, p, new))
                p.grad = None


def _momentum(state: dict, p: Tensor) -> Tensor:
    """Running mean of a matrix's gradient. Zeros at first."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(p)
    return state["momentum"]


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocates every parameter's optimizer state, as zeros for a checkpoint to fill."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if group.get("muon"):
                _momentum(state, p)
            elif not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)


def build(model: GPT2, optim: OptimConfig) -> torch.optim.Optimizer:
    """Makes the optimizer of a raw model.

    Matrices and embeddings have weight decay; biases and LayerNorm have none.
    """
    named = list(model.named_parameters())
    uses_muon = optim.name == "muon"
    hidden = [p for name, p in named if uses_muon and p.ndim == 2 and name.startswith("h.")]
    muon_params = set(hidden)
    adamw = {"lr_scale": 1.0, "muon": False}
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2 and p not in muon_params], "weight_decay": optim.weight_decay}
        | adamw,
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0} | adamw,
    ]
    if uses_muon:
        muon = {"lr_scale": optim.muon_lr / optim.lr, "muon": True, "momentum": optim.muon_momentum}
        groups.append({"params": hidden, "weight_decay": optim.weight_decay} | muon)
    kind = Muon if uses_muon else torch.optim.AdamW
    return kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
