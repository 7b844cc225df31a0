"""Files that others wrote: opened without waiting, read within bounds, and checked before use.

Whatever lies at a path, the caller gets what it asked for or a BadFile. Its text says what came,
and fits behind "got": a sentence of the caller names the file and what must hold.
"""

import json
import os
import stat
import sys
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

MOST_JSON = 64 << 20  # bytes; the largest index or manifest in use has a few
KINDS = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
WORDS = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", bool: "true or false"}


class BadFile(ValueError):
    """What a file is that cannot be used, such as "a named pipe" or "no JSON"."""


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading. A pipe or a device is never waited for.

    Raises FileNotFoundError if nothing is there, which some callers expect, and BadFile otherwise.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise BadFile(f"a link to {os.readlink(path)}, which does not exist") from error
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise BadFile(getattr(error, "strerror", None) or str(error)) from error
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise BadFile(next((words for is_kind, words in KINDS.items() if is_kind(kind)), "no regular file"))


def read(path: str | Path, most: int = MOST_JSON) -> bytes:
    """Reads a whole file of at most `most` bytes. Raises BadFile or FileNotFoundError."""
    try:
        with open_file(path) as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:  # a disk that fails, a file that the network lost
        raise BadFile(error.strerror or str(error)) from error
    if len(content) > most:
        raise BadFile(f"more than {most:,} bytes")
    return content


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text in UTF-8 stands for. Raises BadFile if it is none."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadFile(f"text that is not UTF-8 at byte {error.start:,}") from error
    except json.JSONDecodeError as error:
        raise BadFile(f"no JSON: {error}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadFile("a number with too many digits") from error
    except RecursionError as error:
        raise BadFile("JSON that is nested too deep") from error


def read_json(path: str | Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Reads a JSON object and checks its fields. Raises BadFile or FileNotFoundError.

    fields: the types of each field that must be there, as for `check_fields`.
    """
    found = parse_json(read(path))
    return check_fields(found, fields or {})


def check_fields(found: Any, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Returns `found` if it is an object whose fields have these types. Raises BadFile.

    A float may be written as an integer and must be finite; true and false are no integers.
    `type(None)` stands for null.
    """
    if not isinstance(found, dict):
        raise BadFile(f"{_words(found)} instead of an object")
    for name, kinds in fields.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if name not in found:
            raise BadFile(f"no field {name}")
        if not any(_is(found[name], kind) for kind in kinds):
            wanted = " or ".join(WORDS.get(kind, "null") for kind in kinds)
            raise BadFile(f"{_words(found[name])} in field {name}, which must be {wanted}")
    return found


def few(words: Collection[str], most: int = 6, between: str = ", ") -> str:
    """The first of many words, and how many more there are: "a, b, c and 40 more"."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return between.join(islice(words, most)) + more


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN
    return type(value) is kind


def _words(value: Any) -> str:
    if isinstance(value, float) and not _is(value, float):
        return str(value)
    return "null" if value is None else WORDS.get(type(value), type(value).__name__)
