"""Rows of metrics.jsonl, read line by line: a damaged line costs itself and no other.

A line ends with b"\\n" alone. It is a row if it is UTF-8 and a JSON object with a whole number of
steps. Steps rise from row to row: rows that break this count as damaged, as few as possible, and of
two with the same step the earlier. Memory does not grow with the file, unless its order is broken.

Free of PyTorch, which `gpt2 verify` does not need.
"""

import errno
import json
import re
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from model.files import BadFile, open_file

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
LONGEST_LINE = 1 << 20  # bytes; a longer line is no row and is never in memory as a whole
MOST = 2**63  # steps and tokens are below
BOM = b"\xef\xbb\xbf"  # of UTF-8; editors put it in front of a file
# The beginning of every row that a run writes. To read it is several times faster than to parse the row.
BEGINNING = re.compile(rb'\{"step": ([0-9]{1,18}), "tokens": ([0-9]{1,18})[,}]')

# NaN and Infinity, which are no JSON, may stand in rows of an earlier version.
_decoder = json.JSONDecoder(parse_constant=lambda name: None)


class Line(NamedTuple):
    """One line of a file: its bytes from `start` to `end`."""

    start: int
    end: int
    text: bytes  # with its line end; of a line longer than LONGEST_LINE only the beginning

    @property
    def is_cut(self) -> bool:
        """Whether it has no line end: the last line of a file whose writer was killed."""
        return self.end - self.start == len(self.text) and not self.text.endswith(b"\n")


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file, without the byte order mark of its first."""
    end = 0
    with _opened(path) as file:
        while text := file.readline(LONGEST_LINE):
            start, end, piece = end, end + len(text), text
            while not piece.endswith(b"\n") and (piece := file.readline(LONGEST_LINE)):
                end += len(piece)
            if start == 0 and text.startswith(BOM):
                start, text = len(BOM), text.removeprefix(BOM)
            yield Line(start, end, text)


def _opened(path: Path) -> BinaryIO:
    try:
        return open_file(path)
    except BadFile as error:
        text = str(error) if error.__cause__ else f"it is {error}"
        raise OSError(errno.EINVAL, text, str(path)) from error


def parse(text: bytes) -> dict[str, Any] | None:
    """The row that a line holds, or None if it is damaged."""
    try:
        row = _decoder.decode(text.decode())
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 <= step < MOST else None


def dump(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON, which has no NaN and no infinity: they become null."""
    finite = {key: number(value) if isinstance(value, float) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and abs(value) <= sys.float_info.max  # False for NaN
    return value if is_number else None


def read(path: Path) -> Iterator[tuple[Line, dict[str, Any] | None]]:
    """Every line of a metrics.jsonl with its row, or with None if it is damaged.

    Raises OSError if the file cannot be read.
    """
    wrong = _misplaced(path)
    for line in lines(path):
        yield line, None if line.start in wrong else parse(line.text)


# ---- Order --------------------------------------------------------------------------------------------------------


def _places(path: Path) -> Iterator[tuple[int, int, int]]:
    """(start, step, tokens) of each line that is a row."""
    for start, _, text in lines(path):
        if found := BEGINNING.match(text):
            yield start, int(found[1]), int(found[2])
        elif (row := parse(text)) is not None:
            tokens = row.get("tokens")
            yield start, row["step"], tokens if type(tokens) is int and abs(tokens) < MOST else -1


def _misplaced(path: Path) -> set[int]:
    """Starts of the rows to leave out, so that steps rise from row to row."""
    if all(one[1] < other[1] for one, other in pairwise(_places(path))):
        return set()
    starts, steps, tokens = array("q"), array("q"), array("q")
    for start, step, count in _places(path):
        starts.append(start)
        steps.append(step)
        tokens.append(count)
    return {starts[index] for index in _fewest(steps, tokens)}


def _fewest(steps: Sequence[int], tokens: Sequence[int]) -> set[int]:
    """Indices of the fewest rows without which the steps rise: all but the longest rising subsequence.

    If either of two neighbours could go, tokens decide. They are proportional to the steps made.
    """
    left_out = {index for index in range(len(steps) - 1) if steps[index] >= steps[index + 1]}
    left_out = {wrong for index in left_out if (wrong := _worse(steps, tokens, index)) is not None}
    ends, end_steps = [], []  # of the rising subsequences found, by length: the one with the lowest last step
    before = array("q", [-1]) * len(steps)  # index of the row before in that subsequence
    for index, step in enumerate(steps):
        if index not in left_out:
            length = bisect_left(end_steps, step)
            before[index] = ends[length - 1] if length else -1
            ends[length : length + 1], end_steps[length : length + 1] = [index], [step]
    is_kept, index = bytearray(len(steps)), ends[-1]
    while index >= 0:
        is_kept[index], index = True, before[index]
    return {index for index in range(len(steps)) if not is_kept[index]}


def _worse(steps: Sequence[int], tokens: Sequence[int], index: int) -> int | None:
    """Which of the rows `index` and `index` + 1 has the wrong step, or None if their neighbours do not tell."""
    pair = index, index + 1
    before, after = steps[index - 1] if index else -1, steps[index + 2] if index + 2 < len(steps) else MOST
    if not all(before < steps[one] < after for one in pair):
        return None
    near = [other for other in (index - 1, index + 2, index - 2, index + 3) if 0 <= other < len(steps)][:2]
    points = [(steps[other], tokens[other]) for other in near] + [(0, 0)] * (2 - len(near))
    (x, y), (to_x, to_y) = points
    fits = [(to_x - x) * (tokens[one] - y) == (to_y - y) * (steps[one] - x) for one in pair]  # on a straight line
    return None if fits[0] == fits[1] else pair[fits[0]]
