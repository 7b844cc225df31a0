"""The loss of GPT-2 124M before its first step, for both init schemes, on text: `python -m bench.initial_loss FILE`."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from engine import tokenizer
from model.gpt2 import GPT2, PRESETS


def main(path: str) -> None:
    """Prints ln V, then mean and range over five seeds of each scheme, on the first 1,024 tokens of a file."""
    words = tokenizer.load("gpt2")
    tokens = torch.tensor(words.encode(Path(path).read_text(encoding="utf-8"))[:1025].tolist())[None]
    print(f"ln V    {math.log(words.vocab_size):.3f}")
    for init in ("fan_in", "gpt2"):
        losses = []
        for seed in range(5):
            torch.manual_seed(seed)
            model = GPT2(replace(PRESETS["gpt2"], init=init)).eval()
            with torch.no_grad():
                losses.append(model(tokens[:, :-1], tokens[:, 1:]).item())
        print(f"{init:<7} {sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})")


if __name__ == "__main__":
    main(sys.argv[1])
