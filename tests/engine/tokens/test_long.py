"""Long texts: cut into parts, they give the same tokens, split and counts as in one piece."""

import codecs
import hashlib
import io
import re
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from corpora import documents, run
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tasks import text as task
from engine.tokens import tokenizer
from engine.tokens.reading import cuts
from engine.tokens.reading.cuts import Scan
from engine.tokens.reading.documents import parse, parts, read
from engine.tokens.reading.parts import NotText, Raw, ReadOptions
from engine.tokens.reading.streams import documents_of_stream

NASTY = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\v",
        "\u0085",
        "\u00a0",
        "\u1680",
        "\u2003",
        "\u2028",
        "\u202f",
        "\u205f",
    ),
    *(
        "\u3000",
        "\x1c",
        "\0",
        "'",
        "'s",
        "'ll",
        "'",
        "word",
        "It's",
        "12",
        "½",
        "٣",
        "...",
        "_",
        "é",
        "e\u0301",
        "漢字",
        "ไทย",
    ),
    *("🙂", "👩\u200d🚀", "\u200b", "\ufeff", "\ufffd", "<|endoftext|>", "\u017f", "Ⅷ"),
)


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.load("gpt2")


@pytest.fixture
def tiny(monkeypatch):
    """Every text of more than 24 bytes is long."""
    monkeypatch.setattr(cuts, "LONG", 24)
    monkeypatch.setattr(cuts, "PART", 8)
    monkeypatch.setattr(cuts, "BLOCK", 5)


def cut(content: bytes, block: int, is_replacing: bool = False) -> tuple[Scan, list[bytes]]:
    """The scan of a text that comes in blocks, and the parts of it."""
    scan = Scan(0, is_replacing)
    for at in range(0, len(content), block):
        scan.update(content[at : at + block])
    scan.finish()
    return scan, [content[begin:end] for begin, end in scan.parts()]


def same(encode, text: str, pieces: list[bytes]) -> bool:
    return np.array_equal(np.concatenate([encode(piece.decode()) for piece in pieces]), encode(text))


# ---- Cuts ---------------------------------------------------------------------------------------------------------


def test_no_neighbours_of_a_cut_change_the_ids(gpt2, monkeypatch):
    text = "".join(f"{a}{b}{c}" for a in NASTY for b in (" ", "\n", "\r\n", "\n\n", " \n") for c in NASTY)
    monkeypatch.setattr(cuts, "PART", 1)  # a cut at every place
    whole, content = gpt2.encode(text), text.encode()
    _, pieces = cut(content, len(content))
    assert len(pieces) > 5000
    assert all(pieces)
    assert same(gpt2.encode, text, pieces)
    assert len(whole) > len(pieces)


def test_a_cut_wanted_at_any_byte_and_found_in_any_blocks_is_the_same(gpt2, monkeypatch):
    text = "Don't  stop\r\n\r\n\u3000漢字\u00a0 x\u2003\n\n 'll be\t\t🙂 1,000 e\u0301\n\0 \ufeff ' s\x1c \n"
    content, found = text.encode(), set()
    for wanted in range(1, len(content) + 1):
        monkeypatch.setattr(cuts, "PART", wanted)
        scans = [cut(content, block) for block in (1, 2, 3, 7, 1000)]
        assert all(scan.cuts == scans[0][0].cuts for scan, _ in scans)
        assert same(gpt2.encode, text, scans[0][1])
        found.update(scans[0][0].cuts)
    spaces = {at for at, one in enumerate(text) if re.fullmatch(tokenizer.SPACES, one)}
    places = {len(text[:at].encode()) for at in spaces if at - 1 not in spaces and text[at].isascii()}
    assert found == places
    assert len(found) == 11


def test_a_place_follows_no_kind_of_white_space(monkeypatch):
    monkeypatch.setattr(cuts, "PART", 1)
    spaces = [one for one in map(chr, range(0x3100)) if re.fullmatch(tokenizer.SPACES, one)]
    assert len(spaces) == 25
    for one in map(chr, range(0x3100)):
        content = f"a{one} b".encode()
        expected = {1} if one in spaces and one.isascii() else set() if one in spaces else {len(content) - 2}
        assert set(cut(content, 2)[0].cuts) == expected, ascii(one)


ANY = st.integers(0, 0x10FFFF).filter(lambda code: not 0xD800 <= code < 0xE000).map(chr)
PIECES = st.lists(st.sampled_from(NASTY) | ANY, max_size=40)


@settings(deadline=None, max_examples=100)
@given(pieces=PIECES, wanted=st.integers(1, 30), block=st.integers(1, 40))
def test_cuts_of_any_text_leave_its_ids(gpt2, pieces, wanted, block):
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PART", wanted)
        _, parts = cut(text.encode(), block)
    assert b"".join(parts) == text.encode()
    assert same(gpt2.encode, text, parts)
    assert same(tokenizer.load("bytes").encode, text, parts)


def test_a_text_without_a_place_is_one_part_and_the_search_goes_on(monkeypatch):
    monkeypatch.setattr(cuts, "PART", 100)
    for character in ("x", " ", "\n", "\u3000", "漢"):
        content = b"a b" + character.encode() * 5000 + b"x y"
        assert cut(content, 64)[0].cuts == [len(content) - 2]
    assert cut(b"x" * 5000, 64)[0].parts() == [(0, 5000)]


# ---- The check of a whole text -----------------------------------------------------------------------------------


BAD = (b"\xff", b"\xe2\x82", b"\xf0\x9f", b"\xed\xa0\x80", b"\xc2", b"\xe2\xc2\xa0", b"\xef\xbb\xbf", b"\xc0\x80")
BYTES = st.lists(st.sampled_from([*BAD, *(one.encode() for one in NASTY)]) | st.binary(max_size=3), max_size=30)


@settings(deadline=None, max_examples=100)
@given(
    mark=st.sampled_from([b"", codecs.BOM_UTF8, 2 * codecs.BOM_UTF8]),
    pieces=BYTES,
    wanted=st.integers(4, 30),
    block=st.integers(1, 40),
    is_replacing=st.booleans(),
)
def test_the_parts_say_of_any_bytes_what_the_whole_says(mark, pieces, wanted, block, is_replacing):
    content = b"".join([mark, *pieces])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PART", wanted)
        scan, parts = cut(content, block, is_replacing)
    if scan.problem is not None:
        with pytest.raises(NotText) as caught:
            parse("file", content, "", is_replacing)
        assert (str(scan.problem), scan.problem.reason) == (str(caught.value), caught.value.reason)
        return
    text, replaced = parse("file", content, "", is_replacing)
    found = [parse("part", part, "", is_replacing) for part in parts]
    assert "".join(part for part, _ in found) == text
    assert sum(count for _, count in found) == replaced
    assert scan.has_nul == ("\0" in text)
    assert scan.digest == hashlib.blake2b(text.encode(), digest_size=8).digest()


# ---- Files --------------------------------------------------------------------------------------------------------

TEXTS = {
    "words": "It's  a text\n\nof words, '12' of\tthem\r\n \u00a0 and more\n" * 9,
    "mark": "\ufeff漢字 漢字\n" * 20,
    "nul": "no 1\0 \0 <|endoftext|> x\n" * 9,
    "spaces": "a" + " " * 100 + "b",
    "blank": " \n\u3000" * 30,
    "short": "short",
}


def write(folder: Path, changes: dict[str, bytes] | None = None) -> Path:
    folder.mkdir()
    for name, content in ({name: text.encode() for name, text in TEXTS.items()} | (changes or {})).items():
        (folder / f"{name}.txt").write_bytes(content)
    return folder


def outcome(source: Path, out: Path, **changes) -> tuple[dict, list[list[int]]]:
    manifest = run(source, out, **{"tokenizer": "gpt2", "val_fraction": 0.4} | changes)
    tokens = [documents(out, split, 50256) for split in ("train", "val")]
    return {name: manifest[name] for name in manifest if name not in ("request", "shards")}, tokens


@pytest.mark.parametrize("on_bad_text", ["skip", "replace"])
def test_a_long_file_makes_the_same_data_as_in_one_piece(tmp_path, monkeypatch, on_bad_text):
    bad = {
        "bad_one": b"one bad \xff in many, many more characters\n" * 3,
        "bad_many": b"\xff\xfe\xfd \xff\xff\n" * 9,
        "cut": b"cut off within a character, at its very end: \xe2\x82",
        "foreign": b"\x89PNG" + b"picture " * 9,
    }
    source = write(tmp_path / "in", bad)
    before = outcome(source, tmp_path / "a" / "out", on_bad_text=on_bad_text)
    for name, value in (("LONG", 24), ("PART", 8), ("BLOCK", 5)):
        monkeypatch.setattr(cuts, name, value)
    assert len(list(parts(source / "words.txt", ReadOptions()))) > 10
    assert outcome(source, tmp_path / "b" / "out", on_bad_text=on_bad_text) == before
    assert before[0]["with_nul"] == 1
    assert before[0]["markers"] == 9


def test_positions_go_on_in_the_middle_of_a_file(tmp_path, tiny):
    for name, separator in (("words", None), ("words", "\n"), ("words", " "), ("spaces", None), ("short", None)):
        path, options = write(tmp_path / f"{name}_{separator!r}") / f"{name}.txt", ReadOptions(split_on=separator)
        found = list(parts(path, options))
        assert sum(part.num_bytes for part, _ in found) == found[-1][1] == path.stat().st_size
        for index, (_, position) in enumerate(found):
            assert list(parts(path, options, position)) == found[index + 1 :]


def test_the_loss_of_a_long_file_is_that_of_one_document(tmp_path, tiny, gpt2):
    (path := tmp_path / "x.txt").write_text(TEXTS["words"])
    assert task.load(str(path), gpt2).tolist() == [50256, *gpt2.encode(TEXTS["words"])]


def test_a_long_file_is_read_in_bounded_memory(tmp_path, monkeypatch):
    (path := tmp_path / "x.txt").write_bytes(b"many words of a text\n" * 400_000)
    monkeypatch.setattr(cuts, "LONG", 1 << 18)
    monkeypatch.setattr(cuts, "PART", 1 << 18)
    monkeypatch.setattr(cuts, "BLOCK", 1 << 18)
    tracemalloc.start()
    size = sum(len(raw.content) for part, _ in parts(path, ReadOptions()) for raw in read(part, ReadOptions()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 8_400_000
    assert peak < 3_000_000


@pytest.mark.parametrize("separator", [None, "<|end|>"])
def test_a_long_text_of_a_stream_is_not_held_whole(monkeypatch, separator):
    for name in ("LONG", "PART", "BLOCK"):
        monkeypatch.setattr(cuts, name, 1 << 16)
    content = b"many words of a text\n" * 200_000  # 4.2 MB
    tracemalloc.start()
    found = documents_of_stream(io.BytesIO(content), "x", ReadOptions(split_on=separator))
    size = sum(len(raw.content) for raw, _ in found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == len(content) - (separator is not None)  # without the last line end
    assert peak < 2_000_000


# ---- Separators ---------------------------------------------------------------------------------------------------


def split(content: str, separator: str) -> list[str]:
    """The definition: what lies between the separators, without line ends around it, unless it is white space."""
    return [one.strip("\r\n") for one in content.split(separator) if one.encode().strip()]


def joined(raws: Iterable[Raw]) -> list[bytes]:
    """The documents, with the parts of a long one put together. An empty one stands for none."""
    found: list[bytes] = []
    for raw in raws:
        assert raw.kind in ("file", "part")
        if raw.is_first:
            found.append(raw.content)
        else:
            found[-1] += raw.content
    return [] if found == [b""] else found


SEPARATED = st.lists(
    st.sampled_from(["ab", "a", "aba", "\n", "\r\n", " ", "<|>", "漢 字", "x y z x y z x y z"]), max_size=25
)


@settings(deadline=None, max_examples=100)
@given(words=SEPARATED, separator=st.sampled_from(["a", "aba", "aa", "\n", "\n\n", "<|>", "\r\n", "z x"]))
def test_documents_lie_between_separators_found_from_the_left(tmp_path_factory, words, separator):
    content = "".join(words)
    (path := tmp_path_factory.getbasetemp() / "separated.txt").write_bytes(content.encode())
    options, expected = ReadOptions(split_on=separator), [one.encode() for one in split(content, separator)]
    for long, part, block in ((1000, 8, 7), (24, 8, 5), (5, 3, 1)):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("LONG", long), ("PART", part), ("BLOCK", block)):
                patch.setattr(cuts, name, value)
            assert joined(raw for one, _ in parts(path, options) for raw in read(one, options)) == expected
            for reopen in (None, lambda: io.BytesIO(content.encode())):
                found = list(documents_of_stream(io.BytesIO(content.encode()), "x", options, reopen))
                assert joined(raw for raw, _ in found) == expected
                assert sum(raw.num_bytes for raw, _ in found) <= found[-1][1] <= max(len(content.encode()), 1)
