"""A training loop of 40 lines: a model, batches of token shards, an optimizer.

    gpt2 prepare stdlib --out data/stdlib --tokenizer bytes --val-fraction 0.2
    python examples/training_loop.py data/stdlib

What is left out is in engine/train.py: validation, checkpoints, several GPUs, and what may fail.
"""

import argparse
import sys
from contextlib import closing

import torch

from engine.errors import BadInput
from engine.tokens import shards
from engine.tokens import tokenizer as tokenizers
from engine.tokens.batches import Batches
from engine.tokens.shards import TokenStream
from model import GPT2, GPT2Config

CONTEXT = 128  # tokens per sequence


def main() -> None:
    """Trains a small model, and prints its loss and what it writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="directory that gpt2 prepare wrote")
    parser.add_argument("--steps", type=int, default=200, help="updates of the weights")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = tokenizers.load(shards.tokenizer_name(args.data))
    stream = TokenStream.open(args.data, "train", tokenizer.vocab_size)

    torch.manual_seed(1)
    model = GPT2(GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=CONTEXT, vocab_size=tokenizer.vocab_size))
    model.to(device).configure("auto", torch.bfloat16 if device == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps)

    with closing(Batches(stream, context=CONTEXT, tokens_per_step=2048, micro_batch_size=8, device=device)) as batches:
        for step in range(args.steps):
            micro_batches, loss = batches.at(step), 0.0
            for tokens, targets in micro_batches:  # each (8, 128) int64
                part = model(tokens.to(device), targets.to(device)) / len(micro_batches)
                part.backward()
                loss += part.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 20 == 0 or step == args.steps - 1:
                print(f"step {step}: loss {loss.item():.3f} nats per token")

    prompt = torch.tensor([tokenizer.encode("def ").tolist()], device=device)  # (1, T)
    print(tokenizer.decode(model.eval().generate(prompt, max_new_tokens=100, seed=1)[0].tolist()))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(str(error))
