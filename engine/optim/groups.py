"""The optimizer of a model: parameter groups and their state.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101, as in Brown et al. 2020, arXiv:2005.14165,
appendix B.
"""

import torch

from engine.config import OptimConfig
from engine.optim.muon import Muon, muon_state
from engine.planning import owners
from model.gpt2 import GPT2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets AdamW's learning rate to lr, and Muon's to lr * muon_lr / optim.lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocates every parameter's optimizer state, as zeros for a checkpoint to fill."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if group.get("muon"):
                muon_state(state, p, group["rows"])
            elif not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)


def build(
    model: GPT2, optim: OptimConfig, replicas: torch.distributed.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """Makes the optimizer of a raw model.

    Matrices and embeddings have weight decay; biases and LayerNorm have none. replicas: the
    processes of DDP, which share Muon's work; a sharded model knows its own.
    """
    named = list(model.named_parameters())
    uses_muon = optim.name == "muon"
    hidden = {p: name for name, p in named if uses_muon and p.ndim == 2 and name.startswith("h.")}
    adamw = {"lr_scale": 1.0, "muon": False}
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2 and p not in hidden], "weight_decay": optim.weight_decay}
        | adamw,
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0} | adamw,
    ]
    if uses_muon:
        muon = {"lr_scale": optim.muon_lr / optim.lr, "muon": True, "momentum": optim.muon_momentum}
        parts = [owners.parts(name) for name in hidden.values()]
        muon |= {"parts": parts, "rows": optim.muon_rows}
        groups.append({"params": list(hidden), "weight_decay": optim.weight_decay} | muon)
    kind = Muon if uses_muon else torch.optim.AdamW
    optimizer = kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    if uses_muon:
        optimizer.replicas = replicas
    return optimizer
