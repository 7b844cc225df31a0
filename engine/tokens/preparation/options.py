"""Options of `gpt2 prepare`."""

import re
from dataclasses import dataclass
from typing import Literal

from engine.errors import BadInput

MOST_TOKENS = 2**31 - 1  # of a shard: its header counts them in an int32
MOST_WORKERS = 1024
LEAST_VAL_FRACTION = 1e-9
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}  # in --split-on


@dataclass(frozen=True)
class PrepareConfig:
    """Options of `gpt2 prepare`."""

    out: str  # directory for the shards and manifest.json
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # gpt2: 50,257 tokens; bytes: 257 tokens, for small models on a CPU
    workers: int | None = None  # worker processes; None: one per CPU core
    val_fraction: float = 0.01  # fraction of the documents used for validation
    shard_tokens: int = 100_000_000  # tokens per shard
    text_field: str = "text"  # name of the text field in .jsonl lines, or of the text column in .parquet files
    on_bad_text: Literal["skip", "fail", "replace"] = "skip"  # bad documents: leave out, stop, or U+FFFD for bad bytes
    # Replace other data in the same directory, and the progress of another command. Complete data of the same sources
    # and options is kept, also if gpt2 verify finds damage in it: remove the damaged shard to have all made again.
    overwrite: bool = False
    val: tuple[str, ...] = ()  # sources of a validation set of its own; then none of the others is for validation
    # String in .txt, .md and .py files that ends a document, such as "<|endoftext|>". In it \n, \r and \t stand for a
    # line end, a return and a tab, and \\ for one backslash. Line ends around a document are no part of it, and white
    # space alone is no document.
    split_on: str | None = None
    format: Literal["txt", "jsonl"] = "jsonl"  # of standard input, the source -
    dedup: bool = False  # keep the first of documents with equal text
    # Tokenise with gigatoken where it is installed, compared with tiktoken on a sample. Not standard input, which could
    # not be read again after a difference.
    fast: bool = True
    keep: bool = False  # keep the files that are fetched for an hf: source
    dry_run: bool = False  # read a sample and print an estimate of tokens, bytes and time, and write nothing

    @property
    def separator(self) -> str | None:
        """split_on with its escapes replaced."""
        if self.split_on is None:
            return None
        return re.sub(r"\\([nrt\\])", lambda found: ESCAPES[found[1]], self.split_on)

    def __post_init__(self) -> None:
        wrong = []
        if not LEAST_VAL_FRACTION <= self.val_fraction < 1.0:
            wrong.append(f"--val-fraction must be from {LEAST_VAL_FRACTION} to below 1, got {self.val_fraction}")
        if not 1 <= self.shard_tokens <= MOST_TOKENS:
            wrong.append(
                f"--shard-tokens must be from 1 to {MOST_TOKENS:,}, the int32 of a shard's header, "
                f"got {self.shard_tokens}"
            )
        if self.val and self.val_fraction != PrepareConfig.val_fraction:
            wrong.append(f"--val-fraction must be left out where --val names the documents, got {self.val_fraction}")
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            wrong.append(f"--workers must be from 1 to {MOST_WORKERS:,}, got {self.workers}")
        if self.split_on is not None and not self.separator:
            wrong.append("--split-on must be a string of at least one character, got none")
        elif re.search("[\ud800-\udfff]", self.separator or ""):  # an argument of other bytes
            wrong.append(f"--split-on must be UTF-8, got {self.split_on!r}")
        if wrong:
            raise BadInput("prepare: " + "; ".join(wrong))
