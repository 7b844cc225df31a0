"""Journal of a preparation: what of it is on the disk, so that the same command goes on after any end.

DIR/.building/journal.json is replaced as a whole, after the shards that it speaks of have reached the
disk. What was written since is cut off when the preparation goes on. It holds two states: the latest,
and one from before the file that is being read. A preparation goes on from the latest of which all
files are as they were, whatever comes after them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import durable

FILE = "journal.json"
VERSION = 2
EVERY, AFTER_SHARD = 3.0, 0.2  # least seconds between two writes, and if a shard is finished


@dataclass
class Request:
    """What is to be made. `whole` is a digest of all that decides its bytes, `options` one without the files."""

    whole: str
    options: str
    name: str  # that the shards' names begin with
    files: list[tuple]  # what each file is known by
    num_train: int | None  # number of the files that are for training, if the others are for validation
    _digests: list[bytes] = field(default_factory=lambda: [b""])  # by number of files

    @property
    def key(self) -> str:
        """What a journal must have, beside the files, to go on with."""
        return f"{self.options} {self.name}"

    def digest(self, place: Sequence[int]) -> str | None:
        """Digest of the files that have been read up to a place, or None if there are not so many."""
        count = num_begun(place)
        if count > len(self.files):
            return None
        for index in range(len(self._digests) - 1, count):
            known = [*self.files[index], self.num_train is None or index < self.num_train]
            content = self._digests[-1] + json.dumps(known).encode()
            self._digests.append(hashlib.blake2b(content, digest_size=16).digest())
        return self._digests[count].hex()


def num_begun(place: Sequence[int]) -> int:
    """Number of the files of which something has been read. place: the next file, and the position in it."""
    return place[0] + (place[1] > 0)


def write(directory: Path, key: str, state: dict[str, Any]) -> None:
    """Replaces the journal. Raises OSError, which names the file."""
    durable.write(directory / FILE, json.dumps({"version": VERSION, "key": key, **state}) + "\n")


def read(directory: Path) -> dict[str, Any] | None:
    """What the journal says, or None if there is none."""
    try:
        state = json.loads((directory / FILE).read_text())
        return state if state["version"] == VERSION and state["key"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def usable(directory: Path, request: Request) -> dict[str, Any] | None:
    """The latest state that the request goes on from, or None."""
    state = read(directory)
    if state is None or state["key"] != request.key:
        return None
    states = [state, *([state | state["earlier"] | {"earlier": None}] if state["earlier"] else [])]
    return next((one for one in states if one["files"] == request.digest(one["place"])), None)
