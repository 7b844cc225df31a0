"""Files that are read from their begin: packed ones, .json arrays, and standard input.

A worker reads a small file whole. The parent process reads a larger one, in bounded memory, and
hands out what is in it.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from engine.errors import BadInput
from engine.output import program
from engine.tokens.reading import formats, packed, records, streams
from engine.tokens.reading.parts import Part, Raw, ReadOptions, Span

STDIN = Path("-")  # the source
NAME = Path("standard input")  # in messages
UNPACKED = 16 << 20  # bytes in a packed file that a worker reads
UNTOLD = 1 << 18  # bytes of a packed file that a worker reads, and that does not tell how much is in it
Reopen = Callable[[], io.BufferedReader] | None


def parts(path: Path, options: ReadOptions, start: int = 0) -> Iterator[tuple[Part, int]]:
    """Yields what a file holds from position `start` on, each part with the position after it.

    A position is a byte of what is in the file, or the number of a record of a .json array. Raises
    BadInput, BadFile or OSError.
    """
    size = os.stat(path).st_size
    if _is_small(path, size):
        if start == 0:
            yield Span("whole", str(path), 0, size, size), max(size, 1)
        return
    with packed.open_stream(path) as file:
        for raw, position in _stream(file, path, packed.suffixes(path)[0], options, partial(packed.open_stream, path)):
            if position > start:  # all is unpacked again, and counted as before
                yield raw, position


def _is_small(path: Path, size: int) -> bool:
    """Whether a worker may hold all that is in a file of this size. Raises BadFile or OSError."""
    if not packed.suffixes(path)[1] or size > records.SMALL:
        return size <= records.SMALL
    unpacked = packed.unpacked_size(path)
    return size <= UNTOLD if unpacked is None else unpacked <= UNPACKED


def read(span: Span, options: ReadOptions) -> Iterator[Raw]:
    """Yields the documents of a whole file. Raises BadInput, BadFile or OSError."""
    path = Path(span.file)
    with packed.open_stream(path) as file:
        for raw, _ in _stream(file, path, packed.suffixes(path)[0], options, partial(packed.open_stream, path)):
            yield from records.split(raw) if raw.kind == "lines" else (raw,)


def check_standard_input(is_given: bool) -> None:
    """Raises BadInput if standard input is closed or a terminal, or is given already as a source."""
    if is_given:
        raise BadInput(f"prepare: standard input can be read once, got the source {STDIN} twice; name it once")
    if sys.stdin is None or os.isatty(0):  # None: descriptor 0 was closed, and may be another file by now
        got = "none: it is closed" if sys.stdin is None else "a terminal"
        raise BadInput(
            f"prepare: standard input must be a pipe or a file, got {got}; for example: "
            f"zcat a.jsonl.gz | {program()} prepare - --out data"
        )


def standard_input(options: ReadOptions) -> Iterator[tuple[Part, int]]:
    """Yields what comes from standard input, each part with the position after it. Raises BadFile or OSError."""
    os.set_blocking(0, True)  # else a read of a pipe without content yet gives None
    with io.BufferedReader(packed.Unpacked(open(0, "rb", buffering=0, closefd=False)), packed.BUFFER) as file:
        yield from _stream(file, NAME, f".{options.format}", options)


def _stream(
    file: io.BufferedReader, path: Path, suffix: str, options: ReadOptions, reopen: Reopen = None
) -> Iterator[tuple[Raw, int]]:
    """Yields what a stream holds: blocks of lines, records or texts, each with the position after it.

    suffix: of what it holds. reopen: opens the stream again from its begin.
    """
    head = file.peek(formats.HEAD)[: formats.HEAD]
    found = formats.foreign(head, path if path != NAME else NAME.with_suffix(suffix))
    if found == formats.ARRAY and path == NAME:  # which has no suffix to say it
        yield from records.of_values(file, path)
    elif found is not None:
        size = max(file.raw.size, 1)
        yield Raw("foreign", found.encode("utf-8", "replace"), str(path), 0, size), size
    elif suffix in formats.LINES or (suffix == ".json" and formats.has_lines(head)):
        yield from records.blocks(file, path)
    elif suffix == ".json":
        yield from records.of_values(file, path)
    else:
        given = 0
        for raw, position in streams.documents_of_stream(file, str(path), options, reopen):
            share = file.raw.share(position) - given
            given += share
            yield raw._replace(num_bytes=max(share, 1)), position
