"""Names of token shards: `<name>_<split>_<number>.bin` or `.npy`. The last split in a name is its split.

So my_train_set_val_000000.bin is of the validation split. What stands in the number's place may be
any text, as 000002-of-000002. Some sets of one file per split have no number, as llm.c's
tiny_shakespeare_train.bin, or no name, as nanoGPT's train.bin. They are read where no shard of the
split has a number.
"""

import os
import re
from pathlib import Path

SPLITS = ("train", "val")
ENDING = r"\.(?:bin|npy)"
NUMBERED = re.compile(rf".*_(train|val)_[0-9]+{ENDING}", re.DOTALL)  # as `prepare` writes them
# Not my_train_set_val.bin, which has no number, and whose split is not what stands in the middle.
SHARD = re.compile(rf".*_(train|val)_(?!(?:.*_)?(?:train|val){ENDING}\Z).*{ENDING}", re.DOTALL)
UNNUMBERED = re.compile(r"(?:.*_)?(train|val)\.bin", re.DOTALL)
PATTERN = "<name>_{split}_<number>.bin or .npy"


def find(directory: Path, split: str | None = None) -> list[Path]:
    """Paths of a split's shards, or of both splits', in the order of their names; [] if none can be listed."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    found: list[str] = []
    for one in SPLITS if split is None else (split,):
        tiers = ([n for n in names if (m := p.fullmatch(n)) and m[1] == one] for p in (SHARD, UNNUMBERED))
        found += next(filter(None, tiers), [])
    return [directory / name for name in sorted(found)]
