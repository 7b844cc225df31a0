"""Both tokenizers: decoding restores any text, the end-of-text id stays reserved, no network is used."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadInput
from engine.tokens import tokenizer

BOTH = ["gpt2", "bytes"]
LITERAL = "<|endoftext|>"
TEXT = st.text(max_size=200) | st.lists(
    st.sampled_from([LITERAL, " ", "\n", "\t ", "don't", "é", "漢", "🙂", "\x00", "\ufeff", "7"])
).map("".join)
WITH_SURROGATES = st.text(st.sampled_from("a \ud800\udbff\udc00\udfff\ufeff🙂"), max_size=20)


@pytest.fixture(scope="module", params=BOTH)
def chosen(request) -> tokenizer.Tokenizer:
    return tokenizer.load(request.param)


@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_decoding_gives_the_text_back(chosen, text):
    ids = chosen.encode(text)
    assert ids.dtype == np.uint16
    assert ids.ndim == 1
    assert chosen.decode(ids) == text
    assert chosen.decode_bytes(ids) == text.encode()


@settings(deadline=None, max_examples=100)
@given(before=TEXT, after=TEXT)
def test_a_literal_end_of_text_never_becomes_its_id(chosen, before, after):
    ids = chosen.encode(before + LITERAL + after)
    assert chosen.end_of_text not in ids
    assert len(ids) == 0 or ids.max() < chosen.end_of_text
    assert chosen.decode(ids) == before + LITERAL + after


@settings(deadline=None, max_examples=200)
@given(text=WITH_SURROGATES)
def test_lone_surrogates_become_replacement_characters(chosen, text):
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert chosen.decode(chosen.encode(text)) == whole


def test_a_lone_surrogate_is_one_replacement_character(chosen):
    assert chosen.decode(chosen.encode("a\ud800b")) == "a\ufffdb"


def test_the_end_of_text_id_is_decoded_as_its_name(chosen):
    assert chosen.decode([chosen.end_of_text]) == LITERAL
    assert chosen.end_of_text == chosen.vocab_size - 1


def test_empty_text_is_no_tokens(chosen):
    assert chosen.encode("").shape == (0,)
    assert chosen.decode([]) == ""


def test_half_a_character_is_decoded_as_a_replacement(chosen):
    assert chosen.decode(chosen.encode("漢")[:1]) == "\ufffd"


@pytest.mark.parametrize("text", [" ", "\n", "x", "^", "é", "word "], ids=repr)
def test_a_megabyte_on_one_line_is_encoded(chosen, text):
    line = text * (1_200_000 // len(text)) + "x"  # the regex engine overflows at 1,000,000 characters of white space
    assert chosen.decode(chosen.encode(line)) == line


def test_cutting_long_white_space_changes_no_token(monkeypatch):
    gpt2 = tokenizer.load("gpt2")
    monkeypatch.setattr(tokenizer, "LONG", 3)
    monkeypatch.setattr(
        tokenizer, "LONG_SPACE", tokenizer.re.compile(tokenizer.LONG_SPACE.pattern.replace("100000", "3"))
    )
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(rng.choice(list(" \n\t\r\x1c\x1f\xa0\u3000\x85\u200bab1!'s"), size=rng.integers(20)))
        assert gpt2.encode(text).tolist() == gpt2._encoding.encode_ordinary(text), repr(text)


def test_gpt2_ids_are_the_released_ones():
    gpt2 = tokenizer.load("gpt2")
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def test_byte_ids_are_the_bytes():
    assert tokenizer.load("bytes").encode("aé").tolist() == [97, 0xC3, 0xA9]


OFFLINE = """
import socket
def refuse(*_, **__):
    raise AssertionError("the tokenizer opened a socket")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from engine.tokens import tokenizer
print(tokenizer.load("gpt2").encode("Hello, I'm a language model,").tolist())
"""


def test_works_with_no_network_and_an_empty_cache(tmp_path):
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[15496, 11, 314, 1101, 257, 3303, 2746, 11]"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_vocabulary_is_refused(tmp_path, monkeypatch):
    content = bytearray(tokenizer.VOCABULARY.read_bytes())
    content[1000] ^= 1
    damaged = tmp_path / "r50k_base.tiktoken"
    damaged.write_bytes(content)
    monkeypatch.setattr(tokenizer, "VOCABULARY", damaged)
    tokenizer.gpt2_ranks.cache_clear()
    try:
        with pytest.raises(BadInput, match=r"r50k_base.tiktoken must have sha256 306cd27f03c1..., got .*; install"):
            tokenizer.load("gpt2")
    finally:
        tokenizer.gpt2_ranks.cache_clear()


def test_an_unknown_name_is_a_sentence_with_the_nearest():
    with pytest.raises(BadInput, match=r"""got 'byte'; did you mean "bytes"\?"""):
        tokenizer.load("byte")


def test_the_lengths_of_tokens_are_those_of_their_bytes(chosen):
    lengths = chosen.byte_lengths()
    assert lengths.shape == (chosen.end_of_text,)
    for token in range(0, chosen.end_of_text, 97):
        assert lengths[token] == len(chosen.decode_bytes([token]))


@pytest.mark.parametrize("before", [0, 1, 57, 99, 150])
def test_a_long_run_is_found_wherever_it_begins(before):
    text = "x" * before + " " * tokenizer.LONG + "y"
    assert tokenizer.LONG_SPACE.search(text)
    assert tokenizer.LONG_SAMPLE.search(text[:: tokenizer.STRIDE])


@pytest.mark.parametrize("text", ["", "a <|endoftext|> b", "Übung \ud800 macht", "x\0y", "日本語 's " * 99])
def test_ids_are_those_of_encode_ordinary(text):
    gpt2 = tokenizer.load("gpt2")
    expected = gpt2._encoding.encode_ordinary(text)
    assert gpt2._to_numpy is not None
    assert gpt2.encode(text).tolist() == expected
    gpt2._to_numpy = None  # as with an older tiktoken
    assert gpt2.encode(text).tolist() == expected
    assert gpt2.encode(text).dtype == np.uint16
