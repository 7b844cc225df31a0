"""Shards: a stream gives back what was written; a truncated, foreign or damaged shard is refused."""

import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadInput
from engine.tokens import shards
from engine.tokens.batches import Batches
from engine.tokens.shards import TokenStream

VOCAB = 50257
quick = settings(deadline=None, max_examples=60)


def write(directory: Path, name: str, tokens) -> Path:
    path = directory / name
    tokens = np.asarray(tokens, dtype=np.uint16)
    np.save(path, tokens) if name.endswith(".npy") else shards.write_shard(path, tokens)
    return path


@quick
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), cut=st.data())
def test_a_stream_is_the_concatenation_of_its_shards(lengths, cut):
    shards = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])
    stream = TokenStream([Path(str(i)) for i in range(len(shards))], shards, VOCAB)
    assert len(stream) == sum(lengths)
    start = cut.draw(st.integers(0, len(stream) - 1))
    count = cut.draw(st.integers(1, len(stream) - start))
    assert stream.read(start, count).tolist() == list(range(start, start + count))


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path, suffix):
    write(tmp_path, f"x_train_000001.{suffix}", range(10, 25))
    write(tmp_path, f"x_train_000000.{suffix}", range(10))
    write(tmp_path, f"x_val_000000.{suffix}", range(100, 120))
    stream = TokenStream.open(tmp_path, "train", VOCAB)
    assert stream.read(0, 25).tolist() == list(range(25))
    assert TokenStream.open(str(tmp_path), "val", VOCAB).read(0, 20).tolist() == list(range(100, 120))
    assert stream.windows(np.array([2, 0]), 4).tolist() == [[8, 9, 10, 11, 12], [0, 1, 2, 3, 4]]


def test_a_published_shard_is_read_byte_for_byte(tmp_path):
    content = bytearray(1024)
    content[:12] = (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    content += b"".join(token.to_bytes(2, "little") for token in (50256, 0, 258))
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(content)
    assert TokenStream.open(tmp_path, "train", VOCAB).read(0, 3).tolist() == [50256, 0, 258]
    shards.write_shard(tmp_path / "again.bin", np.array([50256, 0, 258], dtype=np.uint16))
    assert (tmp_path / "again.bin").read_bytes() == content
    assert shards.tokenizer_name(tmp_path) == "gpt2"


def header(magic=shards.MAGIC, version=shards.VERSION, count=4) -> bytes:
    ints = np.zeros(256, dtype="<i4")
    ints[:3] = magic, version, count
    return ints.tobytes()


BAD_BINS = [
    pytest.param(b"", "the header must be 1024 bytes, got 0", id="nothing"),
    pytest.param(header()[:100], "the header must be 1024 bytes, got 100", id="half a header"),
    pytest.param(header(magic=1) + bytes(8), "the magic number must be 20240520, got 1", id="foreign magic"),
    pytest.param(b"import os\n" * 200, "the magic number must be 20240520, got 1869639017", id="a text"),
    pytest.param(
        header(magic=20240801, version=7) + bytes(16),
        "got llm.c's tokens of Llama 3 (magic number 20240801",
        id="Llama 3",
    ),
    pytest.param(header(version=2) + bytes(8), "the version must be 1, got 2", id="another version"),
    pytest.param(header() + bytes(6), "4 tokens take 1032 bytes, got 1030", id="cut short"),
    pytest.param(header() + bytes(10), "4 tokens take 1032 bytes, got 1034", id="too long"),
    pytest.param(header(count=-1) + bytes(8), "-1 tokens take 1022 bytes, got 1032", id="a negative count"),
    pytest.param(header(count=0), "a shard must hold at least one token, got none", id="no tokens"),
    pytest.param(
        header() + b"\x51\xc4" * 4, "below the vocabulary size 50257, got 50257", id="a token over the vocabulary"
    ),
]


@pytest.mark.parametrize(("content", "sentence"), BAD_BINS)
def test_a_bad_shard_is_named_with_found_and_expected(tmp_path, content, sentence):
    write(tmp_path, "x_train_000000.bin", range(9))
    bad = tmp_path / "x_train_000001.bin"
    bad.write_bytes(content)
    with pytest.raises(BadInput) as raised:
        TokenStream.open(tmp_path, "train", VOCAB)
    assert str(raised.value).startswith(f"{bad}: ")
    assert sentence in str(raised.value)


BAD_ARRAYS = [
    pytest.param(np.arange(9, dtype=np.int64), r"tokens must be \(n,\) uint16, got \(9,\) <i8", id="int64"),
    *(
        pytest.param(np.arange(9, dtype=kind), rf"got \(9,\) <{kind}; if they are .*ravel\(\).astype\('<u2'\)", id=kind)
        for kind in ("i4", "u4")
    ),
    pytest.param(np.arange(9, dtype=">u2"), r"must be \(n,\) uint16, got \(9,\) >u2", id="big-endian"),
    pytest.param(np.zeros((3, 3), np.uint16), r"must be \(n,\) uint16, got \(3, 3\) uint16", id="two axes"),
    pytest.param(np.zeros((), np.uint16), r"must be \(n,\) uint16, got \(\) uint16", id="no axis"),
    pytest.param(np.zeros(0, np.uint16), "at least one token, got none", id="empty"),
    pytest.param(np.full(9, 50257, np.uint16), "below the vocabulary size 50257, got 50257", id="over the vocabulary"),
]


@pytest.mark.parametrize(("array", "sentence"), BAD_ARRAYS)
def test_a_bad_npy_shard_is_named_with_found_and_expected(tmp_path, array, sentence):
    np.save(tmp_path / "x_train_000000.npy", array)
    with pytest.raises(BadInput, match=f"x_train_000000.npy: .*{sentence}"):
        TokenStream.open(tmp_path, "train", VOCAB)


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("clothes", ["a bare pickle", "an array of objects", "a zip archive"])
def test_a_pickle_in_npy_clothes_is_refused_and_not_run(tmp_path, clothes):
    path, mark = tmp_path / "x_train_000000.npy", tmp_path / "it ran"
    with path.open("wb") as file:
        if clothes == "a bare pickle":
            pickle.dump(Bomb(mark), file)
        elif clothes == "an array of objects":
            np.save(file, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
        else:
            np.savez(file, np.array([Bomb(mark)], dtype=object))
    with pytest.raises(BadInput, match=r"x_train_000000.npy: "):
        TokenStream.open(tmp_path, "train", VOCAB)
    assert not mark.exists()


def test_any_bit_of_an_npy_header_that_flips_is_a_sentence_or_changes_nothing(tmp_path):
    path, refused = write(tmp_path, "x_train_000000.npy", range(1000)), 0
    whole = path.read_bytes()
    for bit in range(8 * 128):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert shards.open_shard(path).tolist() == list(range(1000)), bit
        except BadInput:
            refused += 1
    assert refused > 900


HEADERS = [f"({2**62},)", "(-1,)", "(True,)", "(2**9,)", "(1e3,)", "1000", "[1000]", "(1000, 1)", "()", "('1',)", "("]


@pytest.mark.parametrize("shape", [*HEADERS, "(" * 900, "(999,)", "(1001,)"])
def test_an_npy_header_of_another_shape_is_refused(tmp_path, shape):
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path = tmp_path / "x_train_000000.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(2000))
    with pytest.raises(BadInput, match=r"x_train_000000.npy: (must be|tokens must|\d+ tokens take)"):
        shards.open_shard(path)


def test_an_npy_shard_is_mapped_and_not_read(tmp_path):
    path = write(tmp_path, "x_train_000000.npy", range(50))
    for version in (1, 2, 3):
        with path.open("wb") as file:
            np.lib.format.write_array(file, np.arange(50, dtype=np.uint16), version=(version, 0))
        tokens = shards.open_shard(path)
        assert isinstance(tokens, np.memmap)
        assert tokens.tolist() == list(range(50))


@pytest.mark.parametrize("cut", [0, 5, 100, 140])
def test_a_truncated_npy_is_refused(tmp_path, cut):
    path = write(tmp_path, "x_train_000000.npy", range(50))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadInput, match=r"npy: (must be a readable token shard, |50 tokens take 228 bytes, got 140)"):
        TokenStream.open(tmp_path, "train", VOCAB)


def test_a_bad_token_deep_inside_a_large_shard_is_found_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHECKED_TOKENS", 100)
    tokens = np.zeros(5000, dtype=np.uint16)
    tokens[99], tokens[4321] = 256, 257
    path = write(tmp_path, "x_train_000000.bin", tokens)
    stream = TokenStream.open(tmp_path, "train", 257)
    assert stream.read(0, 4321).max() == 256
    with pytest.raises(BadInput, match=f"{path.name}: every token must be below the vocabulary size 257, got 257"):
        stream.read(4320, 8)
    part = Batches(stream, context=10, tokens_per_step=4990, micro_batch_size=499)
    with pytest.raises(BadInput, match=path.name):
        part.at(0)
    part.close()
    tokens[99] = 257
    write(tmp_path, "x_train_000000.bin", tokens)
    with pytest.raises(BadInput, match=path.name):  # in the part that is scanned on opening
        TokenStream.open(tmp_path, "train", 257)


def test_a_missing_directory_says_how_to_make_one(tmp_path):
    with pytest.raises(
        BadInput,
        match=r"must be a directory of token shards, got .*nowhere, which does not exist; make one with gpt2 prepare",
    ):
        TokenStream.open(tmp_path / "nowhere", "train", VOCAB)


def test_a_directory_without_the_split_says_which_names_it_looked_for(tmp_path):
    write(tmp_path, "x_train_000000.bin", range(9))
    with pytest.raises(BadInput, match=r"must hold shards named <name>_val_<number>.bin or .npy, got none"):
        TokenStream.open(tmp_path, "val", VOCAB)


def test_a_stopped_preparation_is_not_taken_for_data(tmp_path):
    write(tmp_path, "x_train_000000.bin", range(9))
    (tmp_path / shards.BUILDING).mkdir()
    with pytest.raises(BadInput, match="got one that was stopped; run gpt2 prepare again"):
        TokenStream.open(tmp_path, "train", VOCAB)


def manifest(directory: Path, **changes) -> None:
    listed = [{"file": f"x_{split}_000000.bin", "split": split, "sha256": "0"} for split in ("train", "val")]
    (directory / shards.MANIFEST).write_text(json.dumps({"tokenizer": "bytes", "shards": listed} | changes))


def test_a_shard_that_the_manifest_lists_must_be_there(tmp_path):
    write(tmp_path, "x_train_000000.bin", range(9))
    manifest(tmp_path)
    assert len(TokenStream.open(tmp_path, "train", VOCAB)) == 9
    with pytest.raises(BadInput, match=r"every shard of manifest.json must be there, missing x_val_000000.bin"):
        TokenStream.open(tmp_path, "val", VOCAB)


def test_only_what_the_manifest_lists_is_read(tmp_path):
    write(tmp_path, "x_train_000000.bin", range(9))
    write(tmp_path, "y_train_000000.bin", range(9))
    manifest(tmp_path)
    assert len(TokenStream.open(tmp_path, "train", VOCAB)) == 9
    assert shards.tokenizer_name(tmp_path) == "bytes"


def test_another_shard_of_the_same_name_is_refused_by_its_count(tmp_path):
    path = write(tmp_path, "x_train_000000.bin", range(9))
    listed = {"file": path.name, "split": "train", "sha256": "0", "tokens": 9}
    manifest(tmp_path, shards=[listed])
    assert len(TokenStream.open(tmp_path, "train", VOCAB)) == 9
    write(tmp_path, path.name, range(8))
    with pytest.raises(BadInput, match=r"x_train_000000.bin: must have the 9 tokens of manifest.json, got 8; it is an"):
        TokenStream.open(tmp_path, "train", VOCAB)


WRONG_TYPES = [b'{"tokenizer": 7, "shards": []}']
WRONG_TYPES += [b'{"tokenizer": "bytes", "shards": [{"file": null, "split": "train", "sha256": "0"}]}']
WRONG_TYPES += [b'{"tokenizer": "bytes", "shards": [{"file": "x_train_000000.bin", "split": "train", "sha256": 0}]}']


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[]", b"{}", b'{"shards": [{}]}', *WRONG_TYPES], ids=lambda c: repr(c[:60])
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    write(tmp_path, "x_train_000000.bin", range(9))
    (tmp_path / shards.MANIFEST).write_bytes(content)
    with pytest.raises(BadInput, match=r"manifest.json: .*; prepare the data again"):
        TokenStream.open(tmp_path, "train", VOCAB)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "x_train_000000.bin", range(9))
    (tmp_path / shards.MANIFEST).mkdir()
    with pytest.raises(BadInput, match=r"manifest.json: must be a manifest of shards, got a directory"):
        TokenStream.open(tmp_path, "train", VOCAB)


def test_more_shards_than_open_files_are_allowed_are_read(tmp_path):
    for number in range(40):
        write(tmp_path, f"x_train_{number:06d}.bin", range(number, number + 9))
    now = max(map(int, os.listdir("/dev/fd")))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + 20, before[1]))
    try:
        stream = TokenStream.open(tmp_path, "train", VOCAB)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert stream.read(9 * 39, 9).tolist() == list(range(39, 48))


def test_the_digest_names_the_data(tmp_path):
    write(tmp_path, "x_train_000000.bin", range(9))
    stream = TokenStream.open(tmp_path, "train", VOCAB)
    bare = shards.digest([stream], tmp_path)
    manifest(tmp_path)
    listed = shards.digest([stream], tmp_path)
    manifest(tmp_path, shards=[{"file": "x_train_000000.bin", "split": "train", "sha256": "1"}])
    assert len({bare, listed, shards.digest([stream], tmp_path)}) == 3
