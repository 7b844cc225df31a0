"""Examples of a .jsonl file, plain or packed, checked line by line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import BadInput
from engine.tokens.reading import formats, packed
from model.files import BadFile, check_fields, parse_json

Example = TypeVar("Example")


class TooLong(BadFile):
    """An example that is good, and longer than the model reads."""


def read(path: str, kind: str, make: Callable[[dict[str, Any]], Example], limit: int | None = None) -> list[Example]:
    """What `make` makes of each line, of the first `limit` ones if given.

    kind: name of the examples, for messages. `make` raises BadFile if a record is none. Raises
    BadInput, which names the line.
    """
    made: list[Example] = []
    try:
        with packed.open_stream(Path(path)) as file:
            plain = None if packed.suffixes(path)[1] else file.raw.file
            if (found := formats.foreign(file.peek(formats.HEAD)[: formats.HEAD], Path(path), plain)) is not None:
                raise BadFile(found)
            for number, line in enumerate(file, 1):
                if limit is not None and len(made) == limit:
                    break
                if not line.strip():
                    continue
                try:
                    made.append(make(check_fields(parse_json(line.removeprefix(b"\xef\xbb\xbf")), {})))
                except TooLong as error:
                    raise BadInput(
                        f"{path}: line {number:,} must be a {kind} example that the model can read, got {error}; use a "
                        "model with a longer --context, or another tokenizer"
                    ) from error
                except BadFile as error:
                    raise BadInput(
                        f"{path}: line {number:,} must be a {kind} example, got {error}; mend the line or leave it out"
                    ) from error
    except (BadFile, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: must be a file of {kind} examples, one JSON object a line, got {why}") from error
    if not made:
        raise BadInput(f"{path}: must hold at least one {kind} example, got none")
    return made
