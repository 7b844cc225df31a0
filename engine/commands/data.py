"""`gpt2 prepare` and `gpt2 verify`."""

from dataclasses import dataclass

from engine import flags
from engine.errors import DAMAGED, DONE, BadInput


def prepare(args: list[str], prog: str) -> None:
    """Turns text into token shards."""
    import tyro

    from engine.tokens import prepare as preparation
    from engine.tokens.reading.sources import STDLIB

    @dataclass(frozen=True, kw_only=True)
    class Prepare(preparation.PrepareConfig):
        """Turns text into token shards. A document is a file of text, a record of JSON, or a row of a table."""

        # .txt .md .py .json .jsonl .ndjson, each also as .gz .zst .bz2 .xz; .parquet .arrow; directories of them; or:
        # stdlib; - for standard input; hf:OWNER/NAME[/SUBSET], fineweb-edu or climbmix from the Hugging Face hub
        sources: tyro.conf.Positional[tuple[str, ...]]

    asked = flags.checked(Prepare, args, prog)
    if not asked.sources:
        raise BadInput(f"prepare: a source must be given, got none; name a file, a directory or {STDLIB}")
    if asked.dry_run:
        from engine.tokens.preparation.estimate import estimate

        print(estimate(list(asked.sources), asked))
        return
    print(preparation.describe(preparation.prepare(list(asked.sources), asked), asked.out))


def verify(args: list[str], prog: str) -> int:
    """Checks every shard and checkpoint, byte by byte. Returns the exit code."""
    import tyro

    @dataclass(frozen=True)
    class Verify:
        """Reads all files of data and run directories and prints which are whole.

        Changes nothing.
        """

        paths: tyro.conf.Positional[tuple[str, ...]]  # data directories or run directories

    asked = flags.checked(Verify, args, prog)
    if not asked.paths:
        raise BadInput("verify: a path must be given, got none; name directories of token shards or of runs")
    from engine.run import verify as inspection

    return DAMAGED if inspection.verify(asked.paths, lambda line: print(line, flush=True)) else DONE
