"""Records: the lines of .jsonl and .ndjson files, and the values of .json files, each a document.

Each element of a .json array is one. A .json file that is no array holds lines, or values that go
over several lines.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.tokens.reading import formats, packed, values
from engine.tokens.reading.parts import Part, Raw, ReadOptions, Span
from model.files import open_file

SPAN = 1 << 20  # bytes of a span of lines
SMALL = 2 << 20  # bytes of a .json or packed file that a worker reads from its begin


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields the lines of a plain file from byte `start` on as spans, each with the byte after it.

    Raises BadFile or OSError.
    """
    size = os.stat(path).st_size
    if size > SPAN:
        with open_file(path) as file:
            if (found := _foreign(file, path)) is not None:
                yield found, size
                return
    for begin in range(start, size, SPAN):
        end = min(begin + SPAN, size)
        yield Span("lines", str(path), begin, end, end - begin), end


def is_cut_between_lines(path: Path) -> bool:
    """Whether a plain .json file is large and holds lines. Raises BadFile or OSError."""
    if os.stat(path).st_size <= SMALL:
        return False
    with open_file(path) as file:
        return formats.has_lines(file.read(formats.HEAD))


def _foreign(file: BinaryIO, path: Path) -> Raw | None:
    """The whole file as one document, if it cannot be records."""
    found = formats.foreign(file.read(formats.HEAD), path, file)
    if found is None:
        return None
    return Raw("foreign", found.encode("utf-8", "replace"), str(path), 0, os.fstat(file.fileno()).st_size)


def read(span: Span, options: ReadOptions) -> Iterator[Raw]:
    """Yields the documents of the lines that begin in a span.

    Places are without the lines that end before the span. Raises BadFile or OSError.
    """
    with open_file(span.file) as file:
        if span.start == 0 and (found := _foreign(file, Path(span.file))) is not None:
            yield found
            return
        position, number = max(span.start - 1, 0), 0
        file.seek(position)
        if span.start:  # to the end of the line that begins before the span, or to the span's end in it
            before = file.readline(span.end - position)
            position, number = position + len(before), int(before != b"\n")
        while position < span.end and (line := file.readline()):
            position += len(line)
            number += 1
            if line.strip():
                yield Raw("json", line, span.file, number, len(line))


def count_lines(path: str | Path, start: int, end: int) -> int:
    """Number of lines of a file that end in the bytes from `start` to `end`."""
    with open_file(path) as file:
        file.seek(start)
        count, left = 0, end - start
        while left > 0 and (block := file.read(min(left, packed.BLOCK))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


def blocks(file: io.BufferedReader, path: Path) -> Iterator[tuple[Raw, int]]:
    """Yields the content of a stream in blocks of whole lines, each with the byte after it.

    file: its `raw` is a packed.Unpacked.
    """
    number, position, given = 1, 0, 0
    while block := file.read(packed.BLOCK):
        if not block.endswith(b"\n"):
            block += file.readline()
        position += len(block)
        share = file.raw.share(position) - given
        given += share
        yield Raw("lines", block, str(path), number, share), position
        number += block.count(b"\n")


def split(block: Raw) -> Iterator[Raw]:
    """Yields the documents of a block of lines, each with its share of the file."""
    position, given, size = 0, 0, len(block.content)
    for number, line in enumerate(io.BytesIO(block.content), block.place):
        position += len(line)
        if line.strip():
            share = max(block.num_bytes * position // size - given, 1)
            yield Raw("json", line, block.file, number, share)
        given = block.num_bytes * position // size


def of_values(file: io.BufferedReader, path: Path) -> Iterator[tuple[Raw, int]]:
    """Yields the values of a stream, each with its number.

    file: its `raw` is a packed.Unpacked.
    """
    number, given = 0, 0
    try:
        for number, (content, part) in enumerate(values.read(file), 1):
            share = max(int(file.raw.consumed * part) - given, 1)
            given += share
            yield Raw("record", content, str(path), number, share), number
    except values.Broken as error:
        share = max(file.raw.size - given, 1)
        yield Raw("broken", str(error).encode(), str(path), number + 1, share), number + 1
