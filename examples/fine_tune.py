"""Fine-tuning: GPT-2 weights of others, on a text file of yours.

    python examples/fine_tune.py weights text.txt runs/tuned --num-steps 300

weights: a directory in the Hugging Face layout, or a name such as gpt2. Flags after the first three
words are those of `gpt2 train`. Ctrl-C saves, and the same command goes on.
"""

import signal
import sys
import threading
from pathlib import Path

from engine import config, run_training
from engine.errors import BadInput
from engine.run.export import load_model
from engine.tokens.prepare import PrepareConfig, prepare


def tune(weights: str, text: str, out: str, flags: list[str]) -> None:
    """Makes token shards of the text beside the run, and trains on them."""
    data = f"{out}-data"
    was_there = Path(data).exists()
    try:
        prepare([text], PrepareConfig(out=data, val_fraction=0.1))
    except BadInput as error:
        again = f"\nfine_tune: for a changed text name another run than {out}, or delete {out} and {data}"
        raise BadInput(f"{error}{again if was_there else ''}") from error
    gently = ["--optim.name", "adamw", "--optim.lr", "3e-5"]  # a tenth of pretraining's, or less
    gently += ["--init-from", weights]
    asked = config.parse(["small", *gently, "--data", data, "--out", out, *flags], "fine_tune")

    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        reason = run_training(asked, stop)
    finally:
        signal.signal(signal.SIGINT, before)
    if reason is not None:
        sys.exit(f"stopped early by {reason}; the same command goes on")


def show(out: str, prompt: str) -> None:
    """Prints how the newest weights of a run continue a prompt."""
    import torch

    model, tokenizer, checkpoint = load_model(out)
    device = model.wte.weight.device
    tokens = torch.tensor([tokenizer.encode(prompt).tolist()], device=device)  # (1, T)
    written = model.generate(tokens, max_new_tokens=40, temperature=0.8, top_k=50, seed=1)
    print(f"step {checkpoint.step}: {tokenizer.decode(written[0].tolist())}")


def main(args: list[str]) -> None:
    """Tunes the weights, then shows a sample."""
    if len(args) < 3 or args[0].startswith("-"):
        sys.exit(__doc__)
    weights, text, out, *flags = args
    tune(weights, text, out, flags)
    show(out, prompt="The ")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadInput as error:
        sys.exit(str(error))
