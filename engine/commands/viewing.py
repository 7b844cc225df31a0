"""`gpt2 data`."""

from engine import flags
from engine.errors import DAMAGED, DONE, BadInput


def data(args: list[str], prog: str) -> int:
    """Prints what a directory of token shards holds. Returns the exit code."""
    from dataclasses import dataclass

    import tyro

    @dataclass(frozen=True)
    class Data:
        """Prints what token shards hold: shards, splits, documents, duplicates, and some of the text.

        Reads every token, and changes nothing. Exit code 1 if a shard is damaged.
        """

        directory: tyro.conf.Positional[str]  # token shards: from gpt2 prepare, llm.c, nanoGPT or as .npy
        check: bool = False  # compare the shards with the sha256 sums of manifest.json
        duplicates: bool = False  # compare all documents, not a share if there are millions; 8 bytes of memory each
        windows: int = 3  # pieces of text to print
        seed: int = 0  # which pieces
        json: bool = False  # print JSON

    asked = flags.checked(Data, args, prog)
    for name, least, most in (("windows", 0, 1000), ("seed", 0, 2**63 - 1)):
        if not least <= (value := getattr(asked, name)) <= most:
            raise BadInput(f"data: --{name} must be from {least} to {most:,}, got {value}")
    import json
    import sys

    from engine.tokens.inspection import tables, view

    found = view.view(asked.directory, asked.check, asked.duplicates, asked.windows, asked.seed)
    if asked.json:
        print(json.dumps(found, indent=1))
    else:
        tables.write(found, sys.stdout)
    return DAMAGED if found["damaged"] else DONE
