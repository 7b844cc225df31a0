"""Journal of a preparation: what of it is on the disk, so that the same command goes on after any end.

DIR/.building/journal.json is replaced as a whole, after the shards that it speaks of have reached the
disk. What was written since is cut off when the preparation goes on.
"""

import json
from pathlib import Path
from typing import Any

from engine import durable

FILE = "journal.json"
VERSION = 1
EVERY, AFTER_SHARD = 3.0, 0.2  # least seconds between two writes, and if a shard is finished


def write(directory: Path, key: str, state: dict[str, Any]) -> None:
    """Replaces the journal. Raises OSError, which names the file."""
    durable.write(directory / FILE, json.dumps({"version": VERSION, "key": key, **state}) + "\n")


def read(directory: Path, key: str | None = None) -> dict[str, Any] | None:
    """What the journal says, or None if there is none, or it is of another request. key: None takes any."""
    try:
        state = json.loads((directory / FILE).read_text())
        is_ours = state["version"] == VERSION and key in (None, state["key"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return state if is_ours else None
