"""`gpt2 sample`."""

import sys
from dataclasses import dataclass

from engine import flags, output
from engine.errors import BadInput, Diverged

MOST_SAMPLED = 1_000_000  # tokens of a sample, and samples


@dataclass(frozen=True)
class Sample:
    """Continues a prompt with a trained model. Prints each token as it is sampled."""

    run: str  # run directory
    prompt: str  # text to continue, at most as many tokens as positions were trained
    max_new_tokens: int = 200  # most tokens to add; an end-of-text token stops earlier
    temperature: float = 0.8  # divides the logits; 0: the most likely token each time; 1: the model's distribution
    top_k: int | None = 50  # sample from the k most likely tokens; None: from all
    top_p: float | None = None  # sample from the fewest most likely tokens with this total probability; None: from all
    seed: int | None = None  # seed that makes samples repeatable; sample i, from 0, uses seed + i; None: random
    num_samples: int = 1  # number of continuations
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest


def sample(args: list[str], prog: str) -> None:
    """Continues a prompt. Prints each token as it is sampled."""
    asked = flags.checked(Sample, args, prog)
    import torch

    from engine import evaluation
    from engine.run import export
    from model.generate import NotFinite, stream

    for name, least in (("num_samples", 1), ("max_new_tokens", 0)):
        if not least <= getattr(asked, name) <= MOST_SAMPLED:
            flag = "--" + name.replace("_", "-")
            raise BadInput(
                f"sample: {flag} must be at least {least} and at most {MOST_SAMPLED:,}, got {getattr(asked, name)}"
            )
    model, tokenizer, checkpoint = export.load_model(asked.run, lambda line: print(line, file=sys.stderr), asked.best)
    ids = tokenizer.encode(asked.prompt).tolist()
    if not 1 <= len(ids) <= model.config.n_positions:
        raise BadInput(
            f"sample: --prompt must be 1 to {model.config.n_positions} {tokenizer.unit}s long, got {len(ids)}"
            f"{export.untrained_note(checkpoint)}"
        )
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    for number in range(asked.num_samples):
        try:
            drawn = stream(
                model,
                prompt,
                asked.max_new_tokens,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                seed=None if asked.seed is None else asked.seed + number,
            )
        except ValueError as error:
            raise BadInput(f"sample: {error}") from error
        if asked.num_samples > 1:
            print(f"{'' if number == 0 else chr(10)}--- sample {number + 1} of {asked.num_samples} ---")
        print(asked.prompt, end="", flush=True)
        try:
            for piece in evaluation.pieces(drawn, tokenizer):
                if output.has_failed():  # the reader may be `head`, which has all that it wants
                    return
                print(piece, end="", flush=True)
        except NotFinite as error:
            print()
            raise Diverged(f"sample: {error}, at step {checkpoint.step} of {asked.run}; try --best") from error
        print(flush=True)
