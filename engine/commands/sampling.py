"""`gpt2 sample`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from engine import flags, output
from engine.errors import BadInput, Diverged

MOST_SAMPLED = 1_000_000  # tokens of a sample, and samples
AT_ONCE = 16  # samples in a batch


@dataclass(frozen=True)
class Sample:
    """Continues a prompt with a trained model. Prints each token as it is sampled, several samples one by one."""

    run: str  # run directory
    prompt: str  # text to continue, at most as many tokens as positions were trained
    max_new_tokens: int = 200  # most tokens to add; an end-of-text token stops earlier
    temperature: float = 0.8  # divides the logits; 0: the most likely token each time; 1: the model's distribution
    top_k: int | None = 50  # sample from the k most likely tokens; None: from all
    top_p: float | None = None  # sample from the fewest most likely tokens with this total probability; None: from all
    min_p: float | None = None  # sample from tokens at least this times as likely as the likeliest; None: from all
    repetition_penalty: float = 1.0  # divides the logits of tokens in the text so far; 1: none
    stop: tuple[str, ...] = ()  # strings that end a sample, which is printed without them
    seed: int | None = None  # seed that makes samples repeatable; sample i, from 0, uses seed + i; None: random
    num_samples: int = 1  # number of continuations
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest


def sample(args: list[str], prog: str) -> None:
    """Continues a prompt. Prints each token as it is sampled, several samples one by one."""
    asked = flags.checked(Sample, args, prog)
    import torch

    from engine.run import export
    from model.generate import NotFinite

    for name, least in (("num_samples", 1), ("max_new_tokens", 0)):
        if not least <= getattr(asked, name) <= MOST_SAMPLED:
            flag = "--" + name.replace("_", "-")
            raise BadInput(
                f"sample: {flag} must be at least {least} and at most {MOST_SAMPLED:,}, got {getattr(asked, name)}"
            )
    if "" in asked.stop:
        raise BadInput("sample: --stop must be strings of at least one character, got ''")
    model, tokenizer, checkpoint = export.load_model(asked.run, lambda line: print(line, file=sys.stderr), asked.best)
    ids = tokenizer.encode(asked.prompt).tolist()
    if not 1 <= len(ids) <= model.config.n_positions:
        raise BadInput(
            f"sample: --prompt must be 1 to {model.config.n_positions} {tokenizer.unit}s long, got {len(ids)}"
            f"{export.untrained_note(checkpoint)}"
        )
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    try:
        for piece in _printed(asked, model, tokenizer, prompt):
            if output.has_failed():  # the reader may be `head`, which has all that it wants
                return
            print(piece, end="", flush=True)
    except NotFinite as error:
        print()
        raise Diverged(f"sample: {error}, at step {checkpoint.step} of {asked.run}; try --best") from error


def _printed(asked: Sample, model, tokenizer, prompt) -> Iterator[str]:
    """All that is printed: one sample token by token; several in batches, each under a heading."""
    from engine import evaluation
    from model.generate import stream

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(asked, name) for name in names} | {"end_of_text": tokenizer.end_of_text}
    for first in range(0, asked.num_samples, AT_ONCE):
        B = min(AT_ONCE, asked.num_samples - first)
        seed = None if asked.seed is None else asked.seed + first
        try:
            drawn = stream(model, prompt.expand(B, -1), asked.max_new_tokens, seed=seed, **options)
        except ValueError as error:
            raise BadInput(f"sample: {error}") from error
        if asked.num_samples == 1:
            yield asked.prompt
            yield from evaluation.pieces(drawn, tokenizer, asked.stop)
            yield "\n"
            continue
        texts = evaluation.continuations(drawn, tokenizer, asked.stop) or [""] * B
        for number, text in enumerate(texts, first + 1):
            heading = f"{'' if number == 1 else chr(10)}--- sample {number} of {asked.num_samples} ---\n"
            yield f"{heading}{asked.prompt}{text}\n"
