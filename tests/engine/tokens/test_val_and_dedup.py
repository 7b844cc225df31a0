"""--val: a validation set of its own sources. --dedup: of equal documents the first is kept. Any workers, any stop."""

import hashlib
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from corpora import config, files, run, set_batch, texts

from engine.errors import BadInput
from engine.tokens import prepare
from engine.tokens.preparation import duplicates
from engine.tokens.preparation.account import Loss, Losses


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def prepared(train: Path, val: Path, out: Path, **options) -> dict:
    return prepare.prepare([str(train)], config(out, val=(str(val),), val_fraction=0.01, **options))


# ---- --val --------------------------------------------------------------------------------------------------------


def test_val_sources_are_the_validation_set_and_the_others_are_all_for_training(tmp_path):
    words = [f"document {number}" for number in range(200)]  # of which the hash would take some
    train, val = write(tmp_path / "in" / "a.jsonl", words), write(tmp_path / "val" / "b.jsonl", ["one", "two"])
    manifest = prepared(train, val, tmp_path / "out")
    assert texts(tmp_path / "out", "train") == words
    assert texts(tmp_path / "out", "val") == ["one", "two"]
    assert manifest["documents"] == {"train": 200, "val": 2}
    assert (manifest["sources"], manifest["val_sources"]) == ([str(train)], [str(val)])
    assert "validation by sources of its own" in prepare.describe(manifest, "out")


def test_a_file_in_both_is_refused_by_its_real_path(tmp_path):
    write(tmp_path / "in" / "a.jsonl", ["one"])
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    with pytest.raises(BadInput, match=r"--val must name other files .* got .*linked/a.jsonl in both"):
        prepared(tmp_path / "in", tmp_path / "linked", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_validation_source_is_refused_and_no_tail_is_taken(tmp_path):
    train, val = write(tmp_path / "a.jsonl", ["one two three"]), write(tmp_path / "b.jsonl", [" "])
    with pytest.raises(
        BadInput, match=r"must fill both splits, got 14 training and 0 .*give more text or other sources"
    ):
        prepared(train, val, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_val_and_a_fraction_together_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"--val-fraction must be left out where --val names .*, got 0.3"):
        config(tmp_path, val=("b",), val_fraction=0.3)


def test_held_out_sets_that_are_named_are_no_longer_held_out(tmp_path):
    write(tmp_path / "set-train.jsonl", ["one"])
    val = write(tmp_path / "set-validation.jsonl", ["two"])
    assert "held_out" not in prepared(tmp_path, val, tmp_path / "out")


def test_requests_without_the_new_options_are_as_they_were(tmp_path):
    source = write(tmp_path / "a.jsonl", ["one"])
    found = prepare._identities(prepare.find([str(source)]))
    stat = source.stat()
    before = [["bytes", 0.3, 100_000_000, "text", [str(source)]], [[str(source), stat.st_size, stat.st_mtime_ns]]]
    expected = hashlib.sha256(json.dumps(before).encode()).hexdigest()
    requests = {
        prepare._request([str(source)], found, config(tmp_path, **options))
        for options in ({}, {"dedup": True}, {"split_on": "x"}, {"val": ("b",), "val_fraction": 0.01})
    }
    assert prepare._request([str(source)], found, config(tmp_path)) == expected
    assert len(requests) == 4


# ---- --dedup ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_digests_are_found_as_in_a_set_in_any_batches_and_after_a_stop(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(duplicates, "FIRST_SLOTS", 8)
    monkeypatch.setattr(duplicates, "READ", 5)
    random, known = Random(seed), {}
    seen = duplicates.Seen(tmp_path / "seen")
    for _ in range(40):
        values = [random.randrange(150) for _ in range(random.randrange(12))]
        is_val = np.array([random.random() < 0.3 for _ in values], dtype=bool)
        digests = np.array([((value % 7) << 61, 2 * value) for value in values], dtype=np.uint64).reshape(
            -1, 2
        )  # crowded
        is_new, is_leak = seen.add(digests, is_val)
        for value, val, new, leak in zip(values, is_val, is_new, is_leak, strict=True):
            assert new == (value not in known)
            assert leak == (known.setdefault(value, val) != val)
        if random.random() < 0.2:
            seen.close()
            seen = duplicates.Seen(tmp_path / "seen", seen.count)
    assert seen.count == len(known) > 90
    assert seen.count <= duplicates.MOST_FULL * len(seen.table)
    seen.close()


def test_the_table_takes_at_most_32_bytes_a_document(tmp_path):
    seen, random = duplicates.Seen(tmp_path / "seen"), np.random.default_rng(0)
    for _ in range(20):
        seen.add(random.integers(2**64, size=(2000, 2), dtype=np.uint64), np.zeros(2000, dtype=bool))
        assert seen.table.nbytes <= max(32.1 * seen.count, 16 * duplicates.FIRST_SLOTS)
    seen.close()


def test_of_equal_documents_the_first_is_kept_with_any_number_of_workers(tmp_path, monkeypatch):
    random = Random(0)
    words = [f"document {random.randrange(40)}" for _ in range(200)]
    for number in range(4):
        write(tmp_path / "in" / f"{number}.jsonl", words[50 * number : 50 * number + 50])
    set_batch(monkeypatch, 200)
    manifest = run(tmp_path / "in", tmp_path / "one" / "out", dedup=True)
    assert run(tmp_path / "in", tmp_path / "two" / "out", dedup=True, workers=2) == manifest
    assert files(tmp_path / "one" / "out") == files(tmp_path / "two" / "out")
    unique = list(dict.fromkeys(words))
    kept = {split: texts(tmp_path / "one" / "out", split) for split in ("train", "val")}
    assert kept == {split: [word for word in unique if word in kept[split]] for split in kept}
    assert sum(map(len, kept.values())) == sum(manifest["documents"].values()) == len(unique)
    lost = sum(map(len, words)) - sum(map(len, unique))
    assert manifest["duplicates"] == {"documents": 200 - len(unique), "bytes": lost, "leaked": 0}
    assert manifest["text_bytes"] == sum(map(len, unique))
    said = prepare.describe(manifest, "out")
    assert f"duplicates left out: {200 - len(unique)} documents, {lost:,} bytes" in said


def test_a_validation_document_that_is_for_training_too_is_left_out_and_said(tmp_path):
    train, val = write(tmp_path / "a.jsonl", ["a", "b", "a"]), write(tmp_path / "b.jsonl", ["c", "b", "c", "d"])
    manifest = prepared(train, val, tmp_path / "out", dedup=True)
    assert texts(tmp_path / "out", "train") == ["a", "b"]
    assert texts(tmp_path / "out", "val") == ["c", "d"]
    assert manifest["duplicates"] == {"documents": 3, "bytes": 3, "leaked": 1}
    assert "1 of them are validation documents that are for training too" in prepare.describe(manifest, "out")


# ---- Places -------------------------------------------------------------------------------------------------------


def test_a_line_of_a_span_is_counted_from_the_begin_of_its_file(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a"] * 9)
    losses = Losses()
    for place, before in ((2, 3 * len('{"text": "a"}\n')), (1, 7 * len('{"text": "a"}\n'))):
        losses.add(Loss(str(path), 5, 1, "null", "line", place, before))
    assert losses.largest() == [{"file": str(path), "bytes": 10, "first": "line 5, null"}]
