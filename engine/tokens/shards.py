"""Token shards: the file format, a split's shards as one stream, and windows of that stream.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, then zeros),
then the tokens as little-endian uint16. The published pre-tokenised FineWeb shards have this
format. One-dimensional uint16 .npy files are read too, and nanoGPT's train.bin and val.bin, which
have no header. engine/tokens/names.py says which names are read.
A split's shards, in the order of their names, form one stream. The stream is cut into windows of T
inputs. A window's targets are its inputs shifted by one token, so neighbouring windows share one
token.
"""

import ast
import hashlib
import json
import os
import resource
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from engine import output
from engine.errors import BadInput
from engine.tokens import foreign, names
from engine.tokens.foreign import HEADERLESS
from model.files import BadFile, check_fields, check_present, few, open_file, read_json

if TYPE_CHECKING:  # prepare, its workers and --help import this file and must not wait for PyTorch
    from torch import Tensor

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC = 20240520
VERSION = 1
MANIFEST = "manifest.json"
NPY = b"\x93NUMPY"  # before two bytes of version, and the header's length in 2 bytes, from version 2 on in 4
MOST_NPY_HEADER = 10_000  # bytes; numpy reads no longer one either
BUILDING = ".building"  # temporary directory of `prepare`, inside its --out
CHECKED_TOKENS = 1 << 20  # first tokens of a shard checked for range when it is opened; the rest, when read


# ---- Shards -------------------------------------------------------------------------------------------------------


def open_shard(path: Path) -> np.ndarray:
    """The shard's tokens, (n,) uint16, memory-mapped.

    Raises BadInput if the header, size or dtype is wrong.
    """
    try:
        tokens = open_array(path) if path.suffix == ".npy" else _open_bin(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: must be a readable token shard, got {error}") from error
    if len(tokens) == 0:
        raise BadInput(f"{path}: a shard must hold at least one token, got none")
    return tokens


def open_array(path: Path) -> np.ndarray:
    """The tokens of a .npy file, (n,) uint16, memory-mapped. Raises BadFile, OSError or BadInput.

    numpy's own reader believes the header, and raises errors of a dozen types.
    """
    with open_file(path) as file:
        header = _npy_header(file)
        kind, shape = header["descr"], header["shape"]
        if kind not in ("<u2", "=u2", "u2") or len(shape) != 1:
            kind = "uint16" if kind == "<u2" else kind[:40]
            raise BadInput(
                f"{path}: tokens must be (n,) uint16, got {str(shape)[:80]} {kind}; if they are GPT-2's, write them "
                "again with numpy.save(file, tokens.ravel().astype('<u2'))"
            )
        return _mapped(path, file, shape[0], file.tell())


def _npy_header(file: BinaryIO) -> dict:
    start = file.read(8)
    if start[:6] != NPY or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise BadFile("no .npy file")
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    content = file.read(length) if length <= MOST_NPY_HEADER else b""
    if len(content) != length:
        raise BadFile(f"a header of {length:,} bytes, which is cut short or too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, of a damaged literal
            header = ast.literal_eval(content.decode("latin1"))
        check_fields(header, {"descr": str, "fortran_order": bool})
        shape = header["shape"]
        if type(shape) is not tuple or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
            raise BadFile("another shape")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise BadFile("a damaged header") from error
    return header


def _open_bin(path: Path) -> np.ndarray:
    with open_file(path) as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
        if len(header) < HEADER_BYTES:
            raise BadInput(f"{path}: the header must be {HEADER_BYTES} bytes, got {len(header)}")
        header = header.view("<i4")
        if header[0] == foreign.LLAMA_MAGIC:
            raise BadInput(
                f"{path}: tokens must be GPT-2's, got llm.c's tokens of Llama 3 (magic number {header[0]}, uint32); "
                f"make shards of the text with {output.program()} prepare"
            )
        if header[0] != MAGIC:
            raise BadInput(f"{path}: the magic number must be {MAGIC}, got {header[0]}; this is not a token shard")
        if header[1] != VERSION:
            raise BadInput(f"{path}: the version must be {VERSION}, got {header[1]}")
        return _mapped(path, file, int(header[2]), HEADER_BYTES)


def _mapped(path: Path, file: BinaryIO, count: int, offset: int) -> np.ndarray:
    """`count` tokens from `offset` to the end of an open file. Raises BadInput if its size is another."""
    expected, num_bytes = offset + 2 * count, os.fstat(file.fileno()).st_size
    if num_bytes != expected:
        raise BadInput(
            f"{path}: {count} tokens take {expected} bytes, got {num_bytes}; "
            "the file is cut short or damaged: copy or prepare it again"
        )
    if count == 0:
        return np.empty(0, dtype=np.uint16)
    return np.memmap(file, dtype="<u2", mode="r", offset=offset)


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a shard as in open_shard, or of nanoGPT's train.bin or val.bin."""
    if not foreign.is_headerless(path):
        return open_shard(path)
    tokens, *others = (np.memmap(path.with_name(name), dtype="<u2", mode="r") for name in (path.name, *HEADERLESS))
    largest = max(int(part[:CHECKED_TOKENS].max()) for part in others)
    if largest < 256:  # text has " the", which is 262, in its first lines
        raise BadInput(
            f"{path}: without a header, tokens must be GPT-2's, got none above {largest}, as characters or "
            f"bytes have; make token shards of the text with {output.program()} prepare"
        )
    return tokens


def shard_header(count: int) -> bytes:
    """The bytes before the tokens of a shard that has `count` of them."""
    values = np.zeros(HEADER_INTS, dtype="<i4")
    values[:3] = MAGIC, VERSION, count
    return values.tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes tokens (n,) uint16 as a shard."""
    with path.open("wb") as file:
        file.write(shard_header(len(tokens)))
        file.write(tokens.astype("<u2").tobytes())


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits. Raises BadFile or OSError if it cannot be read."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> dict | None:
    """The directory's manifest.json, or None if it has none.

    Raises BadInput if the file is not a manifest.
    """
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        manifest = read_json(path, {"tokenizer": str, "shards": list})
        for shard in manifest["shards"]:
            check_fields(shard, {"file": str, "split": str, "sha256": str})
            check_present(shard, {"bytes": int, "tokens": int})
            if Path(shard["file"]).name != shard["file"]:
                raise BadFile(f"a shard in another directory, {shard['file'][:80]}")
        if "request" in manifest:  # made by `prepare`, which prints these
            check_fields(manifest, {"text_bytes": int, "split": str, "skipped": dict[str, int]})
            for name in ("documents", "tokens"):
                check_fields(check_fields(manifest, {name: dict})[name], {"train": int, "val": int})
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: must be a manifest of shards, got {error}; prepare the data again") from error
    return manifest


def require_directory(directory: str | Path) -> Path:
    """The path of a directory of data. Raises BadInput, which names what is there instead."""
    if foreign.what(directory).kind != "data" or not os.path.isdir(directory):
        raise BadInput(
            f"data: must be a directory of token shards, got {directory}"
            f"{foreign.hint(directory, f'make one with {output.program()} prepare')}"
        )
    return Path(directory)


def _allow_files(count: int) -> None:
    """Raises this process's own limit on open files by `count`, as far as the system's goes.

    100B tokens are 1,000 shards of 100M, and many systems allow 1,024 files at first.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        soft = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        with suppress(OSError, ValueError):  # the file that cannot be opened is named then
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class TokenStream:
    """One split's shards, read as one long array of tokens."""

    paths: list[Path]
    shards: list[np.ndarray] = field(repr=False)
    vocab_size: int

    def __post_init__(self) -> None:
        self.shards = [shard.view(np.ndarray) for shard in self.shards]  # a slice of a memmap takes ten times as long
        self.lengths = np.array([len(shard) for shard in self.shards])
        self.ends = np.cumsum(self.lengths)  # position in the stream after each shard
        for path, shard in zip(self.paths, self.shards, strict=True):
            self._check_range(path, shard[:CHECKED_TOKENS])

    @classmethod
    def open(cls, directory: str | Path, split: str, vocab_size: int) -> "TokenStream":
        """Opens a split's shards in a directory: those of its manifest, else of the names in engine/tokens/names.py.

        Raises BadInput if there is none or one is bad.
        """
        directory = require_directory(directory)
        paths = names.find(directory, split)
        manifest = read_manifest(directory)
        if manifest is None and (directory / BUILDING).exists():
            raise BadInput(
                f"{directory}: a preparation must have ended, got one that was stopped; run {output.program()} prepare "
                "again"
            )
        if manifest is not None:
            listed = [shard["file"] for shard in manifest["shards"] if shard["split"] == split]
            paths = [directory / name for name in sorted(set(listed))]
            if missing := [path.name[:80] for path in paths if not os.path.lexists(path)]:
                raise BadInput(f"{directory}: every shard of {MANIFEST} must be there, missing {few(missing)}")
        if not paths:
            pattern = names.PATTERN.format(split=split)
            raise BadInput(f"{directory}: must hold shards named {pattern}, got none")
        if manifest is None and len(paths) > 1 and not names.SHARD.fullmatch(paths[0].name):
            raise BadInput(
                f"{directory}: must hold one set of tokens where their names have no numbers, got "
                f"{few([path.name for path in paths])}; put each set into a directory of its own"
            )
        _allow_files(len(paths))  # each stays open with its memory map
        shards = [open_tokens(path) for path in paths]
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

    @property
    def origin(self) -> str:
        """Text such as ", nanoGPT's files", or "" for shards."""
        is_ours = not foreign.is_headerless(self.paths[0])
        return "" if is_ours else ", nanoGPT's train.bin and val.bin, taken to be GPT-2's tokens"

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count - 1 of the stream, across shards: (count,) uint16."""
        return self._rows(np.array([start]), count)[0]

    def _rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """`count` tokens from each start, (len(starts), count) uint16. All are below the vocabulary size."""
        owners = np.searchsorted(self.ends, starts, side="right")  # the shard in which each row begins
        left = self.ends[owners] - starts  # tokens of that shard from there on
        firsts = (self.lengths[owners] - left).tolist()
        rows = [self.shards[owner][first : first + count] for owner, first in zip(owners.tolist(), firsts, strict=True)]
        for row in np.flatnonzero(left < count).tolist():  # it goes on in the next shard
            parts, missing, owner = [rows[row]], count - int(left[row]), int(owners[row])
            while missing > 0:
                owner += 1
                parts.append(self.shards[owner][:missing])
                missing -= len(parts[-1])
            rows[row] = np.concatenate(parts)
        tokens = np.concatenate(rows).reshape(len(starts), count)
        if tokens.max() >= self.vocab_size:  # before any of them is trained on
            row, column = divmod(int(tokens.argmax()), count)
            self._check_range(self.paths[np.searchsorted(self.ends, starts[row] + column, side="right")], tokens)
        return tokens

    def _check_range(self, path: Path, tokens: np.ndarray) -> None:
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise BadInput(
                f"{path}: every token must be below the vocabulary size {self.vocab_size}, got {largest}; "
                "the shard is damaged or was made with another tokenizer"
            )

    def num_windows(self, context: int) -> int:
        """Number of whole windows, each of `context` inputs and as many targets."""
        return (len(self) - 1) // context

    def window_rows(self, indices: np.ndarray, context: int) -> np.ndarray:
        """Windows by index, (len(indices), context + 1) uint16: inputs [:, :-1], targets [:, 1:]."""
        return self._rows(indices * context, context + 1)

    def windows(self, indices: np.ndarray, context: int) -> "Tensor":
        """The same as a tensor of int64."""
        import torch

        return torch.from_numpy(self.window_rows(indices, context).astype(np.int64))


def tokenizer_name(directory: str | Path) -> str:
    """Name of the shards' tokenizer: the manifest's, or gpt2 if there is no manifest."""
    manifest = read_manifest(require_directory(directory))
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
