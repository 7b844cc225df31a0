"""Muon, for the matrices of the blocks.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iterates bring singular values near 1 (Jordan et al.)
NEWTON_SCHULZ_STEPS = 5


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
                momentum = momentum_of(self.state[p], p)
                mean = momentum.lerp(p.grad, 1.0 - group["momentum"])
                nesterov.append(p.grad.lerp(mean, group["momentum"]))
                momentum.copy_(mean if skip is None else torch.where(skip, momentum, mean))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(matrices, orthogonalize(torch.stack(nesterov)), strict=True):
                new = (p * (1.0 - group["lr"] * group["weight_decay"])).add_(update, alpha=-group["lr"] * scale)
                p.copy_(new if skip is None else torch.where(skip, p, new))
                p.grad = None


def momentum_of(state: dict, p: Tensor) -> Tensor:
    """Running mean of a matrix's gradient. Zeros at first."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(p)
    return state["momentum"]
