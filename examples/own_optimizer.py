"""An own optimizer, Lion, in the engine's update, beside AdamW.

    python examples/own_optimizer.py data/stdlib

engine.step.Step adds up the gradients of the micro-batches, clips them, and skips an update that is
not finite. It needs two things of an optimizer:

    lr_scale     of each parameter group: what the step's learning rate is multiplied by
    found_inf    a scalar tensor, 1.0 if step() must change nothing; a tensor, so that no GPU is waited for

Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2 (Lion).
"""

import argparse
import sys
from contextlib import closing

import torch
from torch import Tensor

from engine import optim
from engine.config import OptimConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.health.timing import Clock
from engine.step import Guard, Numbers, Step
from engine.tokens import shards
from engine.tokens import tokenizer as tokenizers
from engine.tokens.batches import Batches
from engine.tokens.shards import TokenStream
from model import GPT2, GPT2Config


class Lion(torch.optim.Optimizer):
    """w <- (1 - lr wd) w - lr sign(b1 m + (1 - b1) g);   m <- b2 m + (1 - b2) g."""

    found_inf: Tensor | None = None

    def __init__(self, parameters, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.3):
        super().__init__(parameters, {"lr": 1e-4, "lr_scale": 1.0, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Makes one update, or none where found_inf is 1.0."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for weight in (p for p in group["params"] if p.grad is not None):
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                direction = mean.lerp(weight.grad, 1 - beta1).sign()
                new = weight * (1 - lr * group["weight_decay"]) - lr * direction
                self._replace(weight, new)
                self._replace(mean, mean.lerp(weight.grad, 1 - beta2))

    def _replace(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))


def train(name: str, lr: float, data: str, steps: int) -> list[float]:
    """Losses of a model that one optimizer trains. Weights and batches are the same for each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab_size = tokenizers.load(shards.tokenizer_name(data)).vocab_size
    stream = TokenStream.open(data, "train", vocab_size)

    torch.manual_seed(1)
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=64, vocab_size=vocab_size)).to(device)
    optimizer = Lion(model.parameters()) if name == "Lion" else optim.build(model, OptimConfig())
    scaler, ranks = torch.amp.GradScaler(device.type, enabled=False), Ranks(0, 0, 1, device)  # fp32, one process
    update = Step(model, optimizer, scaler, Guard(device), 1, 1.0, ranks, Clock(device))  # seed 1, norm at most 1.0

    with closing(Batches(stream, context=64, tokens_per_step=1024, micro_batch_size=8, device=device)) as batches:
        numbers = [update(step, batches.at(step), lr).tolist() for step in range(steps)]
    return [Numbers(*each).loss for each in numbers]


def main() -> None:
    """Prints the losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="directory that gpt2 prepare wrote")
    parser.add_argument("--steps", type=int, default=100, help="updates of the weights")
    args = parser.parse_args()

    adamw, lion = train("AdamW", 3e-3, args.data, args.steps), train("Lion", 1e-3, args.data, args.steps)
    for step in range(0, args.steps, max(1, args.steps // 10)):
        print(f"step {step}: loss {adamw[step]:.3f} with AdamW, {lion[step]:.3f} with Lion")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(str(error))
