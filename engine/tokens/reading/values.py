"""JSON values one behind another, read from a stream: the elements of an array, or values between white space.

Only the value at hand is in memory.
"""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

PIECE = 1 << 18  # bytes that are read at once
LONGEST = 1 << 28  # characters of a value
EDGE = 16  # characters: an error so near to the end of what is read may come of the end
SPACE = " \t\r\n"
# Integers of any length pass, and control characters in strings: a record's own reader judges those.
DECODER = json.JSONDecoder(parse_int=float, strict=False)


class Broken(Exception):
    """What is no JSON: no value after it can be found."""


class Value(NamedTuple):
    """One value as it is written."""

    content: bytes
    share: float  # of what was read of the file so far, up to the end of the value


class _Text:
    """Text of a stream, from the place that the reader has reached to what is read so far."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bad bytes stay in their record
        self.text, self.at = "", 0
        self.passed = 0  # characters before text
        self.is_whole = False  # whether the stream is at its end
        self.more(1)
        self.at = self.text.startswith("\ufeff")

    def more(self, least: int) -> None:
        """Reads on by at least this number of bytes, and forgets what the reader has passed."""
        content = self.file.read(max(least, PIECE))
        self.is_whole = not content
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + self.decoder.decode(content, final=not content), 0

    def peek(self) -> str:
        """The next character that is no white space, which is passed over; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self.more(1)

    def value(self) -> str:
        """Passes the value that begins here. Raises Broken if there is none."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                # 12 may be the begin of 123, and 1 that of 1e5: a number ends before what is no part of it
                if self.is_whole or end < len(self.text) - EDGE or isinstance(value, str | dict | list):
                    found, self.at = self.text[self.at : end], end
                    return found
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - EDGE
                if self.is_whole or not is_cut:
                    raise Broken(f"({error.msg.removesuffix(' at')})") from error
            except RecursionError as error:
                raise Broken("(too many brackets)") from error
            if len(self.text) - self.at > LONGEST:
                raise Broken(f"(no end in {len(self.text) - self.at:,} characters)")
            self.more(len(self.text) - self.at)


def read(file: BinaryIO) -> Iterator[Value]:
    """Yields the values of a stream. Raises Broken where it is no JSON."""
    text = _Text(file)
    is_array = text.peek() == "["
    text.at += is_array
    is_first = True
    while following := text.peek():
        if is_array and following == "]":
            text.at += 1
            if text.peek():
                raise Broken("(more behind the end of the array)")
            return
        if is_array and not is_first:
            if following != ",":
                raise Broken("(no comma behind it)")
            text.at += 1
            text.peek()
        found = text.value().encode("utf-8", "surrogateescape")
        yield Value(found, (text.passed + text.at) / (text.passed + len(text.text)))
        is_first = False
    if is_array:
        raise Broken("(the array has no end)")
