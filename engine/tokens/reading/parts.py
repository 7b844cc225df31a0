"""Pieces of the sources: raw documents, and spans of files that a worker reads itself."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "val"]


class NotText(Exception):
    """Why a document is left out: a reason to count, such as "not UTF-8", and where or what."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} {detail}".rstrip())
        self.reason = reason


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents. One for a whole preparation."""

    text_field: str = "text"  # field of records, column of tables
    split_on: str | None = None  # string that ends a document of a text file; None: a text file is one document
    is_replacing: bool = False  # U+FFFD for bytes that are not UTF-8
    format: str = "jsonl"  # of standard input: jsonl or txt
    is_sample: bool = False  # for an estimate: parts of a long text as documents, so that it is not read to its end


class Raw(NamedTuple):
    """One document in memory, for `documents.parse`; or, in the middle of a long text, a part of one."""

    # file, json (a line), record, row, null, foreign, broken, part or refused; or lines: several, which a worker splits
    kind: str
    content: bytes
    file: str  # the path
    place: int  # line, record or row from 1, of a span of lines within it, or byte of a text; 0: the file, or its begin
    num_bytes: int  # of the file that this document stands for
    split: Split | None = None  # where it is known before; None: the hash of the text decides
    is_first: bool = True  # False: it goes on where the document before it ended, without an end-of-text token
    digest: bytes = b""  # of the whole document's text, where this is a part of it; see encode
    has_nul: bool = False  # of the first part: whether the whole document has NUL bytes


class Span(NamedTuple):
    """Documents of a file that lie from `start` to `end`: a worker reads them."""

    kind: str  # what reads it: text, lines, rows, or whole: records or packed text, from the file's begin
    file: str  # the path
    start: int  # byte, or row of a table
    end: int  # exclusive
    num_bytes: int  # of the file that the span stands for
    split: Split | None = None  # as of Raw; so are the next three
    is_first: bool = True
    digest: bytes = b""
    has_nul: bool = False


Part = Raw | Span
UNITS = {"json": "line", "record": "record", "broken": "record", "file": "document at byte"}
UNITS |= {"refused": "document at byte"}  # what a place counts, by kind; else rows
