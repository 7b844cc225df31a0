"""Text to token ids, `gpt2 prepare`, and the batches of a step as fast as they come.

The text is the standard library's of the running Python. Ids are first checked against the text that they decode to,
and GPT-2's of a known sentence against those published; batches against slices of the tokens that were written.
"""

import functools
import hashlib
import json
import shutil
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bench.suites.conftest import DEVICE, case
from engine.tokens import tokenizer
from engine.tokens.batches import Batches, windows_at
from engine.tokens.prepare import PrepareConfig, prepare
from engine.tokens.reading import sources
from engine.tokens.shards import TokenStream, open_shard, write_shard

TEXT_BYTES = {"1MB": 1_000_000, "16MB": 16_000_000}
TEXTS = [case("1MB", is_quick=True), case("16MB", is_quick=False)]
KNOWN = "Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]
DOCUMENT_CHARACTERS = 2000


@functools.cache
def text_of(size: str) -> str:
    files = sources.find([sources.STDLIB]).files
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)[: TEXT_BYTES[size]]


@pytest.mark.parametrize("size", TEXTS)
@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_encode(name: str, size: str, measure):
    encoder, text = tokenizer.load(name), text_of(size)
    measure.info["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(ids: np.ndarray) -> None:
        known = KNOWN if name == "gpt2" else (text, list(text.encode()))
        assert encoder.encode(known[0]).tolist() == known[1]
        assert int(ids.max()) < encoder.end_of_text
        assert encoder.decode(ids) == text, "the ids must decode to the text"

    measure(lambda: encoder.encode(text), check, work=(len(text.encode()), "B/s"))


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
    remove = functools.partial(shutil.rmtree, out, ignore_errors=True)
    measure(lambda: prepare([str(source)], config), check, before=remove, work=(len(text.encode()), "B/s"))


VOCAB_SIZE, SHARDS = 50257, 4
STEPS = {"tiny": (64, 16, 1), "gpt2": (1024, 16, 32)}  # T, sequences of a micro-batch, micro-batches
SIZES = [case("4M-tokens", is_quick=True), case("100M-tokens", is_quick=False)]
SHARD_TOKENS = {"4M-tokens": 1 << 20, "100M-tokens": 25_000_000}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes shards of random tokens once per size: (directory, all of the tokens)."""

    @functools.cache
    def write(size: str) -> tuple[Path, np.ndarray]:
        directory = tmp_path_factory.mktemp("shards")
        tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=SHARDS * SHARD_TOKENS[size], dtype=np.uint16)
        for number, part in enumerate(np.split(tokens, SHARDS)):
            write_shard(directory / f"random_train_{number:06d}.bin", part)
        return directory, tokens

    return write


def check_batches(batches: Batches, tokens: np.ndarray) -> None:
    """Raises AssertionError unless an epoch has every window once and a step's batches are slices of the tokens."""
    T, S = batches.context, batches.sequences
    steps = batches.num_windows // S
    order = windows_at(np.arange(steps * S), batches.num_windows, batches.seed).reshape(steps, S)
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
    directory, tokens = written(size)
    T, B, A = STEPS[preset]
    stream = TokenStream.open(directory, "train", VOCAB_SIZE)
    with closing(Batches(stream, context=T, tokens_per_step=T * B * A, micro_batch_size=B, device=DEVICE)) as batches:
        steps, work = count(), (T * batches.sequences, "tokens/s")
        measure(lambda: batches.at(next(steps)), lambda first: check_batches(batches, tokens), work=work)
