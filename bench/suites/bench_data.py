"""Text to token ids, `gpt2 prepare`, opening token shards, and the batches of a step as fast as they come.

The text is the standard library's of the running Python. Ids are first checked against the text that they decode to,
and GPT-2's of a known sentence against those published; batches against slices of the tokens that were written.
"""

import functools
import hashlib
import json
import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bench.suites.conftest import ON_GPU, case
from engine.tokens import sources, tokenizer
from engine.tokens.batches import Batches, step_windows
from engine.tokens.prepare import PrepareConfig, prepare
from engine.tokens.shards import TokenStream, open_shard, write_shard

TEXT_BYTES = {"1MB": 1_000_000, "16MB": 16_000_000}
TEXTS = [case("1MB", is_quick=True), case("16MB", is_quick=False)]
KNOWN = "Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]
DOCUMENT_CHARACTERS = 2000


@functools.cache
def text_of(size: str) -> str:
    """About so many bytes of Python."""
    parts, taken = [], 0
    for path in sources.find_files([sources.STDLIB]):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        taken += len(parts[-1].encode())
        if taken >= TEXT_BYTES[size]:
            break
    return "".join(parts)[: TEXT_BYTES[size]]


def check_ids(name: str, encoder: tokenizer.Tokenizer, text: str, ids: np.ndarray) -> None:
    """Raises AssertionError unless the ids are the text's."""
    if name == "gpt2":
        assert encoder.encode(KNOWN[0]).tolist() == KNOWN[1]
    else:
        assert ids.tolist() == list(text.encode()), "ids must be the bytes"
    assert int(ids.max()) < encoder.end_of_text
    assert encoder.decode(ids) == text, "the ids must decode to the text"


@pytest.mark.parametrize("size", TEXTS)
@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_encode(name: str, size: str, measure):
    encoder, text = tokenizer.load(name), text_of(size)
    measure.info["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    measure(
        lambda: encoder.encode(text), lambda ids: check_ids(name, encoder, text, ids), work=(len(text.encode()), "B/s")
    )


@pytest.mark.parametrize("size", TEXTS)
@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_prepare(name: str, size: str, measure, tmp_path):
    text, encoder = text_of(size), tokenizer.load(name)
    documents = [text[at : at + DOCUMENT_CHARACTERS] for at in range(0, len(text), DOCUMENT_CHARACTERS)]
    source, out = tmp_path / "documents.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    config = PrepareConfig(out=str(out), tokenizer=name, workers=1, val_fraction=0.1)

    def check(manifest: dict) -> None:
        found = []
        for shard in manifest["shards"]:
            path = out / shard["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"], path.name
            tokens = open_shard(path)
            starts = np.flatnonzero(tokens == encoder.end_of_text)
            found += [encoder.decode(part[1:]) for part in np.split(tokens, starts)[1:]]
        assert sorted(found) == sorted(documents), "the shards must decode to the documents"

    measure.info["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    measure(
        lambda: prepare([str(source)], config),
        check,
        before=lambda: shutil.rmtree(out, ignore_errors=True),
        work=(len(text.encode()), "B/s"),
    )


VOCAB_SIZE = 50257
SHARDS = 4
QUICK_TOKENS, FULL_TOKENS = 1 << 20, 25_000_000  # of a shard
STEPS = {"tiny": (64, 16, 1), "gpt2": (1024, 16, 32)}  # T, sequences of a micro-batch, micro-batches


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes shards of random tokens once per size: (directory, all of the tokens)."""
    made: dict[int, tuple[Path, np.ndarray]] = {}

    def write(shard_tokens: int) -> tuple[Path, np.ndarray]:
        if shard_tokens not in made:
            directory = tmp_path_factory.mktemp("shards")
            tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=SHARDS * shard_tokens, dtype=np.uint16)
            for number, part in enumerate(np.split(tokens, SHARDS)):
                write_shard(directory / f"random_train_{number:06d}.bin", part)
            made[shard_tokens] = directory, tokens
        return made[shard_tokens]

    return write


SIZES = [case("4M-tokens", is_quick=True), case("100M-tokens", is_quick=False)]
SHARD_TOKENS = {"4M-tokens": QUICK_TOKENS, "100M-tokens": FULL_TOKENS}


@pytest.mark.parametrize("size", SIZES)
def test_open(size: str, written, measure):
    directory, tokens = written(SHARD_TOKENS[size])

    def check(stream: TokenStream) -> None:
        assert len(stream) == len(tokens)
        assert np.array_equal(stream.read(0, len(tokens)), tokens), "the stream must be the tokens that were written"

    measure(lambda: TokenStream.open(directory, "train", VOCAB_SIZE), check)


def check_batches(batches: Batches, tokens: np.ndarray) -> None:
    """Raises AssertionError unless an epoch has every window once and a step's batches are slices of the tokens."""
    T, S = batches.context, batches.sequences
    steps = batches.num_windows // S
    order = step_windows(0, steps * S, batches.num_windows, batches.seed).reshape(steps, S)
    assert len(np.unique(order)) == steps * S, "no window may come twice in an epoch"
    for step in (0, steps - 1):
        got = batches.at(step)
        inputs, targets = (np.concatenate([pair[part].numpy() for pair in got]) for part in (0, 1))
        for index, row, target in zip(order[step], inputs, targets, strict=True):
            window = tokens[index * T : (index + 1) * T + 1]
            assert np.array_equal(row, window[:-1]), f"window {index} must be a slice of the tokens"
            assert np.array_equal(target, window[1:]), f"targets of window {index} must be one token further on"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", STEPS)
def test_batches(preset: str, size: str, written, measure):
    directory, tokens = written(SHARD_TOKENS[size])
    T, B, accumulation = STEPS[preset]
    stream = TokenStream.open(directory, "train", VOCAB_SIZE)
    batches = Batches(stream, T, B, accumulation, seed=1, pin=ON_GPU)
    steps = count()
    try:
        measure(
            lambda: batches.at(next(steps)),
            lambda first: check_batches(batches, tokens),
            work=(T * batches.sequences, "tokens/s"),
        )
    finally:
        batches.close()
