"""Files that others wrote: opened without waiting, read within bounds, and checked before use.

Whatever lies at a path, the caller gets what it asked for or a BadFile. Its text says what came,
and fits behind "got": a sentence of the caller names the file and what must hold.
"""

import dataclasses
import json
import os
import stat
import sys
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, Literal, TypeVar, get_args, get_origin

Kind = TypeVar("Kind")

MOST_JSON = 64 << 20  # bytes; the largest index or manifest in use has a few
MOST_INT = 2**63 - 1
KINDS = {
    stat.S_ISREG: "a file",
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
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise BadFile(kind_of(mode))


def kind_of(mode: int) -> str:
    """What lies at a path, by the mode of its os.stat: "a file", "a directory", "a named pipe", ..."""
    return next((words for is_kind, words in KINDS.items() if is_kind(mode)), "no regular file")


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

    A float may be written as an integer and must be finite; an integer has at most 64 bits; true and
    false are no integers. `type(None)` stands for null.
    """
    if not isinstance(found, dict):
        raise BadFile(f"{_words(found)} instead of an object")
    for name, kinds in fields.items():
        if name not in found:
            raise BadFile(f"no field {name}")
        _check(found[name], name, kinds)
    return found


def few(words: Collection[str], most: int = 6, between: str = ", ") -> str:
    """The first of many words, and how many more there are: "a, b, c and 40 more"."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return between.join(islice(words, most)) + more


def check_present(found: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Like `check_fields`, for fields that may be missing."""
    return check_fields(found, {name: kinds for name, kinds in fields.items() if name in found})


def make(kind: type[Kind], found: Any) -> Kind:
    """Makes a dataclass of a JSON object, by the types of its fields. Fields that it does not know are ignored.

    Raises BadFile, and whatever ValueError the dataclass raises itself.
    """
    check_fields(found, {})
    values = {}
    for field in dataclasses.fields(kind):
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name not in found and not is_required:
            continue
        if dataclasses.is_dataclass(field.type):
            values[field.name] = make(field.type, check_fields(found, {field.name: dict})[field.name])
        else:
            values[field.name] = check_fields(found, {field.name: field.type})[field.name]
    return kind(**values)


def shown(value: Any) -> str:
    """A JSON value for a message, without the rest of a long one."""
    text = json.dumps(value) if not isinstance(value, dict | list) else _words(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check(value: Any, name: str, kinds: Any) -> None:
    if not _is(value, kinds):
        raise BadFile(f"{_words(value)} in field {name}, which must be {_wanted(kinds)}")


def _is(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a type: a class, several, or an annotation such as `dict[str, int] | None`."""
    origin, args = get_origin(kind), kind if isinstance(kind, tuple) else get_args(kind)
    if isinstance(kind, tuple) or origin is UnionType:
        return any(_is(value, one) for one in args)
    if origin is Literal:
        return type(value) is str and value in args
    if origin is list:
        return type(value) is list and all(_is(each, args[0]) for each in value)
    if origin is dict:
        return type(value) is dict and all(_is(each, args[1]) for each in value.values())
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN
    return type(value) is kind and not (kind is int and abs(value) > MOST_INT)


def _wanted(kind: Any) -> str:
    origin, args = get_origin(kind), kind if isinstance(kind, tuple) else get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    return " or ".join(map(_wanted, args)) if isinstance(kind, tuple) or origin is UnionType else _name(kind)


def _name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (list, dict):
        return f"{WORDS[origin]} of values that are each {_wanted(args[-1])}"
    return "null" if kind is type(None) else WORDS[kind]


def _words(value: Any) -> str:
    if type(value) is float and not _is(value, float):
        return str(value)
    if type(value) is int and abs(value) > MOST_INT:
        return "an integer of more than 64 bits"
    return "null" if value is None else WORDS.get(type(value), type(value).__name__)
