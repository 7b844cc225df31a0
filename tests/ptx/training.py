"""Updates of a two-layer GPT-2 on the emulator: losses and gradients, beside PyTorch's and those in float64."""

import torch
from cases import BF16, Comparison
from tolerances import randn
from torch import Tensor

from model.gpt2 import GPT2, GPT2Config


def _run(backend: str, dtype: torch.dtype, updates: int) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The losses, and each parameter's gradients, of the updates."""
    B, T, V = 2, 70, 600
    config = GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=T, vocab_size=V)
    torch.manual_seed(0)
    model = GPT2(config)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1:  # zeros and ones could hide a mistake
                parameter += 0.1 * randn(*parameter.shape, seed=index)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32).configure(backend, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], {name: [] for name, _ in model.named_parameters()}
    for update in range(updates):
        tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(update % 2))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.detach())
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def training_case(updates: int = 3) -> Comparison:
    """Training in bf16. Gradients are divided by the largest exact one, so that the bound is relative to it."""
    kinds = (("triton", BF16), ("torch", BF16), ("torch", torch.float64))
    runs = [_run(*kind, updates) for kind in kinds]
    exact_losses, exact = runs[2]
    assert exact_losses[-1] < exact_losses[0], "it must learn"
    scales = {name: [one.abs().max() for one in gradients] for name, gradients in exact.items()}
    values = [
        [
            torch.stack(losses),
            *(
                torch.stack([one / by for one, by in zip(gradients[name], scales[name], strict=True)])
                for name in scales
            ),
        ]
        for losses, gradients in runs
    ]
    return Comparison(*values, BF16, " ".join(["losses", *scales]))
