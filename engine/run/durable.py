"""Small files that outlive a power failure: replaced as a whole, and fsynced with their directory."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: a reader, and a machine that loses power, has the old or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    if isinstance(content, str):
        temporary.write_text(content, encoding="utf-8")
    else:
        temporary.write_bytes(content)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
