"""Text to token ids, and `gpt2 prepare` of a small text in one process.

The text is the standard library's of the running Python; text_sha256 in the JSON says whether two runs had the same.
GPT-2's ids are first checked against byte-pair encoding as it is defined, on the ASCII of the text's beginning, and all
ids against the text that they decode to. `pytest bench/bench_tokenizer.py`
Source of the definition: Sennrich et al. 2016, arXiv:1508.07909, section 3.2.
"""

import functools
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from conftest import case

from engine import corpus, data, tokenizer
from engine.prepare import PrepareConfig, prepare

TEXT_BYTES = {"1MB": 1_000_000, "16MB": 16_000_000}
SIZES = [case("1MB", is_quick=True), case("16MB", is_quick=False)]
DEFINED_BYTES = 20_000  # of text that the definition encodes, which is slow
DOCUMENT_CHARACTERS = 2000


@functools.cache
def text_of(size: str) -> str:
    """About so many bytes of Python."""
    parts, held = [], 0
    for path in corpus.find_files([corpus.STDLIB]):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        held += len(parts[-1].encode())
        if held >= TEXT_BYTES[size]:
            break
    return "".join(parts)[: TEXT_BYTES[size]]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Ids of one word by the definition: of all neighbours the pair of lowest rank is merged, until none has a rank."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def defined_ids(ascii_text: str) -> list[int]:
    """GPT-2's ids of text in ASCII."""
    pattern = tokenizer.SPLIT_PATTERN.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9")
    pattern = pattern.replace("?a-zA-Z+", "?[a-zA-Z]+").replace("?0-9+", "?[0-9]+")
    ranks = tokenizer.gpt2_ranks()
    return [token for piece in re.findall(pattern, ascii_text) for token in merged(piece.encode(), ranks)]


def check_ids(name: str, words: tokenizer.Tokenizer, text: str, ids: np.ndarray) -> None:
    """Raises AssertionError unless the ids are the text's."""
    if name == "gpt2":
        known = text[:DEFINED_BYTES].encode("ascii", errors="ignore").decode()
        assert words.encode(known).tolist() == defined_ids(known), "ids must be those of the definition"
    else:
        assert ids.tolist() == list(text.encode()), "ids must be the bytes"
    assert int(ids.max()) < words.end_of_text
    assert words.decode(ids) == text, "the ids must decode to the text"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_encode(name: str, size: str, measure):
    words, text = tokenizer.load(name), text_of(size)
    measure.benchmark.extra_info["text_sha256"] = sha256(text)
    measure(lambda: words.encode(text), lambda ids: check_ids(name, words, text, ids), bytes=len(text.encode()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_prepare(name: str, size: str, measure, tmp_path):
    text, words = text_of(size), tokenizer.load(name)
    documents = [text[at : at + DOCUMENT_CHARACTERS] for at in range(0, len(text), DOCUMENT_CHARACTERS)]
    source, out = tmp_path / "documents.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    config = PrepareConfig(out=str(out), tokenizer=name, workers=1, val_fraction=0.1)

    def check(manifest: dict) -> None:
        found = []
        for shard in manifest["shards"]:
            path = out / shard["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"], path.name
            tokens = data.open_shard(path)
            starts = np.flatnonzero(tokens == words.end_of_text)
            found += [words.decode(part[1:]) for part in np.split(tokens, starts)[1:]]
        assert sorted(found) == sorted(documents), "the shards must decode to the documents"

    measure.benchmark.extra_info["text_sha256"] = sha256(text)
    measure(
        lambda: prepare([str(source)], config),
        check,
        before=lambda: shutil.rmtree(out, ignore_errors=True),
        documents=len(documents),
        bytes=len(text.encode()),
    )
