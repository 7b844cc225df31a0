"""Exported tokenizers, opened by transformers without a network: the same ids and vocabulary."""

import hashlib
import json
import random
import socket

import pytest
import transformers

from engine.errors import BadInput
from engine.run.export import byte_characters, save_tokenizer
from engine.tokens import tokenizer as tokenizers

TEXTS = [
    pytest.param("", id="empty"),
    pytest.param("Hello, I'm a language model,", id="sentence"),
    pytest.param("I'll he'd WE'RE can't they've it's 'twas o'clock 'S 'LL''s", id="contractions"),
    pytest.param(" leading  two   three    four \t tab\t\ttabs trailing   ", id="whitespace-runs"),
    pytest.param("a\n\nb\r\n\r\n  c\n \n\u00a0\u2003\u3000d\v\f\x85e\u2028", id="line-ends-and-unicode-spaces"),
    pytest.param("naïve café Ångström Ærø \u2013 „quotes“ … ¿qué? ½ ² Ⅷ ①", id="latin-and-numbers"),
    pytest.param("e\u0301 o\u0308 \u1112\u1161\u11ab क्षि ไทย עברית العربية 日本語 中文 한국어", id="scripts"),
    pytest.param("🙂👩‍👩‍👧‍👦🇳🇱👍🏽 ☃️ \U0001d54f 𓀀 \U0010ffff", id="emoji-and-astral"),
    pytest.param("def f(x: int) -> str:\n    return f'{x!r}'  # 1_000.5e-3 == 0x7f\n\t}\n", id="code"),
    pytest.param("\x00\x01\x1f\x7f\x80\xad\ufeff\ufffd\u200b\u200d", id="control-and-invisible"),
    pytest.param("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + "=" * 70 + "0123456789" * 7, id="repeats"),
]


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def both(request, tmp_path_factory):
    """(our tokenizer, the one that transformers opens, the directory)."""
    directory = tmp_path_factory.mktemp(request.param)
    ours = tokenizers.load(request.param)
    save_tokenizer(ours, directory, model_max_length=96)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args, **kwargs):
            raise OSError("the network is not reachable")

        patch.setattr(socket, "socket", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return ours, theirs, directory


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_ours(both, text):
    ours, theirs, _ = both
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


def test_ids_of_random_unicode_are_ours(both):
    ours, theirs, _ = both
    draw = random.Random(0)
    points = [*range(0x180), *range(0x2000, 0x2070), 0x4E2D, 0x1F642, 0x1F3FD, 0x301, 0xFE0F, *map(ord, "   \n'st")]
    for _ in range(300):
        text = "".join(map(chr, draw.choices(points, k=40)))
        assert theirs(text)["input_ids"] == ours.encode(text).tolist(), repr(text)


def test_the_vocabulary_is_ours(both):
    ours, theirs, _ = both
    assert len(theirs) == ours.vocab_size
    byte_of = {character: bytes([byte]) for byte, character in enumerate(byte_characters())}
    for token, i in theirs.get_vocab().items():
        if i != ours.end_of_text:
            assert b"".join(byte_of[character] for character in token) == ours.decode_bytes([i])


def test_end_of_text_and_length_are_known(both):
    ours, theirs, _ = both
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.unk_token_id == ours.end_of_text
    assert theirs("a<|endoftext|>")["input_ids"][-1] == ours.end_of_text
    assert theirs.model_max_length == 96


def test_it_opens_beside_a_model(both, tmp_path):
    from model.gpt2 import GPT2, GPT2Config

    ours, _, _ = both
    GPT2(GPT2Config(1, 1, 8, n_positions=96, vocab_size=ours.vocab_size)).save_pretrained(tmp_path)
    save_tokenizer(ours, tmp_path, model_max_length=96)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("it's  é")["input_ids"] == ours.encode("it's  é").tolist()


@pytest.mark.parametrize("both", ["gpt2"], indirect=True)
def test_gpt2s_known_sentence_has_its_known_ids(both):
    _, theirs, _ = both
    assert theirs("Hello, I'm a language model,")["input_ids"] == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


@pytest.mark.parametrize("both", ["gpt2"], indirect=True)
def test_gpt2s_files_are_the_released_ones_byte_for_byte(both):
    """Digests: the sha256 that tiktoken expects of OpenAI's vocab.bpe and encoder.json."""
    _, _, directory = both
    released = {
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }
    assert {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in released} == released


@pytest.mark.parametrize("both", ["bytes"], indirect=True)
def test_bytes_has_256_bytes_an_end_and_no_merges(both):
    _, _, directory = both
    vocabulary = json.loads((directory / "vocab.json").read_text())
    assert vocabulary["A"] == 65
    assert vocabulary["Ġ"] == 32
    assert vocabulary["<|endoftext|>"] == 256
    assert sorted(vocabulary.values()) == list(range(257))
    assert (directory / "merges.txt").read_text() == "#version: 0.2\n"


def test_the_directory_holds_the_four_files_only(both):
    _, _, directory = both
    names = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in directory.iterdir()) == names


def test_saving_where_a_file_is_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="must be a directory that can be written"):
        save_tokenizer(tokenizers.load("bytes"), tmp_path / "file", model_max_length=8)
