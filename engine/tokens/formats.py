"""File formats by their first bytes: what lies under a name, and the command that makes text of it."""

import json
import os
import shlex
from pathlib import Path
from typing import Any, BinaryIO

from engine.output import program
from engine.tokens.shards import MAGIC
from model.files import BadFile, few, open_file, parse_json

HEAD = 1 << 16  # bytes of a file that are looked at
TAIL = 1 << 12  # bytes at its end, to tell a JSON array from JSON lines
MOST_NAMED = 8  # fields or columns that a message names
TABLES = (".csv", ".tsv")
UNPACKED = (".gz", ".zst", ".xz", ".bz2")  # suffixes that the unpacked file does not have

# First bytes, name, and command: {old} is the file, {new} a file of text, {stem} the name without its suffix,
# {gpt2} this program.
FORMATS = (
    (b"\x1f\x8b", "gzip data", "gunzip -c {old} > {new}"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "zstd -dc {old} > {new}"),
    (b"\xfd7zXZ\0", "xz data", "xz -dc {old} > {new}"),
    (b"BZh", "bzip2 data", "bzip2 -dc {old} > {new}"),
    (b"PK\x03\x04", "a zip archive", "unzip {old} -d {stem}"),
    (b"PAR1", "a parquet file", "mv {old} {stem}.parquet"),
    (b"ARROW1", "an Arrow file", None),
    (b"%PDF", "a PDF document", "pdftotext {old} {new}"),
    (b"\xff\xfe\0\0", "UTF-32 text", "iconv -f UTF-32 -t UTF-8 {old} > {new}"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {old} > {new}"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {old} > {new}"),
    (b"\x89PNG", "a picture", None),
    (b"\xff\xd8\xff", "a picture", None),
    (b"\x93NUMPY", "a NumPy array", None),
    (b"SQLite format 3\0", "an SQLite database", None),
    (b"\x7fELF", "a program", None),
    (
        MAGIC.to_bytes(4, "little"),
        "a token shard, which needs no preparation: {gpt2} train takes its directory as --data",
        None,
    ),
)
ARRAY = "a JSON array"


def foreign(head: bytes, path: Path, file: BinaryIO) -> str | None:
    """What lies in a .txt, .md, .py or .jsonl file that cannot be text, and the way in; or None.

    head: the file's first bytes, at most HEAD. Moves the file's position.
    """
    for first, name, command in FORMATS:
        if head.startswith(first) and (first != b"BZh" or head[4:7] == b"1AY"):
            return _with_command(name, command, path)
    if head[257:262] == b"ustar":
        return _with_command("a tar archive", "tar -xf {old}", path)
    if head.count(0) > 8 + len(head) // 20:
        return "binary data, or UTF-16 text without a byte-order mark"
    if path.suffix.lower() == ".jsonl" and _is_array(head, file):
        return _with_command(ARRAY, "jq -c '.[]' {old} > {new}", path)
    return None


def _with_command(name: str, command: str | None, path: Path) -> str:
    if command is None:
        return name.format(gpt2=program())
    bare = path.with_suffix("")
    new = bare if path.suffix.lower() in UNPACKED else path.with_name(f"{bare.name}_text{path.suffix or '.txt'}")
    old, new, stem = (shlex.quote(str(one)) for one in (path, new, bare))
    return f"{name}; try: {command.format(old=old, new=new, stem=stem)}"


def _is_array(head: bytes, file: BinaryIO) -> bool:
    """Whether a .jsonl file is one JSON array, and not lines of which the first is a list or is odd."""
    first, _, rest = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not first.startswith(b"["):
        return False
    try:
        parse_json(first)
    except BadFile:
        file.seek(-min(TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read(TAIL).rstrip().endswith(b"]") or first.rstrip().endswith((b"[", b","))
    return not rest.strip()


def unread(path: Path) -> str:
    """What lies in a file whose suffix `prepare` does not read, and the way in."""
    with open_file(path) as file:
        head = file.read(HEAD)
        found = foreign(head, path, file)
    if path.suffix.lower() in TABLES:
        return "a table; write one column of it as .jsonl or .parquet"
    if found is not None:
        return found
    if head.lstrip().startswith(b"[") and path.suffix.lower() == ".json":
        return _with_command(ARRAY, "jq -c '.[]' {old} > {stem}.jsonl", path)
    if (records := _records(head)) and all(isinstance(record, dict) for record in records):
        return _with_command("JSON lines", "mv {old} {stem}.jsonl", path)
    try:
        head[:-4].decode("utf-8")  # a character may be cut
    except UnicodeDecodeError:
        return "binary data, or text that is not UTF-8"
    return _with_command("text", "cp {old} {stem}.txt", path)


def _records(head: bytes) -> list[Any]:
    """Values of the whole lines of JSON in a file's first bytes; None for a line that is no JSON."""
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    records = []
    for line in lines[:-1] if len(head) == HEAD else lines:
        if line.strip():
            try:
                records.append(parse_json(line))
            except BadFile:
                records.append(None)
    return records


def text_fields(record: Any) -> str:
    """Names of the fields of a JSON record that hold text, "a, b" or "none"."""
    fields = [name for name, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
    return few([json.dumps(name, ensure_ascii=False)[1:-1] for name in fields], MOST_NAMED) or "none"


def look(path: Path, text_field: str) -> tuple[str | None, bool]:
    """Why a file with one of the suffixes seems to give no text at all, and whether that is sure; or (None, True).

    The records at the head of a longer file do not tell what follows them. A .parquet file is left
    to its reader. Raises BadFile or FileNotFoundError.
    """
    if path.suffix.lower() == ".parquet":
        return None, True
    with open_file(path) as file:
        head, size = file.read(HEAD), os.fstat(file.fileno()).st_size
        found = foreign(head, path, file)
    if found is not None or path.suffix.lower() != ".jsonl":
        return found, True
    return _problem(_records(head), text_field), size == len(head)


def _problem(records: list[Any], text_field: str) -> str | None:
    objects = [record for record in records if isinstance(record, dict)]
    if records and not objects:
        return "lines that are no JSON objects; write one object a line, or name the file .txt if it is plain text"
    if not objects or any(text_field in record for record in objects):
        return None
    fields = text_fields(objects[0])
    first = fields.split(", ")[0]
    way = "write the text into one" if fields == "none" else f"add --text-field {shlex.quote(first)}"
    return f'records without the field "{text_field}", whose fields with text are: {fields}; {way}'
