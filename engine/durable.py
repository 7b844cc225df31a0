"""Small files that outlive a power failure: replaced as a whole, and fsynced with their directory."""

import contextlib
import os
from pathlib import Path

from engine import system

LONGEST_NAME = 255  # bytes of a file's name that every disk in use can hold


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: a reader, and a machine that loses power, has the old or the new one.

    Raises OSError, which names the file, and leaves nothing else there.
    """
    temporary = _beside(path)
    with system.naming(path):
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            fsync(temporary)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        fsync(path.parent)


def _beside(path: Path) -> Path:
    """The temporary name of a file that is written, in the same directory, and as short as it has to be."""
    name = f".{path.name}.writing"
    return path.with_name(name if len(os.fsencode(name)) <= LONGEST_NAME else ".writing")


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
