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
    is_cut: bool = True  # long texts come in parts; False: a worker holds them whole
    is_sample: bool = (
        False  # for an estimate: some parts of a long text as documents, so that it is not read to its end first
    )


class Raw(NamedTuple):
    """One document in memory, for `documents.parse`; or, in the middle of a long text, a part of one."""

    kind: str  # file, json, row, null, foreign, part or refused; see documents.parse
    content: bytes
    file: str  # the path
    place: int  # line or row from 1, byte of a document of a text; 0: the whole file, or its begin
    num_bytes: int  # of the file that this document stands for
    split: Split | None = None  # where it is known before; None: the hash of the text decides
    is_first: bool = True  # False: it goes on where the document before it ended, without an end-of-text token
    digest: bytes = b""  # of the whole document's text, where this is a part of it; see encode
    has_nul: bool = False  # of the first part: whether the whole document has NUL bytes


class Span(NamedTuple):
    """Documents of a file that lie from `start` to `end`: a worker reads them."""

    kind: str  # what reads it: text, lines, parquet or arrow
    file: str  # the path
    start: int  # byte, or row group or record batch
    end: int  # exclusive
    num_bytes: int  # of the file that the span stands for
    split: Split | None = None  # as of Raw; so are the next three
    is_first: bool = True
    digest: bytes = b""
    has_nul: bool = False


Part = Raw | Span
