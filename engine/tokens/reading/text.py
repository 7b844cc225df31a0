"""Text files: a .txt, .md or .py file is one document, or several with a separator between them.

A worker reads a file of at most cuts.LONG bytes whole. The parent reads a longer one once, to find
the documents in it, and to check and hash those that are themselves so long. Workers read the parts.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.tokens.reading import cuts, formats
from engine.tokens.reading.parts import Part, Raw, ReadOptions, Span
from engine.tokens.reading.streams import Group, documents, groups, read_exactly, separator_of
from model.files import open_file

WINDOWS, STRIDE = 40, 17  # of a sample; without a common divisor
WINDOW_BYTES = 1 << 19


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields the parts of a text file from byte `start` on, each with the byte after it.

    Raises BadFile or OSError.
    """
    size = os.stat(path).st_size
    if size <= cuts.LONG:
        found = iter([(Span("text", str(path), 0, size, size), max(size, 1))])
    else:
        found = _parts_of_long(path, options)
    yield from ((part, position) for part, position in found if position > start)


def _parts_of_long(path: Path, options: ReadOptions) -> Iterator[tuple[Part, int]]:
    with open_file(path) as file:
        if (foreign := _foreign(file.read(formats.HEAD), file, path)) is not None:
            yield foreign, foreign.num_bytes
            return
        if options.is_sample:
            yield from _windows(path, file)
            return
        file.seek(0)
        for found in groups(file, options):
            if isinstance(found, Group):
                begin, after, _ = found
                yield Span("text", str(path), begin, after, after - begin), after
            elif (refused := found.refusal(str(path))) is not None:
                yield refused, found.after
            else:
                scan, position = found.scan, found.begin
                for (begin, end), num_bytes in zip(scan.parts(), found.lengths(), strict=True):
                    position, is_first = position + num_bytes, begin == scan.start
                    has_nul = scan.has_nul and is_first
                    span = Span("text", str(path), begin, end, num_bytes, None, is_first, scan.digest, has_nul)
                    yield span, position


def _windows(path: Path, file: BinaryIO) -> Iterator[tuple[Span, int]]:
    """Parts at equal distances in a long text, in an order in which the first few lie apart too."""
    size = os.fstat(file.fileno()).st_size
    for index in range(WINDOWS):
        at = size * (index * STRIDE % WINDOWS) // WINDOWS
        file.seek(at)
        content = file.read(2 * WINDOW_BYTES)
        begin = cuts.PLACE.search(content, cuts.LONGEST_SPACE)
        end = cuts.PLACE.search(content, WINDOW_BYTES)
        if begin and end and begin.start() < end.start():
            begin, end = at + begin.start(), at + end.start()
            yield Span("text", str(path), begin, end, end - begin), end


def read(span: Span, options: ReadOptions) -> Iterator[Raw]:
    """Yields the documents of a span, or its part of one. Raises BadFile or OSError."""
    with open_file(span.file) as file:
        file.seek(span.start)
        if span.digest:
            content = read_exactly(file, span.end - span.start)
            yield Raw("part", content, span.file, 0, *span[4:])
            return
        is_whole = not span.start and os.fstat(file.fileno()).st_size <= cuts.LONG
        # In one piece: two would be held twice.
        content = file.read() if is_whole else read_exactly(file, span.end - span.start)
        if not span.start and (foreign := _foreign(content[: formats.HEAD], file, span.file)) is not None:
            yield foreign
            return
    is_empty = is_whole
    for place, num_bytes, text in documents(content, separator_of(options), span.start):
        is_empty = False
        yield Raw("file", text, span.file, place, num_bytes)
    if is_empty:  # no document between the separators: counted as an empty one, as without them
        yield Raw("file", b"", span.file, 0, len(content))


def _foreign(head: bytes, file: BinaryIO, path: str | Path) -> Raw | None:
    """The whole file as one that is left out, if it cannot be text."""
    found = formats.foreign(head, path, file)
    if found is None:
        return None
    return Raw("foreign", found.encode("utf-8", "replace"), str(path), 0, os.fstat(file.fileno()).st_size)
