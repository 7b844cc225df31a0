"""Sources to files: what `gpt2 prepare` reads of files, of directories, of `stdlib`, and of standard input, `-`.

`stdlib` names the source files of the running Python's standard library, without its tests. Of a
directory every file with one of the suffixes is read, also in linked directories, each once. Left
out are what is hidden or made by tools, test and validation sets beside a train set of the same
name, the README and licence of a data set, links to a directory above, and directories without
permission. All that is not read is counted. A file that is named is always read, once under all of
its names.
"""

import os
import re
import shlex
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from engine.errors import BadInput
from engine.output import program
from engine.tokens import foreign
from engine.tokens.reading import formats, hub, packed, sequential
from model.files import BadFile, few, kind_of

TEXT = (".txt", ".md", ".py")
SUFFIXES = (*TEXT, *formats.JSON, *formats.TABLES)
PACKED = tuple(suffix + packing for suffix in (*TEXT, *formats.JSON) for packing in packed.PACKINGS)
ENDINGS = f"{', '.join(SUFFIXES)}, and text and JSON also with {', '.join(packed.PACKINGS)}"
STDLIB = "stdlib"
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TRAIN, TESTS = {"train", "training"}, {"test", "validation", "valid", "val", "dev", "eval"}
PROGRAMS = {".py", ".ipynb", ".sh", ".js", ".ts", ".java", ".go", ".rs", ".c", ".h", ".cc", ".cpp"}
CARDS = {"readme", "license", "licence", "copying", "notice", "citation"}
INFO = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of the datasets library
UPWARDS = "linked directory that leads upwards"
LOOKED_AT = 16  # files that are looked into before anything is read


@dataclass(frozen=True)
class Rule:
    """Which files of a directory are read."""

    suffixes: tuple[str, ...]
    records: tuple[str, ...]  # beside files of these a README is the card of the data set
    tools: tuple[str, ...]  # directories that are not read; .git, .venv and the like are hidden
    marks: tuple[str, ...] = ()  # nor are those that hold such a file
    is_once: bool = False  # whether a file that is named twice is read once

    @cached_property
    def sets(self) -> set[str]:
        """Suffixes of the files of train and test sets."""
        return {one for one in self.suffixes if one.startswith((".txt", *self.records))}

    def is_tool(self, path: Path) -> bool:
        """Whether a directory is made by a tool, such as a virtual environment."""
        return path.name in self.tools or any((path / mark).exists() for mark in self.marks)


OLD_TOOLS = ("__MACOSX", "__pycache__", "node_modules")
RULE_2 = Rule((*TEXT, ".jsonl", ".parquet"), (".jsonl", ".parquet"), OLD_TOOLS)
RULE_3 = Rule((*SUFFIXES, *PACKED), (*formats.JSON, *formats.TABLES), (*OLD_TOOLS, "_temporary"), ("pyvenv.cfg",), True)


@dataclass
class Selection:
    """Files to read, in an order that depends only on names, and counts of what is not read."""

    files: list[Path] = field(default_factory=list)
    not_read: Counter = field(default_factory=Counter)  # by suffix, or by reason
    examples: dict[str, Path] = field(default_factory=dict)  # one file of each
    held_out: list[Path] = field(default_factory=list)  # test and validation sets, files or directories
    linked: int = 0  # linked directories that are read
    num_bytes: int = 0  # of the files to read
    remote: dict[Path, hub.Remote] = field(default_factory=dict)  # those of `files` that are to be downloaded

    _names: dict[int, Path] = field(default_factory=dict)  # of `files`, by their places on the disk
    _hard_links: set[Path] = field(default_factory=set)  # to those

    def add(self, path: Path, place: int, rule: Rule) -> None:
        """Adds a file, unless another name of it, such as a link, has come before. A hard link is a file of its own."""
        first = self._names.setdefault(place, path)
        if first is not path and rule.is_once:
            true_path = Path(os.path.realpath(path))
            if true_path == Path(os.path.realpath(first)) or true_path in self._hard_links:
                self.leave_out("named twice", path)
                return
            self._hard_links.add(true_path)
        self.files.append(path)

    def leave_out(self, why: str, path: Path) -> None:
        """Counts a file or directory that is not read."""
        self.not_read[why] += 1
        self.examples.setdefault(why, path)


def find(sources: Iterable[str], rule: Rule = RULE_3) -> Selection:
    """Every file of the sources. Raises BadInput for a bad source."""
    found = Selection()
    for source in sources:
        path = Path(source)
        if source == str(sequential.STDIN):
            sequential.check_standard_input(path in found.files)
            found.files.append(path)
        elif hub.is_remote(source):
            _find_remote(source, found)
        elif source == STDLIB and not path.exists():
            for one in _library(Path(sysconfig.get_path("stdlib"))):
                found.add(one, _place(os.stat(one)), rule)
        elif _is_directory(source):
            for one, place in _walk(path, found, rule):
                found.add(one, place, rule)
        elif _kind(path.name) in rule.suffixes:
            found.add(path, _place(os.stat(path)), rule)
        else:
            raise BadInput(f"prepare: a source must end in {ENDINGS}, got {source}, {_unread(path)}")
    if not found.files:
        raise BadInput(
            f"prepare: the sources must hold files in {ENDINGS}, got none in {list(sources)}{_got(sources, found)}"
        )
    return found


def _find_remote(source: str, found: Selection) -> None:
    files = hub.find(source, (*SUFFIXES, *PACKED))
    held_out = hub.held_out(files, TRAIN, TESTS)
    found.held_out += [one.label for one in held_out]
    chosen = [one for one in files if one not in held_out]
    new = {one.label: one for one in hub.new(chosen, found.remote)}
    for one in chosen:
        if one.label not in new:  # it is removed once it is read
            found.leave_out("named twice", one.label)
    found.files += new
    found.remote |= new


def find_by_rule(sources: Iterable[str], number: int) -> Selection:
    """What versions with the rule of this number read of sources that can be read, see `prepare.RULES`."""
    return find(sources, RULE_2) if number == 2 else Selection(_find_by_rule_1(sources))


def _find_by_rule_1(sources: Iterable[str]) -> list[Path]:
    """All files with a suffix in lower case, but through no link."""
    files: list[Path] = []
    for source in sources:
        if source == STDLIB and not os.path.exists(source):
            files += _library(Path(sysconfig.get_path("stdlib")))
        elif os.path.isdir(source):
            for directory, children, names in os.walk(source):
                children.sort()
                files += [Path(directory, name) for name in sorted(names) if Path(name).suffix in RULE_2.suffixes]
        else:
            files.append(Path(source))
    return files


def require_text(found: Selection, text_field: str) -> str:
    """Raises BadInput if none of the files holds text. Returns a warning if it seems so of the first, or ""."""
    if found.remote:
        return ""
    looks = [_look(file, text_field) for file in found.files[:LOOKED_AT]]
    if any(problem is None for problem, _ in looks):
        return ""
    file, problem = found.files[0], looks[0][0]
    if len(found.files) <= LOOKED_AT and all(is_sure for _, is_sure in looks):
        raise BadInput(f"{file}: must hold text, got {problem}")
    return f"{file} begins with {problem}"


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
        kinds = f"a file, a directory, {STDLIB}, - or hf:OWNER/NAME"
        raise BadInput(f"prepare: a source must be {kinds}, got {why}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise BadInput(
            f"prepare: a source must be a file or a directory, got {source}, {kind_of(mode)}; write it to a file"
        )
    return stat.S_ISDIR(mode)


def _unread(path: Path) -> str:
    """What a file of another suffix holds, for a message."""
    if foreign.is_headerless(path):
        return f"which holds nanoGPT's tokens; {_train(path.parent)}"
    try:
        return f"which holds {formats.unread(path)}"
    except (BadFile, OSError) as error:
        return f"which cannot be read: {getattr(error, 'strerror', None) or error}"


def _look(path: Path, text_field: str) -> tuple[str | None, bool]:
    if path == sequential.STDIN:
        return None, True
    try:
        return formats.look(path, text_field)
    except (BadFile, OSError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> BadInput:
    """The error of a file that lies in a source and cannot be read."""
    why = getattr(error, "strerror", None) or error
    return BadInput(f"{path}: must be a file that can be read, got {why}; mend it, or move it out of the source")


def _train(directory: str | Path) -> str:
    return f"{program()} train --data {shlex.quote(str(directory))} reads them as they are"


def _got(sources: Iterable[str], found: Selection) -> str:
    """What the sources hold that is not read, and the way in for the most frequent kind."""
    for source in sources:
        if os.path.isdir(source) and (what := foreign.what(source)).kind == "data":
            return f"; {source} is {what.words}; {_train(source)}"
    if not found.not_read:
        return ""
    examples = [found.examples[why] for why, _ in found.not_read.most_common()]
    paths = [path for path in examples if path.is_file() and not path.name.startswith(".") and not _is_card(path.name)]
    way = f"; {paths[0]} {_unread(paths[0]).removeprefix('which ')}" if paths else ""
    return f"; {not_read(found.not_read)}{way}"


def not_read(counts: dict[str, int]) -> str:
    """Text such as "not read: 12 .gz, 3 .csv", the most frequent first; "" if there is nothing."""
    kinds = [f"{count:,} {why}" for why, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]
    return f"not read: {few(kinds, formats.MOST_NAMED)}" if kinds else ""


# ---- Directories --------------------------------------------------------------------------------------------------


def _library(root: Path) -> list[Path]:
    files = []
    for directory, children, names in os.walk(root):
        children[:] = sorted(set(children) - NOT_LIBRARY)
        files += [Path(directory, name) for name in sorted(names) if Path(name).suffix == ".py"]
    return files


def _kind(name: str) -> str:
    """Suffixes of a file's name in lower case: ".json.gz" of a.JSON.gz."""
    return "".join(packed.suffixes(name))


def _walk(root: Path, found: Selection, rule: Rule) -> Iterator[tuple[Path, int]]:
    """The files of a directory that are to be read, with their places. Counts the others in `found`."""
    files, places, cards, contents, has_packed, has_programs = [], [], [], {}, False, False
    for directory, names in _directories(root, found, rule):
        folder = Path(directory)
        of_folder = contents.setdefault(folder, set())
        for name in names:
            content, packing = packed.suffixes(name)
            has_programs |= content in PROGRAMS and not packing
            path = Path(directory, name)
            if name.startswith("."):
                found.leave_out("hidden", path)
            elif content + packing not in rule.suffixes:
                found.leave_out(_suffix(path), path)
                has_packed |= bool(packing)
            elif not stat.S_ISREG((status := _status(path)).st_mode):  # such as a named pipe
                found.leave_out(kind_of(status.st_mode).removeprefix("a "), path)
            else:
                if (content + packing in (".md", ".txt") and _is_card(name)) or name in INFO:
                    cards.append(path)
                files.append(path)
                places.append(_place(status))
                of_folder.add(content)
    records = {one for one in rule.records if one != ".json" or not has_programs}  # package.json is no data set
    with_records = {folder for folder, of_folder in contents.items() if of_folder & records}
    with_records |= {folder.parent for folder in with_records}  # of data/a.jsonl
    is_packed = has_packed and len(files) == len(cards)
    left = {card for card in cards if is_packed or card.parent in with_records}
    for card in sorted(left):
        found.leave_out(f"{card.name} beside data", card)
    return ((path, place) for path, place in zip(files, places, strict=True) if not left or path not in left)


def _is_card(name: str) -> bool:
    return os.path.splitext(name)[0].lower() in CARDS


def _directories(root: Path, found: Selection, rule: Rule) -> Iterator[tuple[str, list[str]]]:
    """Yields each directory once, with the names of its files. Linked directories come last."""

    def refuse(error: OSError) -> None:
        path = Path(error.filename)
        if not isinstance(error, PermissionError) or path == root:
            raise BadInput(f"{path}: must be a directory that can be read, got {error.strerror}") from error
        found.leave_out("directory without permission", path)

    seen, pending = set(), [(str(root), ())]
    while pending:
        start, chain = pending.pop(0)
        chain = (*chain, Path(os.path.realpath(start)))  # the source, and the links that lead here
        for directory, children, names in os.walk(start, onerror=refuse):
            try:
                identity = os.stat(os.path.join(directory, "."))  # needs the permission that its files need
            except OSError as error:
                refuse(error)
                children[:] = []
                continue
            if (identity.st_dev, identity.st_ino) in seen:
                children[:] = []
                continue
            seen.add((identity.st_dev, identity.st_ino))
            found.linked += directory == start and len(chain) > 1
            held_out = _held_out(directory, children, names, rule)
            found.held_out += [Path(directory, name) for name in sorted(held_out)]
            tools = {name for name in children if name.startswith(".") or rule.is_tool(Path(directory, name))}
            for name in sorted(tools):
                found.leave_out(f"{name}/", Path(directory, name))
            children[:] = sorted(set(children) - tools - held_out)
            for link in filter(os.path.islink, (os.path.join(directory, name) for name in children)):
                if _leads_up(link, (*chain, Path(os.path.realpath(directory)))):
                    found.leave_out(UPWARDS, Path(link))
                else:
                    pending.append((link, chain))
            yield directory, sorted(set(names) - held_out)


def _leads_up(link: str, lower: Iterable[Path]) -> bool:
    """Whether a link leads to one of the directories, or to one above it."""
    target = Path(os.path.realpath(link))
    return any(target == one or target in one.parents for one in lower)


def _held_out(directory: str, children: list[str], names: list[str], rule: Rule) -> set[str]:
    """Names of the test and validation sets that lie beside a train set.

    A file is one if the name of a train file differs from its own in the word alone, or in numbers:
    c4-validation.00000-of-00008 beside c4-train.00000-of-01024. A directory is one if it has the
    word for a name and lies beside `train`, and neither holds a program.
    """
    named = [name for name in names if "train" in name.lower()]  # few, and soon found
    train = {rest for name in named if _is_of_set(name, rule) for rest in _without(name, TRAIN)}
    others = names if train else []
    held_out = {name for name in others if _is_of_set(name, rule) and train.intersection(_without(name, TESTS))}
    tests = TESTS.intersection(children)
    if tests and "train" in children and _is_set(Path(directory, "train"), rule):
        held_out |= {name for name in tests if _is_set(Path(directory, name), rule)}
    return held_out


def _is_of_set(name: str, rule: Rule) -> bool:
    return _kind(name) in rule.sets and not name.startswith(".")


def _without(name: str, split: set[str]) -> list[tuple[str, ...]]:
    """The words of a file's name without its suffixes, less one of a split, for each that it has."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"\d+[-_. ]?of[-_. ]?\d+", " ", packed.stem(name).lower()))
    return [(*words[:i], *words[i + 1 :]) for i, word in enumerate(words) if word in split]


def _is_set(root: Path, rule: Rule) -> bool:
    """Whether a directory holds text or records, and no program."""
    suffixes: set[str] = set()
    for _, children, names in os.walk(root):
        children[:] = [name for name in children if not name.startswith(".") and name not in rule.tools]
        suffixes |= {_kind(name) for name in names}
    return bool(suffixes & rule.sets) and not suffixes & PROGRAMS


def _suffix(path: Path) -> str:
    suffixes = path.suffixes[-2:] if path.suffix.lower() in packed.PACKINGS else path.suffixes[-1:]
    return "".join(one for one in suffixes if re.fullmatch(r"\.[A-Za-z]\w{0,7}", one)) or "without a suffix"


def _status(path: Path) -> os.stat_result:
    """Status of a file of a directory. A link without a target is an error."""
    try:
        return os.stat(path)
    except OSError as error:
        gone = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else error.strerror
        raise unreadable(path, BadFile(gone)) from error


def _place(status: os.stat_result) -> int:
    """Device and inode, as one number: many tuples would slow the garbage collection."""
    return status.st_dev << 64 | status.st_ino
