"""Packed files: the same documents as plain ones, or a sentence; never a part of them in silence."""

import bz2
import gzip
import json
import lzma
import random
import sys
import tracemalloc
from pathlib import Path

import pytest
from corpora import run, texts
from test_record_files import after_each_part, read

from engine.errors import BadInput
from engine.tokens import prepare
from engine.tokens.reading import documents, packed, records, sequential, sources
from engine.tokens.reading.parts import ReadOptions, Span
from model.files import BadFile


def zstd(content: bytes) -> bytes:
    package = pytest.importorskip("zstandard")
    return package.ZstdCompressor(write_checksum=True).compress(content)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
LINES = b"".join(b'{"text": "line %d of many"}\n' % i for i in range(60)) + b'no JSON\n\n{"text": "the last"}'
CONTENTS = {
    "x.txt": "Words é, and\r\nmore.\n".encode(),
    "x.md": b"\xef\xbb\xbf# Words",
    "x.jsonl": LINES,
    "x.ndjson": LINES,
    "x.json": LINES,
    "array.json": b"[" + LINES.replace(b"\n\n", b"\n").replace(b"\n", b",\n").replace(b"no JSON", b"7") + b"]",
}


def unpack(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    with packed.open_stream(path) as file:
        return file.read()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_packed_gives_the_documents_of_the_plain_file(tmp_path, monkeypatch, name, packing):
    content = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    expected = read(tmp_path / name)
    assert len(expected) == (62 if "json" in name else 1)
    path = tmp_path / f"{name}{packing.upper()}"
    path.write_bytes(PACK[packing](content[:50]) + PACK[packing](content[50:]))  # two streams, one behind the other
    assert read(path) == expected
    monkeypatch.setattr(records, "SMALL", 0)  # the parent reads it
    monkeypatch.setattr(packed, "BLOCK", 100)
    assert read(path) == expected
    assert all(left == right for left, right in after_each_part(path))
    parts = [part for part, _ in documents.parts(path, ReadOptions())]
    assert not any(isinstance(part, Span) for part in parts)
    done = sum(raw.num_bytes for part in parts for raw in documents.read(part, ReadOptions()))
    assert done == pytest.approx(path.stat().st_size, rel=0.1)  # for the progress


@pytest.mark.parametrize("packing", PACK)
def test_a_packed_file_that_is_cut_off_or_damaged_is_a_sentence_with_the_byte(tmp_path, packing):
    path, rng = tmp_path / f"x.jsonl{packing}", random.Random(0)
    text = bytes(rng.randrange(97, 123) for _ in range(60))
    first, whole = PACK[packing](text), PACK[packing](text) + PACK[packing](b"the end")
    for cut in range(len(whole)):
        if cut != len(first):  # after which nothing tells that there was more
            with pytest.raises(BadFile, match=rf" data.* (is cut off, at or before byte {cut}|is empty)$"):
                unpack(path, whole[:cut])
    seen = set()
    for at in range(len(first)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        try:
            assert unpack(path, bytes(damaged)) == text + b"the end"  # as of the time in a header
        except BadFile as error:
            seen.add("damaged" if "damaged" in str(error) else "cut off" if "cut off" in str(error) else str(error))
    assert {"damaged"} <= seen <= {"damaged", "cut off"}
    with pytest.raises(BadFile, match=r"data that is damaged, at or before byte"):
        unpack(path, whole + b"more than there should be")
    (tmp_path / "y.txt").write_text("words")
    path.write_bytes(whole[:-9])
    with pytest.raises(BadInput, match=rf"x.jsonl{packing}: must be a file that can be read, got .* cut off, at or "):
        run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_padding_behind_packed_data_is_nothing_and_other_content_is_named(tmp_path):
    for packing, pack in PACK.items():
        if packing != ".zst":
            assert unpack(tmp_path / f"x.txt{packing}", pack(b"words") + bytes(512)) == b"words"
    with pytest.raises(BadFile, match="no gzip data, or damaged"):
        unpack(tmp_path / "x.txt.gz", b"plain words")
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress("words".encode("utf-16")))
    with pytest.raises(BadInput, match=r"x.txt.gz: must hold text, got UTF-16 text$"):
        run(tmp_path / "x.txt.gz", tmp_path / "out")


def test_zstandard_without_its_package_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(BadInput, match=r"x.jsonl.zst needs zstandard; install it with: pip install zstandard"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_lines_are_streamed_in_bounded_memory(tmp_path, packing):
    path, rng = tmp_path / f"x.jsonl{packing}", random.Random(0)
    path.write_bytes(PACK[packing](b"".join(rng.randbytes(10_000).hex().encode() + b"\n" for _ in range(300))))  # 6 MB
    tracemalloc.start()
    with packed.open_stream(path) as file:
        count = sum(raw.content.count(b"\n") for raw, _ in records.blocks(file, path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300
    assert peak < 4_500_000


@pytest.mark.parametrize("packing", PACK)
def test_a_worker_unpacks_only_files_that_tell_how_little_is_in_them(tmp_path, monkeypatch, packing):
    """A .jsonl.zst of 20 KB with 211 MB of text took a worker 1 GB of memory."""
    monkeypatch.setattr(sequential, "UNPACKED", 5000)
    monkeypatch.setattr(sequential, "UNTOLD", 150)
    path, tells = tmp_path / f"x.jsonl{packing}", packing in (".gz", ".zst")
    for lines, is_span in ((1, True), (200, tells), (280, False)):
        path.write_bytes(PACK[packing](b"".join(b'{"text": %09d}\n' % i**3 for i in range(lines))))
        (part, _), *_ = documents.parts(path, ReadOptions())
        assert isinstance(part, Span) == is_span, lines


@pytest.mark.parametrize("size", [1, 200, 255, 256, 257, 65_791, 65_792, 70_000])
def test_the_size_in_a_packed_file_is_read_from_it(tmp_path, size):
    for packing in (".gz", ".zst"):
        path = tmp_path / f"x.txt{packing}"
        whole = PACK[packing](b"a" * size)
        path.write_bytes(whole)
        assert packed.unpacked_size(path) == (size if size >= len(whole) else None)
        for cut in range(20):
            path.write_bytes(whole[:cut])
            packed.unpacked_size(path)
    path.write_bytes(b"plain text, and more of it than a header")
    assert packed.unpacked_size(path) is None
    path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor(write_content_size=False).compress(b"a" * 9000))
    assert packed.unpacked_size(path) is None


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
def test_packed_bytes_are_read_in_large_blocks(tmp_path, packing):
    path, reads = tmp_path / f"x.txt{packing}", []
    path.write_bytes(PACK[packing](random.Random(0).randbytes(200_000)))
    with packed.open_stream(path) as file:
        plain = file.raw._read
        file.raw._read = lambda most: reads.append(most) or plain(most)
        assert len(file.read()) == 200_000
    assert len(reads) <= 6


# ---- Directories ---------------------------------------------------------------------------------------------------


def test_packed_data_sets_are_read_and_their_cards_and_test_sets_are_not(tmp_path):
    root = tmp_path / "c4"
    names = "README.md", "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"
    for name in (*names, "env/pyvenv.cfg", "env/a.py", "_temporary/b.json", "LICENSE.csv.bz2"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else b"words")
    found = sources.find([str(root)])
    assert [str(path.relative_to(root)) for path in found.files] == [names[1]]
    assert found.held_out == [root / names[2]]
    assert found.not_read == {"README.md beside data": 1, "env/": 1, "_temporary/": 1, ".csv.bz2": 1}
    summary = prepare.describe(run(root, tmp_path / "out"), "out")
    assert "of text from 1 .json.gz, " in summary
    assert len(texts(tmp_path / "out", "train")) + len(texts(tmp_path / "out", "val")) == 61


def test_the_datasets_library_s_own_files_beside_its_tables_are_no_text(tmp_path):
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({}))
    assert [path.name for path in sources.find([str(tmp_path)]).files] == ["data-00000-of-00001.arrow"]
