"""What a resumed run does with metrics.jsonl and samples.txt before it goes on.

Steps from the checkpoint on are made again, so their rows and samples are dropped. So are damaged
lines, and a copy of the file as it was is kept. Whatever fails here is one line, and the run goes
on: the weights matter more than the record of how they came about.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from engine.run import rows
from model.files import BadFile, open_file

SAMPLE_HEADING = re.compile(rb"^=== step ([0-9]{1,18}) ===\n", re.MULTILINE)
CHUNK = 1 << 16  # bytes read or copied at a time
Say = Callable[[str], None]


@dataclass
class Found:
    """What to drop from a file: `count` lines in spans of bytes, and all that follows `end`."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0
    end: int = 0

    def leave_out(self, line: rows.Line) -> None:
        """Adds a line."""
        is_next = bool(self.spans) and self.spans[-1][1] == line.start
        self.spans.append((self.spans.pop()[0] if is_next else line.start, line.end))
        self.count += 1


def keep_before(path: Path, say: Say) -> None:
    """Gives another name to what a run left that has no checkpoint to go on from."""
    try:
        if path.is_file() and path.stat().st_size:
            aside = _unused(path, "before")
            path.rename(aside)
            say(f"{path.name}: what a run without a checkpoint left is kept as {aside.name}")
    except OSError as error:
        say(f"{path.name}: what a run without a checkpoint left cannot be kept: {error.strerror or error}")


def drop_rows_from(path: Path, step: int, keep: Callable[[dict[str, Any]], None], say: Say) -> None:
    """Drops the rows from `step` on, and damaged lines. Calls `keep` with each row that stays."""

    def find() -> Found:
        found = Found()
        for line, row in rows.read(path):
            if not found.end and line.start:  # a byte order mark, which other readers of JSON refuse
                found.spans.append((0, line.start))
                found.count += 1
            if row["step"] >= step if row is not None else line.is_cut:
                break
            if row is not None:
                keep(row)
            else:
                found.leave_out(line)
            found.end = line.end
        return found

    _drop(path, find, "line", say)


def drop_samples_from(path: Path, step: int, say: Say) -> None:
    """Drops the samples from `step` on, by their headings."""

    def find() -> Found:
        found, is_kept = Found(), True
        for line in rows.lines(path):
            if heading := SAMPLE_HEADING.fullmatch(line.text):
                is_kept = int(heading[1]) < step
            if not is_kept:
                found.leave_out(line)
            found.end = line.end
        if not is_kept:  # the usual case, in which the rest of the file is dropped
            found.end = found.spans.pop()[0]
        found.count = len(found.spans)
        return found

    _drop(path, find, "sample", say)


def last_sample(path: Path, step: int | None = None) -> str:
    """The newest sample of a samples.txt, or "" if there is none, or it is not of this step.

    Reads no more than the file's end.
    """
    try:
        with open_file(path) as file:
            size = start = file.seek(0, os.SEEK_END)
            while start > 0:
                start = max(0, 2 * start - size - CHUNK)  # twice as much as before, and a chunk
                file.seek(start)
                text = file.read(size - start)
                found = [heading for heading in SAMPLE_HEADING.finditer(text) if heading.start() or not start]
                if found:
                    is_wanted = step is None or int(found[-1][1]) == step
                    return text[found[-1].end() :].decode(errors="replace").strip("\n") if is_wanted else ""
    except (OSError, BadFile):
        pass
    return ""


def _drop(path: Path, find: Callable[[], Found], unit: str, say: Say) -> None:
    if not os.path.lexists(path):
        return
    try:
        found = find()
    except OSError as error:
        _set_aside(path, error, say)
        return
    what = f"{path.name}: {found.count} {unit}{'s are' if found.count > 1 else ' is'} damaged"
    if found.spans:
        try:
            copy = _rewrite(path, found)
            say(f"{what} and left out; the file as it was is {copy.name}")
            return
        except OSError as error:
            say(f"{what} and cannot be taken out of it: {error.strerror or error}; readers pass over them")
    try:
        if path.stat().st_size > found.end:
            os.truncate(path, found.end)
    except OSError as error:
        say(f"{path.name}: what is made again cannot be dropped from it: {error.strerror or error}; the newer counts")


def _set_aside(path: Path, error: OSError, say: Say) -> None:
    reason = f"{path.name}: must be a file that can be read, got: {error.strerror or error}"
    try:
        aside = _unused(path)
        path.rename(aside)
        say(f"{reason}; it is kept as {aside.name}, and a new one begins")
    except OSError as failure:
        say(f"{reason}; it cannot be set aside: {failure.strerror or failure}")


def _unused(path: Path, why: str = "damaged") -> Path:
    names = (path.with_name(f"{path.name}.{why}{n}") for n in range(1, 10**6))
    return next(name for name in names if not os.path.lexists(name))


def _rewrite(path: Path, found: Found) -> Path:
    """Replaces a file by itself without what was found.

    Returns the path of the old one. If this fails, the file is as it was.
    """
    temporary, copy = path.with_name(f".{path.name}.writing"), _unused(path)
    try:
        with path.open("rb") as old, temporary.open("wb") as new:
            start = 0
            for stop, next_start in (*found.spans, (found.end, found.end)):
                _copy(old, new, start, stop)
                start = next_start
            new.flush()
            os.fsync(new.fileno())
        try:
            os.link(path, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, copy)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
        raise
    return copy


def _copy(old: BinaryIO, new: BinaryIO, start: int, stop: int) -> None:
    old.seek(start)
    while piece := old.read(min(CHUNK, stop - old.tell())):
        new.write(piece)
