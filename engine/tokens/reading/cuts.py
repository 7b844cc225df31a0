r"""A long text in one pass: what a check of the whole text would say, and where it may be cut.

A cut stands before ASCII white space that follows a character which is no white space. GPT-2's
pieces (tokenizer.SPLIT_PATTERN) are the same with and without the cut:
1. A piece is all white space, or has white space at its begin alone. So none holds both characters
   at the cut: one piece ends there, and the next begins there.
2. Right of the cut: no rule looks back, so the same pieces follow.
3. Left of the cut: `\s++$` and `\s+(?!\S)` look ahead from white space, and see at most the
   character before the cut. All other rules stop at white space as they stop at the end of text.
Plain bytes may be cut anywhere. A byte below 0x80 is never part of another character, so the parts
are valid UTF-8, and have the same bad bytes, if the whole text has.
"""

import codecs
import hashlib
import re
from itertools import pairwise

from engine.tokens.reading.parts import NotText

LONG = 8 << 20  # bytes of a document from which on it is read in parts
PART = 1 << 20  # bytes of a part, which goes on from there to the next place for a cut
BLOCK = 1 << 18  # bytes that are read at a time
SPLIT_HASH = 8  # bytes of the hash that decides a document's split

# White space as in tokenizer.SPACES, which is one to three bytes in UTF-8.
PLACE = re.compile(
    rb"(?<![\t-\r ])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)"
    rb"(?<!\xe3\x80\x80)[\t-\r ]"
)
LONGEST_SPACE = 3  # bytes


class Scan:
    """A pass over one text: `update` takes its bytes in turn, `finish` ends it.

    start: the text's first byte in the file. is_replacing: as in ReadOptions.
    """

    def __init__(self, start: int, is_replacing: bool):
        self.start, self.end, self.is_replacing = start, start, is_replacing
        self.has_nul = False
        self.problem: NotText | None = None  # after `finish`: why the text is left out
        self.cuts: list[int] = []  # bytes of the file
        self._before = b""  # the last bytes, which may be white space
        self._wanted = start + PART  # first byte at which the next cut may be
        self._hash = hashlib.blake2b(digest_size=SPLIT_HASH)
        self._rest = b""  # begin of a character that goes on in the next block
        self._decoded = self._characters = self._replaced = 0
        self._bad: tuple[int, int] | None = None  # the first byte that is not UTF-8: where, and which
        self._is_blank = True

    def update(self, block: bytes) -> None:
        """Takes the next bytes of the text."""
        self._cut(block)
        self.end += len(block)
        self.has_nul = self.has_nul or b"\0" in block
        self._decode(block, is_last=False)

    def finish(self) -> None:
        """Ends the text, and sets `problem` as documents.parse would raise it."""
        self._decode(b"", is_last=True)
        size = self.end - self.start
        if self._bad is not None:
            at, byte = self._bad
            self.problem = NotText("not UTF-8", f"at byte {at:,} of {size:,} (0x{byte:02x})")
        elif 4 * self._replaced > self._characters:
            self.problem = NotText("mostly not UTF-8", f"in {self._replaced:,} of {self._characters:,} characters")
        elif self._is_blank:
            self.problem = NotText("empty")

    @property
    def digest(self) -> bytes:
        """Hash of the text in UTF-8, without byte-order mark, with U+FFFD in place of bad bytes."""
        return self._hash.digest()

    def parts(self) -> list[tuple[int, int]]:
        """The parts, from their first byte to the byte after them."""
        return list(pairwise([self.start, *self.cuts, self.end]))

    def _cut(self, block: bytes) -> None:
        window, base = self._before + block, self.end - len(self._before)
        while found := PLACE.search(window, max(self._wanted - base, len(self._before))):
            self.cuts.append(base + found.start())
            self._wanted = self.cuts[-1] + PART
        self._before = window[-LONGEST_SPACE:]

    def _decode(self, block: bytes, is_last: bool) -> None:
        if self._bad is not None:
            return
        content = self._rest + block if self._rest else block
        try:
            text, used = codecs.utf_8_decode(content, "strict", is_last)
            good = content[:used]
        except UnicodeDecodeError as error:
            if not self.is_replacing:
                self._bad = self._decoded + error.start, content[error.start]
                return
            text, used = codecs.utf_8_decode(content, "surrogateescape", is_last)
            text, replaced = re.subn("[\ud800-\udfff]", "\ufffd", text)
            self._replaced += replaced
            good = text.encode("utf-8")
        if not self._decoded and text.startswith("\ufeff"):  # the byte-order mark
            text, good = text[1:], good[len(codecs.BOM_UTF8) :]
        self._rest = content[used:]
        self._decoded += used
        self._characters += len(text)
        self._is_blank = self._is_blank and (not text or text.isspace())
        self._hash.update(good)
