"""Token shards: the file format, a split's shards as one stream, and windows of that stream.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, then zeros),
then the tokens as little-endian uint16. The published pre-tokenised FineWeb shards have this
format. One-dimensional uint16 .npy files are read too.
A split's shards, in the order of their names, form one stream. The stream is cut into windows of T
inputs. A window's targets are its inputs shifted by one token, so neighbouring windows share one
token.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine import output
from engine.errors import BadInput

if TYPE_CHECKING:  # prepare, its workers and --help import this file and must not wait for PyTorch
    from torch import Tensor

HEADER_INTS = 256
MAGIC = 20240520
VERSION = 1
MANIFEST = "manifest.json"
BUILDING = ".building"  # temporary directory of `prepare`, inside its --out
CHECKED_TOKENS = 1 << 20  # first tokens of a shard checked for range when it is opened; the rest, when read


# ---- Shards -------------------------------------------------------------------------------------------------------


def open_shard(path: Path) -> np.ndarray:
    """The shard's tokens, (n,) uint16, memory-mapped.

    Raises BadInput if the header, size or dtype is wrong.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(tokens, np.ndarray):
                raise ValueError("an archive of arrays")
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise BadInput(f"{path}: tokens must be (n,) uint16, got {tokens.shape} {tokens.dtype}")
        else:
            tokens = _open_bin(path)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: must be a readable token shard, got {error}") from error
    if len(tokens) == 0:
        raise BadInput(f"{path}: a shard must hold at least one token, got none")
    return tokens


def _open_bin(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * HEADER_INTS), dtype="<i4")
    if len(header) < HEADER_INTS:
        raise BadInput(f"{path}: the header must be {4 * HEADER_INTS} bytes, got {4 * len(header)}")
    if header[0] != MAGIC:
        raise BadInput(f"{path}: the magic number must be {MAGIC}, got {header[0]}; this is not a token shard")
    if header[1] != VERSION:
        raise BadInput(f"{path}: the version must be {VERSION}, got {header[1]}")
    expected, num_bytes = 4 * HEADER_INTS + 2 * int(header[2]), path.stat().st_size
    if num_bytes != expected:
        raise BadInput(
            f"{path}: {header[2]} tokens take {expected} bytes, got {num_bytes}; "
            "the file is cut short or damaged: copy or prepare it again"
        )
    if header[2] == 0:
        return np.empty(0, dtype=np.uint16)
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes tokens (n,) uint16 as a shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> dict | None:
    """The directory's manifest.json, or None if it has none.

    Raises BadInput if the file is not a manifest.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        values = [shard[field] for shard in manifest["shards"] for field in ("file", "split", "sha256")]
        if not all(isinstance(value, str) for value in [manifest["tokenizer"], *values]):
            raise TypeError("a tokenizer, file, split or sha256 that is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: must be a manifest of shards, got {error!r}; prepare the data again") from error
    return manifest


def _require_directory(directory: str | Path) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(
            f"data: must be a directory of token shards, got {directory}; make one with {output.program()} prepare"
        )
    return directory


@dataclass
class TokenStream:
    """One split's shards, read as one long array of tokens."""

    paths: list[Path]
    shards: list[np.ndarray] = field(repr=False)
    vocab_size: int

    def __post_init__(self) -> None:
        self.ends = np.cumsum([len(shard) for shard in self.shards])  # position in the stream after each shard
        for path, shard in zip(self.paths, self.shards, strict=True):
            self._check_range(path, shard[:CHECKED_TOKENS])

    @classmethod
    def open(cls, directory: str | Path, split: str, vocab_size: int) -> "TokenStream":
        """Opens the shards `<name>_<split>_<number>` of a directory.

        Raises BadInput if there is none or one is bad.
        """
        directory = _require_directory(directory)
        matches = [path for suffix in ("bin", "npy") for path in directory.glob(f"*_{split}_*.{suffix}")]
        paths = sorted(matches, key=lambda path: path.name)
        manifest = read_manifest(directory)
        if manifest is None and (directory / BUILDING).exists():
            raise BadInput(
                f"{directory}: a preparation must have ended, got one that was stopped; run {output.program()} prepare "
                "again"
            )
        if manifest is not None:
            listed = [shard["file"] for shard in manifest["shards"] if shard["split"] == split]
            if missing := sorted(set(listed) - {path.name for path in paths}):
                raise BadInput(f"{directory}: every shard of {MANIFEST} must be there, missing {', '.join(missing)}")
            paths = [path for path in paths if path.name in listed]
        if not paths:
            raise BadInput(f"{directory}: must hold shards named <name>_{split}_<number>.bin or .npy, got none")
        shards = [open_shard(path) for path in paths]
        counts = {shard["file"]: shard.get("tokens") for shard in (manifest or {"shards": []})["shards"]}
        for path, shard in zip(paths, shards, strict=True):
            if (count := counts.get(path.name)) not in (None, len(shard)):
                raise BadInput(
                    f"{path}: must have the {count} tokens of {MANIFEST}, got {len(shard)}; it is another shard of "
                    "this name: copy or prepare it again"
                )
        return cls(paths, shards, vocab_size)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count - 1 of the stream, across shards: (count,) uint16."""
        pieces, index = [], int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            shard = self.shards[index]
            first = start - int(self.ends[index] - len(shard))
            piece = shard[first : first + count]
            self._check_range(self.paths[index], piece)
            pieces.append(piece)
            start, count, index = start + len(piece), count - len(piece), index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _check_range(self, path: Path, tokens: np.ndarray) -> None:
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise BadInput(
                f"{path}: every token must be below the vocabulary size {self.vocab_size}, got {largest}; "
                "the shard is damaged or was made with another tokenizer"
            )

    def num_windows(self, context: int) -> int:
        """Number of whole windows, each of `context` inputs and as many targets."""
        return (len(self) - 1) // context

    def windows(self, indices: np.ndarray, context: int) -> "Tensor":
        """Windows by index, (len(indices), context + 1) int64: inputs [:, :-1], targets [:, 1:]."""
        import torch

        rows = [self.read(int(index) * context, context + 1) for index in indices]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def tokenizer_name(directory: str | Path) -> str:
    """Name of the shards' tokenizer: the manifest's, or gpt2 if there is no manifest."""
    manifest = read_manifest(_require_directory(directory))
    return "gpt2" if manifest is None else manifest["tokenizer"]


def digest(streams: list[TokenStream], directory: str | Path) -> str:
    """Digest of the data, 16 hex digits.

    It covers the manifest's sha256 sums or, without a manifest, file names and token counts.
    """
    manifest = read_manifest(Path(directory))
    if manifest is not None:
        identity = sorted((shard["file"], shard["sha256"]) for shard in manifest["shards"])
    else:
        identity = [(path.name, len(shard)) for s in streams for path, shard in zip(s.paths, s.shards, strict=True)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
