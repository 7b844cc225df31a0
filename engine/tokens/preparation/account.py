"""What workers give back, and the account of a preparation: counts, and the documents that are left out."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from engine.tokens.reading.parts import UNITS, NotText, Part, Raw, Span
from engine.tokens.reading.sources import unreadable
from model.files import open_file

MOST_FILES = 3  # files that are named of those that lose most
READ = 1 << 20  # bytes read at once to count lines
DIGEST = 16  # bytes of a text's digest, for --dedup

# Columns of Encoded.rows, one row per document or part of one.
IS_VAL, IS_FIRST, TOKENS, TEXT_BYTES, REPLACED, MARKERS, WITH_NUL = range(7)


@dataclass
class Loss:
    """Documents of one file that are left out."""

    file: str
    bytes: int
    documents: int
    why: str  # the first of them is left out
    unit: str = ""  # line or row
    place: int = 0  # line or row of the first of them, from 1; 0: the whole file
    before: int = 0  # byte of the file from which lines are counted

    @property
    def first(self) -> str:
        """Text such as "line 12, null"."""
        return f"{self.unit} {self.place:,}, {self.why}" if self.place else self.why

    def locate(self) -> "Loss":
        """This loss with its line counted from the begin of the file. Raises BadInput if that cannot be read."""
        if self.before:
            self.place, self.before = self.place + _lines(self.file, self.before), 0
        return self


def lines_before(part: Part) -> int:
    """The byte from which the places in a part are counted, if they are lines."""
    return part.start if isinstance(part, Span) and part.kind == "lines" else 0


def _lines(path: str, end: int) -> int:
    """Lines of a file that end before a byte."""
    count = 0
    try:
        with open_file(path) as file:
            while end > 0 and (piece := file.read(min(READ, end))):
                count, end = count + piece.count(b"\n"), end - len(piece)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return count


@dataclass
class Losses:
    """All documents that are left out."""

    bytes: int = 0
    files: list[Loss] = field(default_factory=list)  # those that lose most, without the last
    last: Loss | None = None

    @classmethod
    def from_json(cls, account: dict[str, Any]) -> "Losses":
        """The account that `asdict` gave."""
        *files, last = [one and Loss(**one) for one in (*account["files"], account["last"])]
        return cls(account["bytes"], files, last)

    def add(self, loss: Loss) -> None:
        """Adds a loss. Those of one file must follow each other. One of no bytes is none."""
        if not loss.bytes:
            return
        self.bytes += loss.bytes
        if self.last is None or self.last.file != loss.file:
            self._keep_largest()
            self.last = loss.locate()
        else:
            self.last.bytes += loss.bytes
            self.last.documents += loss.documents

    def _keep_largest(self) -> None:
        files = [*self.files, self.last] if self.last is not None else self.files
        self.files = sorted(files, key=lambda one: -one.bytes)[:MOST_FILES]  # stable: the first of equals stays
        self.last = None

    def largest(self) -> list[dict[str, Any]]:
        """The files that lose most, for the manifest."""
        self._keep_largest()
        return [{"file": one.file, "bytes": one.bytes, "first": one.first} for one in self.files]


@dataclass
class Encoded:
    """A tokenised batch: tokens of each split, in the order of the documents, and counts."""

    tokens: dict[str, np.ndarray]  # by split, (n,) uint16
    rows: np.ndarray  # (documents, 7) int64, of those that are text
    digests: np.ndarray | None = None  # of the texts of the documents, (those that begin here, 2) uint64, for --dedup
    source_bytes: int = 0  # of the files, text or not
    skipped: Counter = field(default_factory=Counter)  # by reason
    losses: list[Loss] = field(default_factory=list)  # of each file in turn

    def leave_out(self, part: Part, raw: Raw, error: NotText) -> None:
        """Counts a document that is not text."""
        self.skipped[error.reason] += 1
        if not self.losses or self.losses[-1].file != raw.file:
            unit = UNITS.get(raw.kind, "row")
            self.losses.append(Loss(raw.file, 0, 0, str(error), unit, raw.place, lines_before(part)))
        self.losses[-1].bytes += raw.num_bytes
        self.losses[-1].documents += 1


@dataclass
class Totals:
    """Counts of all documents so far."""

    documents: Counter = field(default_factory=Counter)  # by split
    skipped: Counter = field(default_factory=Counter)  # by reason
    text_bytes: int = 0
    source_bytes: int = 0  # of the files, text or not
    replaced: int = 0  # characters put in place of bad bytes
    markers: int = 0  # literal <|endoftext|> in the text
    with_nul: int = 0  # documents with NUL bytes
    losses: Losses = field(default_factory=Losses)

    @classmethod
    def from_json(cls, counts: dict[str, Any]) -> "Totals":
        """The counts that `to_json` gave."""
        made = {"documents": Counter(counts["documents"]), "skipped": Counter(counts["skipped"])}
        return cls(**counts | made | {"losses": Losses.from_json(counts["losses"])})

    def to_json(self) -> dict[str, Any]:
        """A copy of the counts as JSON."""
        counters = {"documents": dict(self.documents), "skipped": dict(self.skipped)}
        return vars(self) | counters | {"losses": asdict(self.losses)}

    def add(self, encoded: Encoded) -> None:
        """Adds the counts of a batch, and what it leaves out. Raises BadInput if a file cannot be read."""
        rows = encoded.rows
        num_val = int((rows[:, IS_VAL] * rows[:, IS_FIRST]).sum())
        self.documents["val"] += num_val
        self.documents["train"] += int(rows[:, IS_FIRST].sum()) - num_val
        self.text_bytes += int(rows[:, TEXT_BYTES].sum())
        self.replaced += int(rows[:, REPLACED].sum())
        self.markers += int(rows[:, MARKERS].sum())
        self.with_nul += int(rows[:, WITH_NUL].sum())
        self.source_bytes += encoded.source_bytes
        self.skipped += encoded.skipped
        for loss in encoded.losses:
            self.losses.add(loss)
