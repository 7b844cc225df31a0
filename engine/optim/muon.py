"""Muon, for the matrices of the blocks.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine import device
from engine.distributed import local
from engine.optim.sharing import Peers
from engine.planning.owners import NUM_QUINTICS, assign, work

# a, b, c of each a x + b x^3 + c x^5. Singular values from 0.002 to 1 become 0.68 to 1.21: steep at zero, at the price
# of not converging to 1. Those of Polar Express come nearer; 16 seeds showed no certain gain: docs/learning.md.
QUINTICS = ((3.4445, -4.7750, 2.0315),) * NUM_QUINTICS
GRAM_STEPS = 3  # quintics between two products with the whole matrix; float32 rounds off more if there are more
ROW_DECAY = 0.95  # of the running mean of a row's mean square
TINY = 1e-8  # added to its root, about 1e-2


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrix to each of (n, rows, columns).

    x <- x / ||x||, then x <- a x + (b G + c G^2) x with G = x x^T, for each (a, b, c): an odd
    polynomial of the singular values. In bfloat16 on a GPU that has it, else in the dtype given,
    which is that of the result. On a CPU a matrix's result does not depend on the others.
    """
    if matrices.device.type == "cpu" and len(matrices) > 1:  # one at a time stays in the cache
        return torch.cat([orthogonalize(matrix) for matrix in matrices.split(1)])
    is_wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if is_wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    if x.device.type != "cpu" and device.choose_precision("auto", x.device)[0] == "bf16":
        x = x.bfloat16()
    # Less work where G is much smaller than x. In bfloat16 it would lose the small singular values.
    at_once = GRAM_STEPS if x.device.type == "cpu" and x.shape[2] >= 2 * x.shape[1] else 1
    for first in range(0, len(QUINTICS), at_once):
        x = _iterate(x, QUINTICS[first : first + at_once])
    return (x if is_wide else x.mT).to(matrices.dtype)


def _iterate(x: Tensor, quintics: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Applies quintics to wide x with two products of x's size for all but the last together.

    P = a + b G + c G^2; the next x is P x, so the next G is P G P. All are polynomials of one G, and
    commute. The last x is the product of all P with x.
    """
    gram, product = torch.bmm(x, x.mT), None
    for index, (a, b, c) in enumerate(quintics, start=1):
        even = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a
        if len(quintics) == 1:
            return torch.baddbmm(x, even, x, beta=a)
        if product is None:
            product = even.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, even, product, beta=a)
        if index < len(quintics):
            half = torch.baddbmm(gram, even, gram, beta=a)
            gram = torch.baddbmm(half, even, half, beta=a)
    return torch.bmm(product, x)


def normalize_rows(updates: Tensor, row_square: Tensor) -> tuple[Tensor, Tensor]:
    """Divides rows by the root of a running mean of their mean square; keeps each matrix's norm.

    updates: (n, rows, columns). row_square: (n, rows, 1), the running mean before. Returns both, new.
    A bias correction of the mean would divide all rows alike: the norm that is kept undoes it.
    Source: Li et al. 2025, "NorMuon", arXiv:2510.05491.
    """
    square = updates.norm(dim=2, keepdim=True).square() / updates.shape[2]
    row_square = row_square.lerp(square, 1.0 - ROW_DECAY)
    factor = 1.0 / (row_square.sqrt() + TINY)
    grown = (square * factor.square()).sum(dim=1, keepdim=True) / square.sum(dim=1, keepdim=True).clamp_min(TINY)
    return updates * (factor / grown.clamp_min(TINY).sqrt()), row_square


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with muon=True, AdamW for the others.

        m <- mu m + (1 - mu) g        running mean of the gradient
        g' = mu m + (1 - mu) g        Nesterov momentum
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) orthogonalize(g')

    The update's singular values are all made equal, so it is equally large in every direction.
    c_attn's weight is three matrices, of q, k and v, one above the other, and each is orthogonalised
    by itself: together, the largest of them would take most of the update (docs/learning.md has what
    that is worth). rows=True: see normalize_rows.
    torch.optim.Muon computes in bfloat16, which is hundreds of times slower than float32 on most
    CPUs.

    Each matrix's update is computed by one process of those that share the work: see sharing. On a
    CPU its bits are the same for any number of them.
    """

    replicas: dist.ProcessGroup | None = None  # processes with the same whole matrices and gradients, under DDP

    @torch.no_grad()
    def step(self, closure=None):
        """Makes one update. Sets the gradients of Muon's matrices to None."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)
        return super().step(closure)  # AdamW skips parameters without a gradient

    def _step_muon(self, group: dict) -> None:
        chosen = [(p, parts) for p, parts in zip(group["params"], group["parts"], strict=True) if p.grad is not None]
        states = [muon_state(self.state[p], p, group["rows"]) for p, _ in chosen]
        momenta = [local(state["momentum"]) for state in states]
        row_squares = [local(state["row_square"]) for state in states if group["rows"]]
        updates = [local(p.grad) for p, _ in chosen]
        for p, _ in chosen:
            p.grad = None
        skip = getattr(self, "found_inf", None)  # as for fused AdamW: 1.0 skips the update
        if skip is not None and is_readable(skip):
            if skip:
                return
            skip = None
        if skip is not None:  # with the mean in place of its gradient, the mean stays as it is
            for momentum, update in zip(momenta, updates, strict=True):
                torch.where(skip.bool(), momentum, update, out=update)
        torch._foreach_lerp_(momenta, updates, 1.0 - group["momentum"])
        torch._foreach_lerp_(updates, momenta, group["momentum"])  # in the gradients' memory, which is free now
        new_squares = [row_square.clone() for row_square in row_squares]
        self._orthogonalize(chosen, updates, new_squares)
        decay = 1.0 - group["lr"] * group["weight_decay"]
        for (p, parts), update in zip(chosen, updates, strict=True):
            weight, lr = local(p), group["lr"] * max(1.0, p.shape[0] / parts / p.shape[1]) ** 0.5
            new = (weight if skip is None else weight.clone()).mul_(decay).add_(update, alpha=-lr)
            if skip is not None:
                weight.copy_(torch.where(skip.bool(), weight, new))
        for old, new in zip(row_squares, new_squares, strict=True):
            old.copy_(new if skip is None else torch.where(skip.bool(), old, new))

    def _orthogonalize(self, chosen: list[tuple[Tensor, int]], updates: list[Tensor], squares: list[Tensor]) -> None:
        """Orthogonalises updates, and normalises their rows if there are squares. Changes both in place.

        chosen: (parameter, matrices in it) of each update.
        """
        if not chosen:
            return
        first, is_sharded = chosen[0][0], isinstance(chosen[0][0], DTensor)
        peers = Peers(first.device_mesh.get_group("shard") if is_sharded else self.replicas, is_sharded)
        kinds = len(updates + squares) // len(updates)
        owners = assign([work(p.shape, parts) for p, parts in chosen], peers.size) * kinds
        pieces = updates + squares
        whole = peers.collect(pieces, [len(p) for p, _ in chosen] * kinds, owners)
        whole = {index: matrix.unflatten(0, (chosen[index % len(chosen)][1], -1)) for index, matrix in whole.items()}
        batches: dict = {}
        for index in range(len(chosen)):
            if index in whole:  # a GPU takes matrices of one shape together
                batches.setdefault(index if first.device.type == "cpu" else whole[index].shape[1:], []).append(index)
        for indices in batches.values():
            results = orthogonalize(_joined([whole[index] for index in indices]))
            counts = [len(whole[index]) for index in indices]
            if squares:
                theirs = [whole[len(chosen) + index] for index in indices]
                results, means = normalize_rows(results, _joined(theirs))
                torch._foreach_copy_(theirs, means.split(counts))
            torch._foreach_copy_([whole[index] for index in indices], results.split(counts))
        peers.distribute({index: matrix.flatten(0, 1) for index, matrix in whole.items()}, pieces, owners)


def is_readable(flag: Tensor) -> bool:
    """Whether a check of the flag would not synchronise."""
    return flag.device.type == "cpu"


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def muon_state(state: dict, p: Tensor, has_rows: bool) -> dict:
    """State of a matrix, zeros at first: the running means of its gradient and of its rows' mean squares."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(p)
        if has_rows:
            state["row_square"] = torch.zeros_like(p[:, :1])
    return state
