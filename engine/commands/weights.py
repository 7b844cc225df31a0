"""`gpt2 import` and `gpt2 export`."""

import shlex
from dataclasses import dataclass

from engine import flags, output


@dataclass(frozen=True)
class Export:
    """Writes a run's model and tokenizer as files that the transformers library opens."""

    run: str  # run directory
    out: str  # directory to write, new or empty
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest


def import_(args: list[str], prog: str) -> None:
    """Turns released weights into a run directory."""
    import tyro

    @dataclass(frozen=True)
    class Import:
        """Makes a run directory from GPT-2 weights in the Hugging Face layout, or from nanoGPT's ckpt.pt.

        The run can be sampled, evaluated, and trained from with --init-from.
        """

        source: tyro.conf.Positional[str]  # directory with config.json and weights, ckpt.pt, or a name such as gpt2
        out: str  # run directory to make, new or empty

    asked = flags.checked(Import, args, prog)
    from engine.config import GPT_PROMPT
    from engine.run import export

    checkpoint_path = export.import_weights(asked.source, asked.out)
    print(f'{checkpoint_path}\ntry: {output.program()} sample --run {shlex.quote(asked.out)} --prompt "{GPT_PROMPT}"')


def export(args: list[str], prog: str) -> None:
    """Turns a run into a directory that transformers opens."""
    asked = flags.checked(Export, args, prog)
    from engine.run import export as exporting

    exporting.export(asked.run, asked.out, asked.best)
    print(f"{asked.out}: open it with transformers.AutoModelForCausalLM.from_pretrained({asked.out!r})")
