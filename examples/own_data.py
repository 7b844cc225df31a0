"""An own data set: examples that a function makes, with a loss on a part of each.

    python examples/own_data.py

The model learns to sort digits: "3 1 2 |" goes on with "1 2 3". Any iterator of (tokens, targets),
each (B, T) int64, trains a model; targets of -100 count for nothing.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from model import GPT2, GPT2Config

LENGTH = 5  # digits to sort
BAR = 10  # the token between question and answer; 0 to 9 are the digits
BATCH = 64  # B


def examples(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tokens, targets), each (BATCH, 2 LENGTH) int64, without end."""
    generator = torch.Generator().manual_seed(seed)
    bars = torch.full((BATCH, 1), BAR)
    while True:
        digits = torch.randint(10, (BATCH, LENGTH), generator=generator)
        text = torch.cat([digits, bars, digits.sort(dim=1).values], dim=1)  # (BATCH, 2 LENGTH + 1)
        tokens, targets = text[:, :-1], text[:, 1:].clone()
        targets[:, :LENGTH] = -100  # nobody can guess the question
        yield tokens, targets


def share_sorted(model: GPT2, seed: int) -> float:
    """Share of new questions that the model answers without an error."""
    tokens, targets = next(examples(seed))
    question, answer = tokens[:, : LENGTH + 1], targets[:, LENGTH:]
    written = model.generate(question, max_new_tokens=LENGTH, temperature=0.0)  # (BATCH, 2 LENGTH + 1)
    return (written[:, LENGTH + 1 :] == answer).all(dim=1).float().mean().item()


def main() -> None:
    """Trains a model of two layers, and prints how many questions it answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates of the weights")
    args = parser.parse_args()

    torch.manual_seed(1)
    model = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=2 * LENGTH + 1, vocab_size=11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step, (tokens, targets) in zip(range(args.steps), examples(seed=1), strict=False):
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f} nats per digit")
    print(f"sorts {share_sorted(model, seed=2):.0%} of {BATCH} new questions")


if __name__ == "__main__":
    main()
