"""Documents of a text that is read from its begin to its end."""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from engine.tokens.reading.parts import Raw, ReadOptions


def documents_of_stream(
    file: BinaryIO, path: str, options: ReadOptions, reopen: Callable[[], BinaryIO] | None = None
) -> Iterator[tuple[Raw, int]]:
    """Yields the documents of a stream such as a packed text, each with the byte of the stream after it.

    reopen: opens the stream again from its begin.
    """
    content = file.read()
    yield Raw("file", content, path, 0, len(content)), max(len(content), 1)
