"""gigatoken: the same ids as tiktoken, and what happens where they differ, which a fake one shows."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from corpora import config, files, set_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokens import prepare, tokenizer
from engine.tokens.preparation import encode, estimate, fast, summary

installed = pytest.mark.skipif(not importlib.util.find_spec("gigatoken"), reason="gigatoken is not installed")
WORDS = [
    " ",
    "\n",
    "\r\n",
    "\t ",
    "  ",
    "don't",
    "'LL",
    "'s",
    "É",
    "漢字",
    "🙂",
    "\x00",
    "\ufeff",
    "\u3000",
    "\xa0",
    "7½",
]
TEXT = st.text(st.characters(exclude_categories=()), max_size=100) | st.lists(
    st.sampled_from([*WORDS, tokenizer.END_OF_TEXT, "\ud800", "\x1c", "\u0301", "ﬁ", "\u200b", "aaaaaaaa", "!?"]),
    max_size=30,
).map("".join)


class Fake:
    """tiktoken under gigatoken's interface, wrong where a text has the word WRONG."""

    def __init__(self, error: BaseException | None = None):
        self.error = error

    def encode(self, content: bytes) -> np.ndarray:
        ids = tokenizer_of_gpt2().encode(content.decode()).astype(np.uint32)
        if b"WRONG" in content:
            if self.error is not None:
                raise self.error
            ids = ids[::-1].copy()
        return ids


def tokenizer_of_gpt2(cache=[]) -> tokenizer.Tokenizer:  # noqa: B006  (one for all tests)
    if not cache:
        cache.append(tokenizer.load("gpt2"))
    return cache[0]


@pytest.fixture
def faked(monkeypatch):
    """Returns what puts a gigatoken of our own in place."""

    def use(load) -> None:
        monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(fast, "_load", load)
        encode.encoder.cache_clear()

    yield use
    encode.encoder.cache_clear()


@pytest.fixture(scope="module")
def real() -> fast.Fast:
    return fast.Fast(tokenizer_of_gpt2())


@pytest.fixture
def source(tmp_path) -> Path:
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(20):
        (root / f"{i:02d}.txt").write_text(f"Text number {i}, " + "of some words " * i)
    return root


def run(source: Path, out: Path, **changes) -> dict:
    return prepare.prepare([str(source)], config(out, tokenizer="gpt2", **changes))


def shards(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in files(out).items() if name != "manifest.json"}


@installed
@settings(deadline=None, max_examples=100)
@given(texts=st.lists(TEXT, max_size=5))
def test_gigatoken_gives_the_ids_of_tiktoken(real, texts):
    for ids, text in zip(real.encode_batch(texts), texts, strict=True):
        assert ids.dtype == np.uint16
        assert np.array_equal(ids, tokenizer_of_gpt2().encode(text))


@installed
def test_gigatoken_gives_the_ids_of_tiktoken_on_real_text_and_starts_no_thread(real):
    library = Path(sysconfig.get_path("stdlib"))
    paths = [
        *sorted(library.glob("*.py"))[:50],
        *sorted(library.glob("test/test_unicode*.py")),
        library / "LICENSE.txt",
    ]
    texts = [path.read_text("utf-8") for path in paths if path.exists()]
    assert sum(map(len, texts)) > 1_000_000
    threads = len(os.listdir("/proc/self/task"))
    for ids, text in zip(real.encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, tokenizer_of_gpt2().encode(text))
    assert len(os.listdir("/proc/self/task")) == threads


@installed
@pytest.mark.parametrize(
    "text", ["a" + "\t" * 1_000_000 + "b", "x" * 200_000], ids=["a long run of tabs", "one long word"]
)
def test_a_long_run_is_no_danger_to_gigatoken(real, text):
    assert np.array_equal(real.encode_batch([text])[0], tokenizer_of_gpt2().encode(text))


GROWTH = """
import random, string, sys
from engine.tokens import tokenizer
from engine.tokens.preparation import fast

fast.MOST_GROWTH = int(sys.argv[1])
encoder, rng, most = fast.Fast(tokenizer.load("gpt2")), random.Random(0), 0
begin = fast._process_bytes()
for _ in range(20):  # words that it has not seen
    encoder.encode_batch([" ".join("".join(rng.choices(string.ascii_letters, k=9)) for _ in range(60_000))])
    most = max(most, fast._process_bytes() - begin)
print(most)
"""


@installed
@pytest.mark.slow
def test_the_memory_of_gigatoken_is_bounded():
    def growth(most: int) -> int:  # in a process of its own, whose memory nothing else takes
        command = [sys.executable, "-c", GROWTH, str(most)]
        return int(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)

    assert growth(24 << 20) < 80 << 20 < growth(1 << 40)


@pytest.mark.parametrize(
    "sizes", [[0, 1, 200, 201, 300], [None] * 5], ids=["by the process's size", "by bytes of text"]
)
def test_the_encoder_is_built_again_when_it_has_grown(faked, monkeypatch, sizes):
    built = []
    faked(lambda: built.append(1) or Fake())
    monkeypatch.setattr(fast, "_process_bytes", iter(sizes).__next__)
    monkeypatch.setattr(fast, "MOST_GROWTH", 100)
    monkeypatch.setattr(fast, "MOST_BYTES", 12)
    encoder = fast.Fast(tokenizer_of_gpt2())
    for _ in range(2):  # 1, then 200: too large; 201 is the size after
        encoder.encode_batch(["ten letters"[:10]])
    assert len(built) == 2
    encoder.encode_batch(["ten letters"[:10]])
    assert len(built) == 2


def test_gigatoken_and_tiktoken_make_the_same_shards(faked, source, tmp_path):
    plain = run(source, tmp_path / "plain" / "out", fast=False)
    faked(Fake)
    right = run(source, tmp_path / "right" / "out")
    assert "not_fast" not in right
    assert right["encoder"].startswith("gigatoken")
    assert plain["encoder"].startswith("tiktoken ")
    assert shards(tmp_path / "plain" / "out") == shards(tmp_path / "right" / "out")


def test_one_wrong_document_makes_all_tokens_tiktoken_s(faked, source, tmp_path, capsys, monkeypatch):
    (source / "13.txt").write_text("a WRONG document")
    plain = run(source, tmp_path / "plain" / "out", fast=False)
    faked(Fake)
    set_batch(monkeypatch, 1)  # a document a batch, so that each is compared
    capsys.readouterr()
    wrong = run(source, tmp_path / "wrong" / "out", workers=2)
    assert wrong["encoder"] == plain["encoder"]
    assert wrong["not_fast"] == f"gigatoken gave other tokens than tiktoken in {source / '13.txt'}"
    assert shards(tmp_path / "plain" / "out") == shards(tmp_path / "wrong" / "out")
    said = capsys.readouterr().err
    assert said.count(wrong["not_fast"]) == 1
    assert "tokenised again, with tiktoken" in said
    assert "13.txt, so tiktoken made all tokens" in summary.describe(wrong, "out")


class Panic(BaseException):
    """Like the exception of a Rust panic."""


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (lambda: Fake(Panic("index out of bounds")), "gigatoken failed (Panic('index out of bounds')) in "),
        (lambda: 1 / 0, "gigatoken cannot be loaded (ZeroDivisionError"),
    ],
    ids=["a panic", "not loaded"],
)
def test_a_gigatoken_that_fails_is_said_and_not_used(faked, source, tmp_path, capsys, load, words):
    (source / "13.txt").write_text("WRONG")
    faked(load)
    manifest = run(source, tmp_path / "out")
    assert manifest["encoder"].startswith("tiktoken ")
    assert words in capsys.readouterr().err


def test_whether_gigatoken_runs_does_not_change_the_request(faked, source, tmp_path):
    made = run(source, tmp_path / "out", fast=False)
    faked(Fake)
    assert run(source, tmp_path / "out") == made


def test_without_gigatoken_tiktoken_runs_without_a_word(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: None)
    assert run(source, tmp_path / "out")["encoder"].startswith("tiktoken ")
    assert capsys.readouterr().err == ""
    assert " by tiktoken " in summary.describe(run(source, tmp_path / "out"), "out").splitlines()[0]


LONG = 3 * fast.SAMPLE
LONGS = {
    "words": "ab cd's\n\n  e  \tf, 12 " * (LONG // 8),
    "one word": "abc" * LONG,
    "characters of three bytes": "漢字 " * LONG,
    "spaces": " " * LONG + "\n" * LONG,
    "a run in words": "some words " * LONG + " " * LONG + "and more " * LONG,
}


@pytest.mark.parametrize("text", LONGS.values(), ids=LONGS)
def test_what_is_equal_is_never_called_different(faked, text):
    faked(Fake)
    encoder = fast.Fast(tokenizer_of_gpt2())
    ids = tokenizer_of_gpt2().encode(text)
    content = text.encode()
    for place in [*range(0, len(content), len(content) // 20), len(content) - 1]:
        assert encoder._agrees(content, ids, place)


def test_a_difference_of_one_token_at_the_place_is_seen(faked):
    faked(Fake)
    encoder, text = fast.Fast(tokenizer_of_gpt2()), LONGS["words"]
    content, ids = text.encode(), tokenizer_of_gpt2().encode(text)
    ends = np.cumsum(encoder._lengths[ids])
    for token in range(0, len(ids), len(ids) // 20):
        other = ids.copy()
        other[token] = next(i for i in range(256) if encoder._lengths[i] == 1 and i != ids[token])
        assert not encoder._agrees(content, other, max(int(ends[token]) - 100, 0))
    assert not encoder._agrees(content, np.append(ids, ids[:1]), len(content) - 1)  # one too many
    assert not encoder._agrees(content, ids[:-1], len(content) - 1)  # one too few
    assert not encoder._agrees(content, ids[:0], 5)


def test_every_part_of_a_batch_is_a_place_to_compare(faked, monkeypatch):
    faked(Fake)
    encoder, seen = fast.Fast(tokenizer_of_gpt2()), set()
    monkeypatch.setattr(encoder, "_agrees", lambda content, ids, place: seen.add((content, place)) or True)
    monkeypatch.setattr(fast, "SAMPLE", 1)
    for words in range(200):
        encoder.encode_batch(["a", "b" + " c" * words, "d"])
    assert {content[:1] for content, _ in seen} == {b"a", b"b", b"d"}
    assert all(0 <= place < len(content) for content, place in seen)


def test_short_documents_are_compared_until_they_are_a_sample(faked, monkeypatch):
    faked(Fake)
    encoder, texts = fast.Fast(tokenizer_of_gpt2()), [f"some words of text {i}" for i in range(150)]
    for number in (0, 75, 149):  # all of them are less than SAMPLE bytes
        with pytest.raises(fast.Unusable, match="other tokens than tiktoken") as error:
            encoder.encode_batch([*texts[:number], "a WRONG text", *texts[number:]])
        assert error.value.document == number
    compared = []
    monkeypatch.setattr(encoder, "_agrees", lambda content, ids, place: compared.append(len(content)) or True)
    encoder.encode_batch([*texts, ""] * 10)
    assert fast.SAMPLE <= sum(compared) < fast.SAMPLE + 25


@pytest.mark.parametrize(
    ("strange", "words"),
    [
        (50256, "a token that no text has"),
        (50257, "a token that no text has"),
        (65535, "a token that no text has"),
        (65536 + 32, "a token that no text has"),
        (tokenizer.gpt2_ranks()[b" the"], "tokens of more or fewer bytes than the text"),
    ],
)
def test_every_document_is_checked_for_strange_tokens_and_its_number_of_bytes(faked, monkeypatch, strange, words):
    class Strange(Fake):
        def encode(self, content: bytes) -> np.ndarray:
            ids = super().encode(content)
            return np.array([strange], np.uint32) if b"x" in content else ids

    faked(Strange)
    encoder = fast.Fast(tokenizer_of_gpt2())
    monkeypatch.setattr(encoder, "_compare", lambda *_: None)  # as if the sample lay elsewhere
    assert len(encoder.encode_batch(["", "a", ""])) == 3
    with pytest.raises(fast.Unusable, match=words) as error:
        encoder.encode_batch(["", "a", "", "x", "", "x"])
    assert error.value.document == 3


def test_an_estimate_measures_what_the_preparation_would_take(faked, source, tmp_path):
    def estimated(path: Path = source, **changes) -> tuple[str, str]:
        lines = estimate.estimate([str(path)], config(tmp_path / "out", tokenizer="gpt2", **changes)).splitlines()
        number, by = next(line for line in lines if line.startswith("  tokens")).removeprefix("  tokens").split(",")
        return number, by.removeprefix(" tokenizer gpt2 by ").split()[0]

    plain = estimated(fast=False)
    assert plain[1] == "tiktoken"
    faked(Fake)
    assert estimated() == (plain[0], "gigatoken")
    assert estimated(fast=False) == plain
    faked(lambda: 1 / 0)
    assert estimated() == plain
    (source / "13.txt").write_text("a WRONG text")
    faked(Fake)
    assert estimated(source / "13.txt")[1] == "tiktoken"
