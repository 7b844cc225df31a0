"""Text files: a .txt, .md or .py file is one document."""

import os
from collections.abc import Iterator
from pathlib import Path

from engine.tokens import formats
from engine.tokens.reading.parts import Part, Raw, ReadOptions, Span
from model.files import open_file


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields the parts of a text file from byte `start` on, each with the byte after it.

    Raises BadFile or OSError.
    """
    size = os.stat(path).st_size
    if start == 0 or start < size:
        yield Span("text", str(path), start, size, size), max(size, 1)


def read(span: Span, options: ReadOptions) -> Iterator[Raw]:
    """Yields the documents of a span. Raises BadFile or OSError."""
    path = Path(span.file)
    with open_file(path) as file:
        head = file.read(formats.HEAD)
        if (found := formats.foreign(head, path, file)) is not None:
            yield Raw("foreign", found.encode("utf-8", "replace"), span.file, 0, os.fstat(file.fileno()).st_size)
            return
        file.seek(0)
        content = file.read()  # in one piece: two would be held twice
        yield Raw("file", content, span.file, 0, len(content))
