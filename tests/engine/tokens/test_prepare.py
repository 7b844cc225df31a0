"""Text to shards: the same bytes every time, each document once, and other files are left alone."""

import json
from pathlib import Path

import pytest
from corpora import config, documents, files, run, set_batch, texts, write_library

from engine.errors import BadInput
from engine.tokens import prepare, shards, tokenizer
from engine.tokens.preparation.encode import in_validation, split_digest
from engine.tokens.prepare import PrepareConfig
from engine.tokens.reading import sources
from engine.tokens.shards import TokenStream


@pytest.fixture
def source(tmp_path) -> Path:
    return write_library(tmp_path / "library")


def test_every_document_is_there_once_and_begins_with_the_end_of_text(source, tmp_path):
    manifest = run(source, tmp_path / "out")
    written = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    expected = [path.read_text() for path in source.rglob("*") if path.suffix in (".py", ".txt", ".md")]
    expected += [f"record {i}" for i in range(9)]
    assert sorted(written) == sorted(expected)
    assert manifest["documents"] == {split: len(texts(tmp_path / "out", split)) for split in ("train", "val")}
    assert manifest["skipped"] == {}
    assert min(manifest["documents"].values()) > 2


def test_gpt2_documents_begin_with_50256(source, tmp_path):
    manifest = run(source, tmp_path / "out", tokenizer="gpt2")
    gpt2 = tokenizer.load("gpt2")
    decoded = [gpt2.decode(d[1:]) for split in ("train", "val") for d in documents(tmp_path / "out", split, 50256)]
    assert len(decoded) == 29
    assert "Übung macht den Meister.\n" in decoded
    assert (manifest["tokenizer"], manifest["vocab_size"]) == ("gpt2", 50257)
    assert shards.tokenizer_name(tmp_path / "out") == "gpt2"


def test_any_number_of_workers_makes_the_same_bytes(source, tmp_path, monkeypatch):
    set_batch(monkeypatch, 40)  # many batches, so that workers finish out of order
    run(source, tmp_path / "one" / "out", workers=1, shard_tokens=200)
    run(source, tmp_path / "two" / "out", workers=2, shard_tokens=200)
    one = files(tmp_path / "one" / "out")
    assert one == files(tmp_path / "two" / "out")
    assert len(one) > 4


def test_documents_keep_their_split_when_the_corpus_grows(source, tmp_path):
    run(source, tmp_path / "before")
    (source / "a_new_one.txt").write_text("new")
    (source / "email" / "another.py").write_text("y = 2\n")
    run(source, tmp_path / "after")
    for split in ("train", "val"):
        before, after = texts(tmp_path / "before", split), texts(tmp_path / "after", split)
        assert [text for text in after if text in before] == before


def test_the_split_takes_its_share():
    chosen = [in_validation(split_digest(b"document %d" % i), 0.2) for i in range(5000)]
    assert sum(chosen) / 5000 == pytest.approx(0.2, abs=0.03)
    assert chosen == [in_validation(split_digest(b"document %d" % i), 0.2) for i in range(5000)]
    assert all(
        in_validation(split_digest(b"document %d" % i), 0.5) for i in range(5000) if chosen[i]
    )  # a larger share adds


def test_a_single_book_gives_its_tail_to_validation(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{i}\n" for i in range(1000)))
    manifest = run(book, tmp_path / "out", val_fraction=0.1)
    (train,), (val,) = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "val")
    assert train + val == book.read_text()
    assert len(val) == len(book.read_text()) // 10
    assert manifest["split"] == "the tail of each document"


def test_text_too_short_for_two_splits_is_refused_with_what_was_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("ab")
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(
        BadInput, match=r"must fill both splits, got 3 training and 0 validation .* left out: 1 not UTF-8"
    ):
        run(tmp_path / "in", tmp_path / "out", val_fraction=0.01)
    assert not (tmp_path / "out").exists()


def test_shards_are_cut_at_the_size_asked_for(source, tmp_path):
    manifest = run(source, tmp_path / "out", shard_tokens=100)
    for split in ("train", "val"):
        sizes = [shard["tokens"] for shard in manifest["shards"] if shard["split"] == split]
        assert len(sizes) > 1
        assert set(sizes[:-1]) == {100}
        assert 0 < sizes[-1] <= 100
        assert sum(sizes) == manifest["tokens"][split]
    whole = run(source, tmp_path / "whole")
    assert whole["tokens"] == manifest["tokens"]
    assert len(whole["shards"]) == 2
    for split in ("train", "val"):
        assert texts(tmp_path / "out", split) == texts(tmp_path / "whole", split)


def test_the_manifest_tells_the_truth(source, tmp_path):
    manifest = run(source, tmp_path / "out", shard_tokens=100)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    on_disk = files(tmp_path / "out")
    del on_disk["manifest.json"]
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == on_disk  # and there is no other file
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["file"]
        assert path.stat().st_size == shard["bytes"]
        assert len(shards.open_shard(path)) == shard["tokens"]


# ---- Requests -----------------------------------------------------------------------------------------------------


def test_the_same_request_again_does_nothing(source, tmp_path):
    first = run(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(source, tmp_path / "out") == first
    assert run(source, tmp_path / "out", overwrite=True, workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_changed_sources_are_another_request(source, tmp_path):
    run(source, tmp_path / "out")
    (source / "notes.txt").write_text("changed")
    with pytest.raises(BadInput, match=r"must be new or empty, got 3 files, .* or add --overwrite"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    assert "changed" in texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")


@pytest.mark.parametrize(("rule", "name"), [(1, ".hidden.txt"), (2, "env/lib/a.py"), (2, "a.json")])
def test_data_of_an_older_version_that_read_other_files_is_a_sentence_of_its_own(source, tmp_path, rule, name):
    (source / "env/lib").mkdir(parents=True)
    (source / "env/pyvenv.cfg").touch()
    (source / name).write_text('{"text": "read by one of them"}')
    manifest = run(source, tmp_path / "out") | {"rules": rule}
    if rule == 1:
        del manifest["rules"]
    older = sources.find_by_rule([str(source)], rule)
    manifest["request"] = prepare._request([str(source)], prepare._identities(older), config(tmp_path / "out"))
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=rf"a version that read other files of them \(.*/{name} ...\); train on it"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", overwrite=True)["rules"] == prepare.RULES


def test_lost_shards_are_made_again(source, tmp_path):
    first = run(source, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "out" / first["shards"][0]["file"]).unlink()
    (tmp_path / "out" / first["shards"][1]["file"]).write_bytes(b"cut short")
    run(source, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before


def test_foreign_files_are_refused_and_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = files(tmp_path / "out")
    with pytest.raises(BadInput, match=r"must be new or empty, got 1 files, such as thesis.tex"):
        run(source, tmp_path / "out")
    assert files(tmp_path / "out") == before
    run(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"  # its name is not a shard's


def test_overwrite_replaces_all_older_shards(source, tmp_path):
    run(source, tmp_path / "out", shard_tokens=50)
    many = len(files(tmp_path / "out"))
    manifest = run(source, tmp_path / "out", shard_tokens=10_000, overwrite=True)
    assert many > 5
    assert set(files(tmp_path / "out")) == {"manifest.json", *(s["file"] for s in manifest["shards"])}


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "an app"}'], ids=["no JSON", "a list", "another program's"])
def test_a_foreign_manifest_is_refused_and_can_be_replaced(source, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(BadInput, match=r"manifest.json: must be a manifest of shards"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == content
    run(source, tmp_path / "out", overwrite=True)
    assert TokenStream.open(tmp_path / "out", "train", 257)


def test_an_out_that_is_a_file_is_a_sentence(source, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BadInput, match=r"--out must be a directory that can be written, got .*out: "):
        run(source, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_a_bad_config_names_everything_that_is_off():
    with pytest.raises(
        BadInput, match=r"--val-fraction must .*got 1.0; --shard-tokens must .*got 0; --workers must .*got 0"
    ):
        PrepareConfig("out", val_fraction=1.0, shard_tokens=0, workers=0)
