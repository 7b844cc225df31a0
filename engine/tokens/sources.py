"""Sources to files: what `gpt2 prepare` reads of files, of directories, and of the word `stdlib`.

`stdlib` names the source files of the running Python's standard library, without its tests. Of a
directory everything with one of the suffixes is read, except what is hidden or made by tools,
validation and test files beside train files, and the README of a data set. All that is not read is
counted. A file that is named is always read.
"""

import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import BadInput
from engine.tokens import formats
from model.files import KINDS, BadFile

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
RECORDS = (".jsonl", ".parquet")  # beside them a README is the card of the data set
STDLIB = "stdlib"
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TOOLS = {"__MACOSX", "__pycache__", "node_modules"}  # directories; .git, .venv and the like are hidden
TRAIN, TESTS = {"train", "training"}, {"test", "validation", "valid", "val", "dev", "eval"}
CARDS = {"readme", "license", "licence", "copying", "notice", "citation"}
HELD_OUT = "test or validation beside train, such as"
LOOKED_AT = 16  # files of a source that are looked into before anything is read


@dataclass
class Found:
    """Files to read, in an order that depends only on names, and counts of what is not read."""

    files: list[Path] = field(default_factory=list)
    not_read: Counter = field(default_factory=Counter)  # by suffix, or by reason
    examples: dict[str, Path] = field(default_factory=dict)  # one file of each
    num_bytes: int = 0  # of the files to read

    def leave_out(self, why: str, path: Path) -> None:
        """Counts a file or directory that is not read."""
        self.not_read[why] += 1
        self.examples.setdefault(why, path)


def find(sources: Iterable[str], text_field: str = "text") -> Found:
    """Every file of the sources.

    Raises BadInput for a bad source, and for one whose first files all hold something else.
    """
    found = Found()
    for source in sources:
        path = Path(source)
        if source == STDLIB and not path.exists():
            found.files += _library(Path(sysconfig.get_path("stdlib")))
            continue
        if _is_directory(source):
            files = _walk(path, found)
        elif path.suffix.lower() in SUFFIXES:
            files = [path]
        else:
            raise BadInput(f"prepare: a source must end in {', '.join(SUFFIXES)}, got {source}, {_unread(path)}")
        found.files += files
        problems = [_look(file, text_field) for file in files[:LOOKED_AT]]
        if problems and None not in problems:
            raise BadInput(f"{files[0]}: must hold text, got {problems[0]}")
    if not found.files:
        raise BadInput(
            f"prepare: the sources must hold files in {', '.join(SUFFIXES)}, got none in {list(sources)}{_got(found)}"
        )
    if count := found.not_read.pop(HELD_OUT, 0):
        found.not_read[f"{HELD_OUT} {found.examples[HELD_OUT].name}"] = count
    return found


def _is_directory(source: str) -> bool:
    """Raises BadInput if nothing that can be read lies there."""
    try:
        mode = os.stat(source).st_mode  # of "" too, which as a Path would be the current directory
    except (OSError, ValueError) as error:
        why = source or "an empty word"
        if os.path.islink(source):
            why += f", a link to {os.readlink(source)}, which does not exist"
        elif not isinstance(error, FileNotFoundError):
            why += f", {getattr(error, 'strerror', None) or error}"
        raise BadInput(f"prepare: a source must be a file, a directory or the word {STDLIB}, got {why}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in KINDS.items() if is_kind(mode)), "no regular file")
        raise BadInput(f"prepare: a source must be a file or a directory, got {source}, {kind}; write it to a file")
    return stat.S_ISDIR(mode)


def _unread(path: Path) -> str:
    """What a file of another suffix holds, for a message."""
    try:
        return f"which holds {formats.unread(path)}"
    except (BadFile, OSError) as error:
        return f"which cannot be read: {getattr(error, 'strerror', None) or error}"


def _look(path: Path, text_field: str) -> str | None:
    try:
        return formats.look(path, text_field)
    except (BadFile, OSError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> BadInput:
    """The error of a file that lies in a source and cannot be read."""
    why = getattr(error, "strerror", None) or error
    return BadInput(f"{path}: must be a file that can be read, got {why}; mend it, or move it out of the source")


def _got(found: Found) -> str:
    """What the sources hold that is not read, and the way in for the most frequent kind."""
    if not found.not_read:
        return ""
    (most, _), *_ = found.not_read.most_common(1)
    path = found.examples[most]
    way = f"; {path} {_unread(path).removeprefix('which ')}" if path.is_file() else ""
    return f"; {not_read(found.not_read)}{way}"


def not_read(counts: dict[str, int]) -> str:
    """Text such as "not read: 12 .gz, 3 .csv", the most frequent first; "" if there is nothing."""
    kinds = [f"{count:,} {why}" for why, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]
    return f"not read: {formats.named(kinds)}" if kinds else ""


# ---- Directories --------------------------------------------------------------------------------------------------


def _library(root: Path) -> list[Path]:
    files = []
    for directory, children, names in os.walk(root):
        children[:] = sorted(set(children) - NOT_LIBRARY)
        files += [Path(directory, name) for name in sorted(names) if Path(name).suffix == ".py"]
    return files


def _walk(root: Path, found: Found) -> list[Path]:
    """The files of a directory that are to be read. Counts the others in `found`."""
    files, cards, has_others = [], [], False
    for directory, names in _directories(root, found):
        for name in names:
            path = Path(directory, name)
            if name.startswith("."):
                found.leave_out("hidden", path)
            elif path.suffix.lower() not in SUFFIXES:
                found.leave_out(_suffix(path), path)
                has_others = True
            elif (kind := _special(path)) is not None:
                found.leave_out(kind, path)
            else:
                if _words(path) and _words(path)[0] in CARDS and path.suffix.lower() in (".md", ".txt"):
                    cards.append(path)
                files.append(path)
    with_records: set[Path] = set()  # directories with records in them or below
    for directory in {path.parent for path in files if path.suffix.lower() in RECORDS}:
        with_records |= {directory, *directory.parents}
    left = {card for card in cards if card.parent in with_records or (len(files) == len(cards) and has_others)}
    for card in cards:
        if card in left:
            found.leave_out(f"{card.name} beside data", card)
    return [path for path in files if path not in left] if left else files


def _directories(root: Path, found: Found) -> Iterator[tuple[str, list[str]]]:
    """Yields each directory once, with the names of its files. Linked directories come last."""

    def refuse(error: OSError) -> None:
        raise BadInput(f"{error.filename}: must be a directory that can be read, got {error.strerror}") from error

    seen, pending = set(), [str(root)]
    while pending:
        for directory, children, names in os.walk(pending.pop(0), onerror=refuse):
            try:
                identity = os.stat(directory)
            except OSError as error:
                refuse(error)
            if (identity.st_dev, identity.st_ino) in seen:
                children[:] = []
                continue
            seen.add((identity.st_dev, identity.st_ino))
            held_out = _held_out(children, names)
            for name in sorted(held_out):
                found.leave_out(HELD_OUT, Path(directory, name))
            for name in sorted(children):
                if name.startswith(".") or name in TOOLS:
                    found.leave_out(f"{name}/", Path(directory, name))
            kept = {name for name in children if not name.startswith(".")} - TOOLS - held_out
            pending += [link for name in sorted(kept) if os.path.islink(link := os.path.join(directory, name))]
            children[:] = sorted(kept)
            yield directory, sorted(set(names) - held_out)


def _held_out(children: list[str], names: list[str]) -> set[str]:
    """Names of validation and test sets, if a train set lies beside them. Programs are none."""
    sets = [*children, *(name for name in names if Path(name).suffix.lower() in (".txt", *RECORDS))]
    words = {name: set(_words(Path(name))) for name in sets if not name.startswith(".")}
    if not any(one & TRAIN for one in words.values()):
        return set()
    return {name for name, one in words.items() if one & TESTS and not one & TRAIN}


def _words(path: Path) -> list[str]:
    return re.findall("[a-z]+", path.name.lower())


def _suffix(path: Path) -> str:
    suffixes = path.suffixes[-2:] if path.suffix.lower() in formats.UNPACKED else path.suffixes[-1:]
    return "".join(one for one in suffixes if re.fullmatch(r"\.[A-Za-z]\w{0,7}", one)) or "without a suffix"


def _special(path: Path) -> str | None:
    """Kind of a file that is none to read, such as a named pipe. A link without a target is an error."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        gone = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else error.strerror
        raise unreadable(path, BadFile(gone)) from error
    if stat.S_ISREG(mode):
        return None
    return next((words for is_kind, words in KINDS.items() if is_kind(mode)), "no regular file").removeprefix("a ")
