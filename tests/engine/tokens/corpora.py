"""A small corpus, its preparation into shards, and readers of these shards."""

import hashlib
import json
from pathlib import Path

import numpy as np

from engine.tokens import prepare
from engine.tokens.preparation import building
from engine.tokens.prepare import PrepareConfig
from engine.tokens.reading import records
from engine.tokens.shards import TokenStream


def config(out: Path, **changes) -> PrepareConfig:
    """Config in this process: bytes as tokens, 30% of the documents for validation."""
    return PrepareConfig(**{"out": str(out), "tokenizer": "bytes", "workers": 1, "val_fraction": 0.3} | changes)


def run(source: Path, out: Path, **changes) -> dict:
    return prepare.prepare([str(source)], config(out, **changes))


def set_batch(monkeypatch, num_bytes: int) -> None:
    """Bytes of a batch, and of a span of lines."""
    monkeypatch.setattr(building, "BATCH_BYTES", num_bytes)
    monkeypatch.setattr(records, "SPAN", num_bytes)


def write_library(root: Path) -> Path:
    """Writes a tree like the standard library's: packages of .py files, some .txt, .md and other files."""
    for package in ("json", "email", "email/mime"):
        (root / package).mkdir(parents=True)
        for i in range(6):
            (root / package / f"module_{i}.py").write_text(f'"""{package} {i}."""\n' + "x = 1\n" * (i + 1))
    (root / "guide.md").write_text("# A library\n")
    (root / "notes.txt").write_text("Übung macht den Meister.\n")
    (root / "records.jsonl").write_text("".join(json.dumps({"text": f"record {i}", "id": i}) + "\n" for i in range(9)))
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    return root


def documents(out: Path, split: str, end_of_text: int = 256) -> list[list[int]]:
    """Tokens of each document, with the end-of-text token that begins it."""
    stream = TokenStream.open(out, split, end_of_text + 1)
    tokens = stream.read(0, len(stream))
    assert tokens[0] == end_of_text
    return [piece.tolist() for piece in np.split(tokens, np.flatnonzero(tokens == end_of_text))[1:]]


def texts(out: Path, split: str) -> list[str]:
    return [bytes(tokens[1:]).decode() for tokens in documents(out, split)]


def files(directory: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones too."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }
