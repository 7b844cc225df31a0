"""Documents of a text that is read from its begin to its end, in bounded memory.

Without a separator the text is one document. With one, the documents are what lies between the
separators, found from the left, without the line ends around it. What is white space alone is none.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from engine.errors import BadInput
from engine.tokens.reading import cuts
from engine.tokens.reading.cuts import Scan
from engine.tokens.reading.parts import Raw, ReadOptions
from model.files import BadFile

LINE_ENDS = b"\r\n"


class Group(NamedTuple):
    """Documents that follow each other, with their separators: from byte `begin` to before `after`."""

    begin: int
    after: int
    content: bytes


class Long(NamedTuple):
    """One document of more than cuts.LONG bytes, not held in memory: from byte `begin` to before `after`.

    The scan has the begin and end of the text in it. is_space: all of it is ASCII white space. spool: a
    copy of the text in a temporary file.
    """

    begin: int
    after: int
    scan: Scan
    is_space: bool
    spool: BinaryIO | None

    def refusal(self, file: str) -> Raw | None:
        """The document as one that is left out, if it is no text."""
        if (why := self.scan.problem) is None:
            return None
        words = why.reason + "\n" + str(why).removeprefix(why.reason).strip()
        return Raw("refused", words.encode(), file, self.scan.start, self.after - self.begin)

    def lengths(self) -> list[int]:
        """Bytes that each part stands for. Together they are those of the document and its separator."""
        ends = [*self.scan.cuts, self.after]
        return [end - begin for begin, end in zip([self.begin, *ends], ends, strict=False)]


def separator_of(options: ReadOptions) -> bytes:
    """The string that ends a document, b"" if there is none."""
    return (options.split_on or "").encode("utf-8")


def groups(file: BinaryIO, options: ReadOptions, is_spooled: bool = False) -> Iterator[Group | Long]:
    """Yields all documents of a stream, about cuts.BLOCK bytes at a time.

    is_spooled: a document of more than cuts.LONG bytes is copied into a temporary file.
    """
    separator = separator_of(options)
    begin, held = 0, bytearray()
    searched = 0  # no separator begins before this byte of what is held
    while True:
        block = file.read(cuts.BLOCK)
        last = len(held[searched:].split(separator)[-1]) if separator else len(held)
        whole = len(held) - last if last < len(held) - searched else 0
        searched = max(whole, len(held) - len(separator) + 1)
        if not block and len(held) - whole <= cuts.LONG:  # the last document ends with the stream
            whole = len(held)
        if not whole and options.is_sample and (place := cuts.PLACE.search(held, cuts.PART)):
            whole = place.start()
        if whole:
            yield Group(begin, begin + whole, bytes(held[:whole]))
            begin, searched = begin + whole, max(searched - whole, 0)
            del held[:whole]
        if len(held) > cuts.LONG:
            long, rest = _long(begin, bytes(held) + block, file, options, is_spooled)
            begin, held, searched = long.after, bytearray(rest), 0
            if not separator or not long.is_space:
                yield long
            elif long.spool is not None:
                long.spool.close()
        elif not block:
            return
        else:
            held += block


def _long(begin: int, held: bytes, file: BinaryIO, options: ReadOptions, is_spooled: bool) -> tuple[Long, bytes]:
    """Reads a document to its end. Returns it and what was read of the next one."""
    separator = separator_of(options)
    line_ends, overlap = (LINE_ENDS, len(separator) - 1) if separator else (b"", 0)
    scan, position, ends = Scan(begin, options.is_replacing), begin, b""
    is_space, spool = True, None
    while True:
        at = held.find(separator) if separator else -1
        block = file.read(cuts.BLOCK) if at < 0 else b""
        size = at if at >= 0 else max(len(held) - overlap, 0) if block else len(held)
        body, position = ends + held[:size], position + size
        if scan.start == scan.end and (first := body.lstrip(line_ends)) != body:
            scan = Scan(position - len(first), options.is_replacing)
            body = first
        kept = body.rstrip(line_ends)
        ends = body[len(kept) :]
        scan.update(kept)
        is_space = is_space and (not kept or kept.isspace())
        if is_spooled:
            spool = _spooled(spool, kept)
        if not block:
            break
        held = held[size:] + block
    scan.finish()
    after, rest = (position + len(separator), held[at + len(separator) :]) if at >= 0 else (position, b"")
    if spool is not None:
        spool.seek(0)
    return Long(begin, after, scan, is_space, spool), rest


def _spooled(spool: BinaryIO | None, content: bytes) -> BinaryIO:
    """Writes to the temporary file, or to a new one. Raises BadInput if there is no room."""
    try:
        spool = tempfile.TemporaryFile() if spool is None else spool  # noqa: SIM115 it goes with the document
        spool.write(content)
        spool.flush()
    except OSError as error:
        raise BadInput(
            f"prepare: a document of over {cuts.LONG >> 20} MiB of standard input needs a temporary file, got "
            f"{error.strerror or error}; set TMPDIR to a directory with room, or write the text to a file and name that"
        ) from error
    return spool


def documents(content: bytes, separator: bytes, begin: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yields (first byte, bytes that it stands for, text) of each document of a group.

    begin: the byte at which the group begins.
    """
    if not separator:
        yield begin, len(content), content
        return
    found, at = [], 0
    for piece in content.split(separator):
        if piece and not piece.isspace():
            found.append((at, piece))
        at += len(piece) + len(separator)
    done = 0  # what is no document counts with the one before it, or with the first
    for index, (at, piece) in enumerate(found, 1):
        end = found[index][0] if index < len(found) else len(content)
        text = piece.lstrip(LINE_ENDS)
        yield begin + at + len(piece) - len(text), end - done, text.rstrip(LINE_ENDS)
        done = end


def documents_of_stream(
    file: BinaryIO, path: str, options: ReadOptions, reopen: Callable[[], BinaryIO] | None = None
) -> Iterator[tuple[Raw, int]]:
    """Yields the documents of a stream such as a packed text, each with the byte of the stream after it.

    reopen: opens the stream again from its begin, for the parts of a document of more than cuts.LONG
    bytes: all before it is unpacked again for each such document. Without it they come from a copy of
    the document in a temporary file.
    """
    separator, after, is_empty = separator_of(options), 0, True
    for found in groups(file, options, is_spooled=reopen is None):
        if isinstance(found, Group):
            after = found.begin
            for place, num_bytes, text in documents(found.content, separator, found.begin):
                after, is_empty = after + num_bytes, False
                yield Raw("file", text, path, place, num_bytes), after
            after = found.after
            continue
        after, is_empty = found.after, False
        with found.spool or reopen() as copy:
            if (refused := found.refusal(path)) is not None:
                yield refused, found.after
            else:
                yield from _parts(copy, 0 if found.spool else found.scan.start, found, path)
    if is_empty:  # counted as an empty document, as a file of white space is
        yield Raw("file", b"", path, 0, after), max(after, 1)


def _parts(file: BinaryIO, start: int, long: Long, path: str) -> Iterator[tuple[Raw, int]]:
    """Yields the parts of a document, which begins at byte `start` of the file."""
    scan, after = long.scan, long.begin
    while start:  # an unpacked stream cannot seek
        start -= len(read_exactly(file, min(cuts.BLOCK, start)))
    for (begin, end), num_bytes in zip(scan.parts(), long.lengths(), strict=True):
        after, is_first = after + num_bytes, begin == scan.start
        content = read_exactly(file, end - begin)
        has_nul = scan.has_nul and is_first
        yield Raw("part", content, path, 0, num_bytes, None, is_first, scan.digest, has_nul), after


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Reads `size` bytes, which must be there. Raises BadFile."""
    content = file.read(size)
    while len(content) < size and (more := file.read(size - len(content))):  # of a packed stream a read may give less
        content += more
    if len(content) < size:
        raise BadFile("a file that became shorter while it was read")
    return content
