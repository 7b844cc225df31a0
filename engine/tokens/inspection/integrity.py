"""How a token shard differs from what its manifest says of it, in the words of `gpt2 verify` and `gpt2 data`."""

from pathlib import Path

import numpy as np

from engine.errors import BadInput


def sizes(path: Path, tokens: np.ndarray, listed: dict) -> list[str]:
    """What is wrong with the numbers of bytes and tokens of a shard; [] if nothing is. listed: its manifest entry."""
    counts = {"bytes": path.stat().st_size, "tokens": len(tokens)}
    return [
        f"must have {listed[field]} {field}, got {count}"
        for field, count in counts.items()
        if listed.get(field, count) != count
    ]


def beyond(tokens: np.ndarray, start: int, vocab_size: int) -> str | None:
    """What is wrong with the first token that the vocabulary lacks; None if it has them all.

    start: position of these tokens in their shard.
    """
    if int(tokens.max(initial=0)) < vocab_size:
        return None
    at = int((tokens >= vocab_size).argmax())
    return f"token {start + at} must be below the vocabulary size {vocab_size}, got {tokens[at]}"


def digest(found: str, listed: dict) -> str | None:
    """What is wrong with the sha256 of a shard; None if it is the manifest's, or if that has none."""
    if listed.get("sha256", found) == found:
        return None
    return f"must have sha256 {listed['sha256'][:12]}..., got {found[:12]}..."


def unreadable(path: Path, error: BadInput | OSError | ValueError) -> str:
    """What is wrong with a shard that cannot be opened or read."""
    if isinstance(error, BadInput):
        return str(error).removeprefix(f"{path}: ")
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def unlisted(manifest: dict | None, found: list[Path]) -> list[Path]:
    """Of the shards in a directory, those that its manifest does not name, so that nothing reads them."""
    listed = None if manifest is None else {shard["file"] for shard in manifest["shards"]}
    return [path for path in found if listed is not None and path.name not in listed]
