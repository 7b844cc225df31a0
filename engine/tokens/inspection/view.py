"""What a directory of token shards holds, for `gpt2 data`: a row per shard, totals per split, some windows.

Every token is read once, from files and not from memory maps, since an unreadable page of a map
kills the process. A damaged shard is named, and the others are counted without it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from engine import output
from engine.errors import BadInput
from engine.tokens import foreign, names, shards, tokenizer
from engine.tokens.inspection import integrity, scan
from engine.tokens.preparation.progress import Progress
from engine.tokens.tokenizer import Tokenizer
from model.files import BadFile, open_file

MEASURED_TOKENS = 1 << 26  # whose bytes are counted; of more tokens, a sample of about so many
WINDOW_BYTES = 400  # of text in a window, about
SEARCHED_TOKENS = 1 << 20  # in front and behind, in which a border of documents is looked for
ALL_HASHES = 1 << 62
NO_DIGEST, UNCHECKED, SAME, OTHER = "none", "not checked", "ok", "differs"


def view(
    directory: str | Path, check: bool = False, duplicates: bool = False, windows: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Everything that `gpt2 data` prints, in JSON types.

    check: compare the shards with the manifest's sha256. duplicates: compare all documents, however
    many there are. Shows its progress on standard error. Raises BadInput if the directory holds no
    data.
    """
    directory = shards.require_directory(directory)
    manifest = shards.read_manifest(directory)
    listed = _listed(directory, manifest)
    words = tokenizer.load("gpt2" if manifest is None else manifest["tokenizer"])
    num_tokens = sum(_size(directory / entry["file"]) for entry in listed) // 2
    counting = _Counting(words, num_tokens, scan.Chosen(ALL_HASHES if duplicates else scan.MOST_HASHES))
    rows = []
    with closing(counting):
        for entry in listed:
            rows.append(counting.shard(directory / entry["file"], entry, check and manifest is not None))
    ratio = counting.bytes_per_token()
    unlisted = integrity.unlisted(manifest, names.find(directory))
    return {
        "directory": str(directory),
        "kind": _kind(directory, manifest),
        "tokenizer": words.name,
        "shards": rows,
        "splits": counting.totals(rows),
        "compared": f"1 in {1 << counting.chosen.bits}",
        "bytes_per_token": ratio,
        "measured_tokens": counting.measured,
        "unlisted": [path.name for path in unlisted],
        "manifest": manifest and {key: value for key, value in manifest.items() if key != "shards"},
        "windows": _windows(directory, [row for row in rows if not row["damage"]], words, ratio or 1.0, windows, seed),
        "damaged": sum(row["damage"] is not None for row in rows),
    }


def _listed(directory: Path, manifest: dict | None) -> list[dict]:
    """File and split of each shard, as training reads them: the manifest's, else those of known names."""
    if manifest is not None:
        entries = {entry["file"]: entry for entry in manifest["shards"]}
        return sorted(entries.values(), key=lambda entry: (_place(entry["split"]), entry["file"]))
    if (directory / shards.BUILDING).exists():
        raise BadInput(
            f"data: {directory} must hold a preparation that has ended, got one that was stopped; "
            f"run {output.program()} prepare again"
        )
    return [{"file": path.name, "split": split} for split in names.SPLITS for path in names.find(directory, split)]


def _place(split: str) -> tuple[int, str]:
    return (names.SPLITS.index(split) if split in names.SPLITS else len(names.SPLITS)), split


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _kind(directory: Path, manifest: dict | None) -> str:
    if manifest is not None:
        return "prepared here" if "request" in manifest else "with a manifest"
    if foreign.is_nanogpt(directory):
        return "nanoGPT's train.bin and val.bin, taken to be GPT-2's tokens"
    return "without a manifest, taken to be GPT-2's tokens"


# ---- Counting -----------------------------------------------------------------------------------------------------


class _Counting:
    """Counts of all splits, and the progress of counting."""

    def __init__(self, words: Tokenizer, num_tokens: int, chosen: scan.Chosen):
        """num_tokens: of all shards, about."""
        self.words, self.chosen = words, chosen
        self.splits: dict[str, scan.Split] = {}
        self.lengths = np.zeros(1 << 16, dtype=np.uint8)  # bytes of text of each token, also of damaged ones
        self.lengths[: words.end_of_text] = words.byte_lengths()
        self.measured = self.num_bytes = 0
        self._share = min(1.0, MEASURED_TOKENS / max(num_tokens, 1))
        self._progress = Progress(2 * num_tokens, name="data")

    def shard(self, path: Path, listed: dict, check: bool) -> dict[str, Any]:
        """Counts a shard and returns its row."""
        row = {"file": path.name, "split": listed["split"], "tokens": None, "documents": None, "bytes": _size(path)}
        wrong: list[str] = []
        beyond = None  # of the vocabulary
        digest = hashlib.sha256() if check else None
        if not path.exists():
            wrong.append("is missing")
        else:
            try:
                tokens = shards.open_tokens(path)
                row |= {"tokens": len(tokens), "documents": 0}
                wrong += integrity.sizes(path, tokens, listed)
                for block, reason in self._blocks(path, getattr(tokens, "offset", 0), digest):
                    beyond = beyond or reason
                    row["documents"] += self._add(listed["split"], block)
            except (BadInput, BadFile, OSError) as error:
                wrong.append(integrity.unreadable(path, error))
        wrong += [beyond] if beyond else []
        if row["documents"] is None and (split := self.splits.get(listed["split"])) is not None:
            split.close()  # the next shard does not go on with the document before this one
        state = NO_DIGEST if "sha256" not in listed else UNCHECKED
        if digest is not None and row["tokens"] is not None:
            reason = integrity.digest(digest.hexdigest(), listed)
            wrong += [reason] if reason else []
            state = OTHER if reason else SAME
        return row | {"digest": state, "damage": "; ".join(wrong) or None}

    def _blocks(self, path: Path, offset: int, digest: Any) -> Iterator[tuple[bytes, str | None]]:
        """Yields a shard's tokens in blocks, and what is wrong with each."""
        with open_file(path) as file:
            header, start = file.read(offset), 0
            if digest is not None:
                digest.update(header)
            while block := file.read(2 * scan.BLOCK_TOKENS):
                if digest is not None:
                    digest.update(block)
                tokens = np.frombuffer(block, dtype="<u2")
                yield block, integrity.beyond(tokens, start, self.words.vocab_size)
                start += len(tokens)

    def _add(self, name: str, block: bytes) -> int:
        split = self.splits.setdefault(name, scan.Split(self.words.end_of_text, self.chosen))
        found = split.add(block)
        scan.make_room(list(self.splits.values()), self.chosen)
        part = np.frombuffer(block, dtype="<u2")[: max(1, int(self._share * len(block) // 2))]
        self.measured += len(part)
        self.num_bytes += int(self.lengths[part].sum(dtype=np.int64))
        self._progress.advance(len(block), len(block) // 2)
        return found

    def close(self) -> None:
        """Ends the splits and removes the bar."""
        for split in self.splits.values():
            split.close()
        self._progress.close()

    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for, end-of-text tokens counted as tokens of none."""
        return self.num_bytes / self.measured if self.measured else None

    def totals(self, rows: list[dict]) -> dict[str, dict[str, Any]]:
        """Sums of each split."""
        compared = scan.copies(self.splits)
        found = {}
        for name in dict.fromkeys(row["split"] for row in rows):
            counted = self.splits.get(name, scan.Split(self.words.end_of_text, self.chosen))
            mine = [row for row in rows if row["split"] == name]
            found[name] = {
                "shards": len(mine),
                "tokens": counted.tokens,
                "documents": counted.documents,
                "ends_of_text": counted.ends,
                "bytes": sum(row["bytes"] for row in mine),
                "lengths": counted.spread(),
                "duplicates": compared.get(name),
            }
        return found


# ---- Windows ------------------------------------------------------------------------------------------------------


def _windows(
    directory: Path, rows: list[dict], words: Tokenizer, ratio: float, count: int, seed: int
) -> list[dict[str, Any]]:
    """Decoded pieces of shards, at random places. Every other one, from the first on, is at a border of documents."""
    if not rows:
        return []
    rng = np.random.default_rng(seed)
    ends = np.cumsum([row["tokens"] for row in rows])
    width, found = max(8, round(WINDOW_BYTES / max(ratio, 0.1))), []
    for number in range(count):
        place = int(rng.integers(ends[-1]))
        row = rows[int(np.searchsorted(ends, place, side="right"))]
        tokens = shards.open_tokens(directory / row["file"])
        start = place - int(ends[rows.index(row)]) + row["tokens"]
        if number % 2 == 0:
            first = max(0, start - SEARCHED_TOKENS)
            borders = first + np.flatnonzero(tokens[first : start + SEARCHED_TOKENS] == words.end_of_text)
            if len(borders):
                start = int(borders[np.abs(borders - start).argmin()]) - width // 2
        start = max(0, min(start, len(tokens) - width))
        ids = np.asarray(tokens[start : start + width])
        pieces = np.split(ids, np.flatnonzero(ids == words.end_of_text))
        texts = [words.decode(piece[piece != words.end_of_text]) for piece in pieces]
        found.append({"split": row["split"], "file": row["file"], "first_token": start, "documents": texts})
    return found
