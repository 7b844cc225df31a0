"""File formats by their first bytes: what lies under a name, and the command that makes text of it."""

import io
import json
import os
import shlex
from pathlib import Path
from typing import Any, BinaryIO

from engine.output import program
from engine.tokens.reading import packed, values
from engine.tokens.shards import MAGIC
from model.files import BadFile, few, open_file, parse_json

HEAD = 1 << 16  # bytes of a file that are looked at
TAIL = 1 << 12  # bytes at its end, to tell a JSON array from JSON lines
MOST_NAMED = 8  # fields or columns that a message names
SHEETS = (".csv", ".tsv")
TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".ndjson")
JSON = (*LINES, ".json")
TAR = (".tar", ".tgz")
UNPACK = {".gz": "gunzip -c", ".zst": "zstd -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc"}

# First bytes, name, and command: {old} is the file, {new} a file of text, {stem} the name without its suffix,
# {gpt2} this program.
FORMATS = (
    (b"\x1f\x8b", "gzip data", "mv {old} {old}.gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "mv {old} {old}.zst"),
    (b"\xfd7zXZ\0", "xz data", "mv {old} {old}.xz"),
    (b"BZh", "bzip2 data", "mv {old} {old}.bz2"),
    (b"PK\x03\x04", "a zip archive", "unzip {old} -d {stem}"),
    (b"PAR1", "a parquet file", "mv {old} {stem}.parquet"),
    (b"ARROW1", "an Arrow file", "mv {old} {stem}.arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "mv {old} {stem}.arrow"),
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
FIRST = tuple(first for first, _, _ in FORMATS)
ARRAY = "a JSON array"
BOM = b"\xef\xbb\xbf"


def foreign(head: bytes, path: str | Path, file: BinaryIO | None = None) -> str | None:
    """What lies in a file of text or records that is neither, and the way in; or None.

    head: the first bytes, at most HEAD. file: to look at its end; None for a stream, such as what lies
    in a packed file, which has no way in.
    """
    where = Path(path) if file is not None else None
    for first, name, command in FORMATS if head.startswith(FIRST) else ():
        if head.startswith(first) and (first != b"BZh" or head[4:7] == b"1AY"):
            return _with_command(name, command, where)
    if head[257:262] == b"ustar":
        return _with_command("a tar archive", "tar -xf {old}", where)
    if head.count(0) > 8 + len(head) // 20:
        return "binary data, or UTF-16 text without a byte-order mark"
    if head.removeprefix(BOM).lstrip()[:1] == b"[" and packed.suffixes(path)[0] in LINES and _is_array(head, file):
        return _with_command(ARRAY, "mv {old} {stem}.json", where)
    return None


def _with_command(name: str, command: str | None, path: Path | None) -> str:
    if command is None or path is None:
        return name.format(gpt2=program())
    new, old, stem = (shlex.quote(str(one)) for one in (_new(path), path, path.with_suffix("")))
    return f"{name}; try: {command.format(old=old, new=new, stem=stem)}"


def _new(path: Path) -> Path:
    """Name for the text of a file: that of the packed file, or another with the same suffix."""
    bare = path.with_suffix("")
    return bare if path.suffix.lower() in UNPACK else path.with_name(f"{bare.name}_text{path.suffix or '.txt'}")


def _is_array(head: bytes, file: BinaryIO | None) -> bool:
    """Whether a file of lines is one JSON array, and not lines of which the first is a list or is odd."""
    first, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    if not first.startswith(b"["):
        return False
    try:
        parse_json(first)
    except BadFile:
        if first.rstrip().endswith((b"[", b",")):
            return True
        if file is None:  # a stream: a line without an end tells by its begin
            return not rest and first.lstrip(b"[ \t").startswith(b"{")
        position = file.tell()
        file.seek(-min(TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
        end = file.read(TAIL)
        file.seek(position)
        return end.rstrip().endswith(b"]")
    return not rest.strip()


def has_lines(head: bytes) -> bool:
    """Whether a .json file holds a value in each line, by its first bytes, and not an array or other values.

    A damaged line, or one that is longer than the head, is a line too; one with several values is none.
    """
    lines = head.removeprefix(BOM).lstrip().split(b"\n")
    first, rest = lines[0].strip(), b"\n".join(lines[1:]).strip()
    if first.startswith(b"["):
        return bool(rest) and _is_value(first)
    if rest and not _is_value(first) and not (first.endswith(b"}") and rest.startswith(b"{")):
        return False
    return not any(len(_values(line)) > 1 for line in lines if line.strip() and not _is_value(line))


def _is_value(line: bytes) -> bool:
    try:
        parse_json(line)
    except BadFile:
        return False
    return True


def unread(path: Path) -> str:
    """What lies in a file whose suffix `prepare` does not read, and the way in."""
    with open_file(path) as file:
        head = file.read(HEAD)
        found = foreign(head, path, file)
    suffix, packing = packed.suffixes(path)
    if suffix in SHEETS and not packing:
        return "a table; write one column of it as .jsonl or .parquet"
    if suffix in TAR and (packing or suffix == ".tgz"):
        return _with_command("a packed tar archive", "tar -xf {old}", path)
    if packing and suffix:
        return _with_command(f"{packed.PACKINGS[packing]} data", UNPACK[packing] + " {old} > {new}", path)
    if packing:
        return _with_command(f"{packed.PACKINGS[packing]} data", "mv {old} {stem}.txt" + packing, path)
    if found is not None:
        return found
    if (records := _records(head)) and all(isinstance(record, dict) for record in records):
        return _with_command("JSON lines", "mv {old} {stem}.jsonl", path)
    try:
        head[:-4].decode("utf-8")  # a character may be cut
    except UnicodeDecodeError:
        return "binary data, or text that is not UTF-8"
    return _with_command("text", "cp {old} {stem}.txt", path)


def _records(head: bytes) -> list[Any]:
    """Values of the whole lines of JSON in a file's first bytes; None for a line that is no JSON."""
    lines = head.removeprefix(BOM).split(b"\n")
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

    The records at the head of a longer file do not tell what follows them. A table is left to its
    reader. Raises BadInput, BadFile or FileNotFoundError.
    """
    suffix, packing = packed.suffixes(path)
    if suffix in TABLES:
        return None, True
    with packed.open_stream(path) if packing else open_file(path) as file:
        head = file.peek(HEAD)[:HEAD] if packing else file.read(HEAD)
        found = foreign(head, path, None if packing else file)
        is_whole = len(head) < HEAD if packing else len(head) == os.fstat(file.fileno()).st_size
    if found is not None or suffix not in JSON:
        return found, True
    return _problem(_records(head) if suffix in LINES or has_lines(head) else _values(head), text_field), is_whole


def _values(head: bytes) -> list[Any]:
    """The first values of a .json file that holds no lines."""
    found = []
    try:
        for value in values.read(io.BytesIO(head)):
            found.append(parse_json(value.content))
    except (values.Broken, BadFile):
        pass
    return found


def _problem(records: list[Any], text_field: str) -> str | None:
    objects = [record for record in records if isinstance(record, dict)]
    if records and not objects:
        return "records that are no JSON objects; write one object a line, or name the file .txt if it is plain text"
    if not objects or any(text_field in record for record in objects):
        return None
    fields = text_fields(objects[0])
    first = fields.split(", ")[0]
    way = "write the text into one" if fields == "none" else f"add --text-field {shlex.quote(first)}"
    return f'records without the field "{text_field}", whose fields with text are: {fields}; {way}'
