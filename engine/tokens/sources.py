"""Sources to documents: the files of each source, and the text of each document in them.

A .txt, .md or .py file is one document. Each line of a .jsonl file is one, and so is each row of a
.parquet file. The word `stdlib` names the source files of the running Python's standard library,
without its tests.
"""

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.errors import BadInput

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
STDLIB = "stdlib"
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def find_files(sources: Iterable[str]) -> list[Path]:
    """Every file of the sources, in an order that depends only on names.

    Raises BadInput for a bad source.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == STDLIB and not path.exists():
            files += _walk(Path(sysconfig.get_path("stdlib")), {".py"}, NOT_LIBRARY)
        elif path.is_dir():
            files += _walk(path, set(SUFFIXES), set())
        elif path.is_file() and path.suffix in SUFFIXES:
            files.append(path)
        elif path.exists():
            raise BadInput(f"prepare: a source must end in {', '.join(SUFFIXES)}, got {source}")
        else:
            raise BadInput(f"prepare: a source must be a file, a directory or the word {STDLIB}, got {source}")
    if not files:
        raise BadInput(f"prepare: the sources must hold files in {', '.join(SUFFIXES)}, got none in {list(sources)}")
    return files


def _walk(root: Path, suffixes: set[str], pruned: set[str]) -> list[Path]:
    files = []
    for directory, children, names in os.walk(root):
        children[:] = sorted(set(children) - pruned)
        files += [Path(directory, name) for name in sorted(names) if Path(name).suffix in suffixes]
    return files


def raw_documents(files: Iterable[Path], text_field: str) -> Iterator[tuple[str, bytes]]:
    """Yields (kind, bytes) of every document, for `parse`.

    kind: "text", or "json" for a .jsonl line.
    Raises BadInput if a file cannot be read.
    """
    for path in files:
        try:
            if path.suffix == ".jsonl":
                with path.open("rb") as lines:
                    yield from (("json", line) for line in lines if line.strip())
            elif path.suffix == ".parquet":
                yield from (("text", text) for text in _parquet_column(path, text_field))
            else:
                yield "text", path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: must be a file that can be read, got {error.strerror or error}") from error


def _parquet_column(path: Path, column: str) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(f"prepare: {path} needs pyarrow; install it with: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise BadInput(
                    f"{path}: must have a column {column}, got {', '.join(file.schema_arrow.names)}; "
                    "name it with --text-field"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from ((text or "").encode("utf-8", "surrogatepass") for text in batch.column(0).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{path}: must be a parquet file, got {error}") from error


def parse(kind: str, raw: bytes, text_field: str) -> tuple[str, str | None]:
    """(text, None) of a document, or ("", reason) if it is not text.

    kind, raw: as from raw_documents.
    """
    try:
        text = raw.decode("utf-8-sig")
        if kind == "json":
            record = json.loads(text)
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                return "", f'no text field "{text_field}"'
            text = record[text_field]
            text.encode("utf-8")
    except UnicodeError:
        return "", "not UTF-8"
    except (ValueError, RecursionError):
        return "", "not JSON"
    return (text, None) if text.strip() else ("", "empty")
