"""Token shards to batches. The batch of step s is a pure function of (data, seed, s).

A split's shards, in the order of their names, are one stream of tokens, cut into windows of T inputs; each window's
targets are the same tokens one further on, so neighbours share one token. A keyed permutation orders all windows of
an epoch: no window twice, none left out, and nothing to store. Step s takes windows s * S to (s + 1) * S - 1 of the
endless sequence of epochs, S = tokens_per_step / T, and micro-batches and ranks take slices of those, so a run on 1,
2 or 8 GPUs sees the same batches, and resuming needs only the step number.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count), then uint16 tokens, the format
of the published pre-tokenised FineWeb shards; one-dimensional uint16 .npy files are read too.
"""

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import BadInput

if TYPE_CHECKING:  # `prepare`, its workers and --help use this file without waiting for PyTorch
    from torch import Tensor

HEADER_INTS = 256
MAGIC = 20240520
VERSION = 1
MANIFEST = "manifest.json"
BUILDING = ".building"  # where `prepare` works, inside the directory that it fills
CHECKED_TOKENS = 1 << 20  # of each shard, scanned for range when it is opened; the rest is checked as it is read
FEISTEL_ROUNDS = 6


# ---- Shards -------------------------------------------------------------------------------------------------------


def open_shard(path: Path) -> np.ndarray:
    """The shard's tokens, (n,) uint16, memory-mapped. Raises BadInput with file, field, found and expected."""
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
    expected, found = 4 * HEADER_INTS + 2 * int(header[2]), path.stat().st_size
    if found != expected:
        raise BadInput(
            f"{path}: {header[2]} tokens take {expected} bytes, got {found}; "
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


def read_manifest(directory: Path) -> dict | None:
    """The directory's manifest.json, or None where shards came without one. Raises BadInput if it is no manifest."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        listed = [shard[field] for shard in manifest["shards"] for field in ("file", "split", "sha256")]
        if not all(isinstance(field, str) for field in [manifest["tokenizer"], *listed]):
            raise TypeError("a tokenizer, file, split or sha256 that is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: must be a manifest of shards, got {error!r}; prepare the data again") from error
    return manifest


def _existing(directory: str | Path) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(f"data: must be a directory of token shards, got {directory}; make one with gpt2 prepare")
    return directory


@dataclass
class TokenStream:
    """One split's shards as one long array of tokens."""

    paths: list[Path]
    shards: list[np.ndarray] = field(repr=False)
    vocab_size: int

    def __post_init__(self) -> None:
        self.ends = np.cumsum([len(shard) for shard in self.shards])  # of each shard in the stream
        for path, shard in zip(self.paths, self.shards, strict=True):
            self._check_range(path, shard[:CHECKED_TOKENS])

    @classmethod
    def open(cls, directory: str | Path, split: str, vocab_size: int) -> "TokenStream":
        """The shards `<name>_<split>_<number>` of a directory. Raises BadInput if there are none or one is bad."""
        directory = _existing(directory)
        found = [path for suffix in ("bin", "npy") for path in directory.glob(f"*_{split}_*.{suffix}")]
        paths = sorted(found, key=lambda path: path.name)
        manifest = read_manifest(directory)
        if manifest is None and (directory / BUILDING).exists():
            raise BadInput(
                f"{directory}: a preparation must have ended, got one that was stopped; run gpt2 prepare again"
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
        """Tokens start to start + count, (count,) uint16, across shard boundaries where need be."""
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
        if (worst := int(tokens.max(initial=0))) >= self.vocab_size:
            raise BadInput(
                f"{path}: every token must be below the vocabulary size {self.vocab_size}, got {worst}; "
                "the shard is damaged or was made with another tokenizer"
            )

    def num_windows(self, context: int) -> int:
        """Windows of `context` inputs and as many targets."""
        return (len(self) - 1) // context

    def windows(self, indices: np.ndarray, context: int) -> "Tensor":
        """Windows by number, (len(indices), context + 1) int64: inputs are [:, :-1], targets [:, 1:]."""
        import torch

        rows = [self.read(int(index) * context, context + 1) for index in indices]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def tokenizer_name(directory: str | Path) -> str:
    """The tokenizer that made the shards: the manifest's, or gpt2 for shards that came without one."""
    manifest = read_manifest(_existing(directory))
    return "gpt2" if manifest is None else manifest["tokenizer"]


def digest(streams: list[TokenStream], directory: str | Path) -> str:
    """Which data this is, in 16 hex digits: of the manifest's sha256 sums, or without one of names and sizes."""
    manifest = read_manifest(Path(directory))
    if manifest is not None:
        identity = sorted((shard["file"], shard["sha256"]) for shard in manifest["shards"])
    else:
        identity = [(path.name, len(shard)) for s in streams for path, shard in zip(s.paths, s.shards, strict=True)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


# ---- Order --------------------------------------------------------------------------------------------------------


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words in which every input bit moves every output bit: splitmix64's finaliser.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derived_seed(*key: int) -> int:
    """A seed of 63 bits that any change to the key changes."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.array([part % (1 << 64)], dtype=np.uint64))
    return int(state[0]) >> 1


def permute(indices: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each index: O(1) memory, int64 in and out.

    A Feistel network permutes the 2h-bit words, the fewest that hold `size`; a word outside range(size) is sent on
    until it falls inside, which keeps it a permutation and takes fewer than 4 turns on average.
    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 3 (cycle walking).
    """
    round_keys = _mix(np.uint64(derived_seed(*key)) + np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64))
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    words = indices.astype(np.uint64)
    outside = np.ones(words.shape, dtype=bool)
    while outside.any():
        word = words[outside]
        left, right = word >> half, word & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        words[outside] = (left << half) | right
        outside = words >= np.uint64(size)
    return words.astype(np.int64)


def step_windows(step: int, sequences: int, num_windows: int, seed: int) -> np.ndarray:
    """The windows of one step, (sequences,) int64, for all ranks and micro-batches; it may straddle two epochs."""
    positions = np.arange(step * sequences, (step + 1) * sequences)
    windows = np.empty_like(positions)
    for epoch in np.unique(positions // num_windows):
        now = positions // num_windows == epoch
        windows[now] = permute(positions[now] % num_windows, num_windows, seed, int(epoch))
    return windows


# ---- Batches ------------------------------------------------------------------------------------------------------


@dataclass
class Batches:
    """What one rank trains on: `at(step)` gives its micro-batches, read ahead by a background thread."""

    stream: TokenStream
    context: int  # T, tokens per sequence
    micro_batch_size: int  # B, sequences per forward pass on one rank
    accumulation: int  # micro-batches per step
    seed: int
    rank: int = 0
    world_size: int = 1
    pin: bool = False  # page-locked memory, so that the copy to a GPU overlaps with work

    def __post_init__(self) -> None:
        self.sequences = self.micro_batch_size * self.accumulation * self.world_size  # per step, all ranks
        self.num_windows = self.stream.num_windows(self.context)
        if self.num_windows < self.sequences:
            raise BadInput(
                f"data: one step needs {self.sequences} sequences of {self.context} tokens, got a corpus of "
                f"{self.num_windows} ({len(self.stream)} tokens); give more text or lower --tokens-per-step to at most "
                f"{self.num_windows * self.context}"
            )
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future] | None = None

    def at(self, step: int) -> list[tuple["Tensor", "Tensor"]]:
        """This rank's micro-batches of a step: (tokens, targets), each (B, T) int64 on the CPU."""
        ahead, self._ahead = self._ahead, None
        micro_batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._load(step)
        self._ahead = step + 1, self._reader.submit(self._load, step + 1)
        return micro_batches

    def _load(self, step: int) -> list[tuple["Tensor", "Tensor"]]:
        B, R = self.micro_batch_size, self.world_size
        mine = step_windows(step, self.sequences, self.num_windows, self.seed).reshape(-1, R, B)[:, self.rank]
        micro_batches = []
        for indices in mine:  # (B,) each
            windows = self.stream.windows(indices, self.context)  # (B, T + 1)
            pair = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
            micro_batches.append(tuple(t.pin_memory() for t in pair) if self.pin else pair)
        return micro_batches

    def close(self) -> None:
        """Ends the background thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)
