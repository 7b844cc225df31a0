"""`gpt2 data`: counts that are those of a plain loop, damage that is named, text that a terminal can show."""

import functools
import json
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.cells import cell_len
from runs import run

from engine.tokens import shards, tokenizer
from engine.tokens.inspection import scan, tables, view
from engine.tokens.prepare import PrepareConfig, prepare

END = 256


def counted(tokens: list[int], sizes: list[int], chosen: scan.Chosen) -> scan.Split:
    """The tokens added in blocks of these sizes, again and again."""
    split, start = scan.Split(END, chosen), 0
    for number in range(10**6):
        if start >= len(tokens):
            break
        size = sizes[number % len(sizes)]
        split.add(np.array(tokens[start : start + size], dtype="<u2").tobytes())
        start += size
    split.close()
    return split


def by_hand(tokens: list[int]) -> list[tuple[int, ...]]:
    """Documents by a plain loop."""
    documents: list[tuple[int, ...]] = []
    one: list[int] = []
    for place, token in enumerate(tokens):
        if token == END:
            if place:
                documents.append(tuple(one))
            one = []
        else:
            one.append(token)
    return documents + ([tuple(one)] if one else [])


@pytest.mark.parametrize("ends", ["begin a document", "end a document", "both", "none"])
def test_counts_are_those_of_a_plain_loop_wherever_blocks_end(ends, monkeypatch):
    monkeypatch.setattr(scan, "BLOCK_TOKENS", 8)
    rng = np.random.default_rng(1)
    known = [rng.integers(0, 256, length).tolist() for length in (1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 40)]
    picked = {name: [known[i] for i in rng.integers(0, len(known), 60)] for name in ("train", "val")}
    picked["val"] += [[1, 2, 3, 4], [1, 2, 3, 5], [1] * 40, [1, 2, *[1] * 38]]
    front, back = [[END], []][ends in ("end a document", "none")], [[END], []][ends in ("begin a document", "none")]
    streams = {name: list(chain(*([*front, *one, *back] for one in all_))) for name, all_ in picked.items()}
    expected = {name: by_hand(stream) for name, stream in streams.items()}
    for sizes in ([8], [1], [3, 8, 5], [7]):
        chosen = scan.Chosen()
        splits = {name: counted(stream, sizes, chosen) for name, stream in streams.items()}
        found = scan.copies(splits)
        for name, documents in expected.items():
            assert splits[name].lengths == Counter(map(len, documents))
            assert splits[name].ends == streams[name].count(END)
            assert splits[name].tokens == len(streams[name])
            lengths = sorted(map(len, documents))
            spread = {"median": np.median(lengths), "mean": np.mean(lengths)}
            assert splits[name].spread() == pytest.approx(spread | {"shortest": lengths[0], "longest": lengths[-1]})
            assert found[name]["compared"] == len(documents)
            assert found[name]["copies"] == len(documents) - len(set(documents))
        in_train = [one for one in expected["val"] if one in set(expected["train"])]
        assert found["val"]["in_train"] == len(in_train)


def test_of_many_documents_a_share_is_compared_and_copies_stay_together():
    rng, chosen = np.random.default_rng(2), scan.Chosen(most=2000)
    documents = [rng.integers(0, 256, 5).tolist() for _ in range(6000)]
    documents += documents[:1500]  # 20% are copies
    splits = {name: scan.Split(END, chosen) for name in ("train", "val")}
    for split, some in zip(splits.values(), (documents, documents[:1000]), strict=True):
        for one in range(0, len(some), 100):
            split.add(np.array([token for each in some[one : one + 100] for token in (END, *each)], "<u2").tobytes())
            scan.make_room(list(splits.values()), chosen)
            assert chosen.kept <= 2000
        split.close()
    assert chosen.bits == 3
    found = scan.copies(splits)
    assert 600 < found["train"]["compared"] < 1300
    assert found["train"]["copies"] / found["train"]["compared"] == pytest.approx(0.2, abs=0.05)
    assert found["val"]["in_train"] == found["val"]["compared"] > 60  # each that is chosen is chosen in both


# ---- The command --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def one_tokenizer_of_each_kind():
    """Loads each tokenizer once, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load", functools.cache(tokenizer.load))
        yield


@pytest.fixture
def data(tmp_path) -> Path:
    """Shards of 300 tokens of 12 documents, one of them twice, one in both splits. Its tokens are bytes."""
    out = tmp_path / "texts"
    (source := tmp_path / "source").mkdir()
    for number in range(12):
        (source / f"{number:02d}.txt").write_text(f"Text {number % 11} of many. " * 10)
    prepare([str(source)], PrepareConfig(str(out), tokenizer="bytes", workers=1, val_fraction=0.3, shard_tokens=300))
    return out


def seen(capfd, *args: str) -> tuple[int, str]:
    code = run("data", *args)
    captured = capfd.readouterr()
    assert captured.err == ""
    return code, captured.out


def test_prepared_data_is_shown_as_its_manifest_has_it(data, capfd):
    manifest = json.loads((data / "manifest.json").read_text())
    before = {path: path.read_bytes() for path in data.iterdir()}
    code, printed = seen(capfd, str(data), "--json", "--check")
    found = json.loads(printed)
    assert code == found["damaged"] == 0
    assert [(row["file"], row["tokens"], row["bytes"], row["digest"]) for row in found["shards"]] == [
        (one["file"], one["tokens"], one["bytes"], "ok") for one in manifest["shards"]
    ]
    for split in ("train", "val"):
        assert found["splits"][split]["tokens"] == manifest["tokens"][split]
        assert found["splits"][split]["documents"] == manifest["documents"][split]
    copies = sum(split["duplicates"]["copies"] for split in found["splits"].values())
    assert copies + found["splits"]["val"]["duplicates"]["in_train"] == 1
    tokens = sum(manifest["tokens"].values())
    assert found["bytes_per_token"] == pytest.approx(manifest["text_bytes"] / tokens)
    assert found["measured_tokens"] == tokens
    assert {path: path.read_bytes() for path in data.iterdir()} == before


def test_what_a_pipe_gets_has_80_columns_and_all_of_it(data, capfd, monkeypatch):
    monkeypatch.setattr(view, "WINDOW_BYTES", 40)  # of documents of 200 bytes
    code, printed = seen(capfd, str(data), "--windows", "5", "--seed", "3")
    assert code == 0
    assert max(map(cell_len, printed.splitlines())) <= 80
    assert all(line == line.rstrip() for line in printed.splitlines())
    for words in ("tokens of bytes, prepared here", "not checked", "sources: ", "validation by hash", "all counted"):
        assert words in printed.replace("\n", " ")
    windows = printed.split("\nwindow ")[1:]
    assert len(windows) == 5
    assert all("\n── document ──\n" in window for window in windows[::2])  # every other one is at a border
    assert not all("── document ──" in window for window in windows)
    assert "\x1b" not in printed
    assert seen(capfd, str(data), "--windows", "5", "--seed", "3")[1] == printed
    assert seen(capfd, str(data), "--windows", "5", "--seed", "4")[1] != printed


def test_a_damaged_shard_is_named_and_the_others_are_shown(data, capfd):
    bad, over, changed, gone = sorted(data.glob("*_train_*.bin"))[:4]
    bad.write_bytes(bad.read_bytes()[:-2])
    content = bytearray(over.read_bytes())
    content[1024 + 2 * 7 : 1026 + 2 * 7] = (300).to_bytes(2, "little")
    over.write_bytes(content)
    content = bytearray(changed.read_bytes())
    content[1024] ^= 1
    changed.write_bytes(content)
    gone.unlink()
    shards.write_shard(data / "y_train_000000.bin", np.arange(9, dtype=np.uint16))
    for flags, damaged in (((), 3), (("--check",), 4)):
        code, printed = seen(capfd, str(data), "--json", *flags)
        found = json.loads(printed)
        assert (code, found["damaged"]) == (1, damaged)
        wrong = {row["file"]: row["damage"] for row in found["shards"] if row["damage"]}
        assert wrong[bad.name].startswith("300 tokens take 1624 bytes, got 1622")
        assert wrong[over.name].startswith("token 7 must be below the vocabulary size 257, got 300")
        assert wrong[gone.name] == "is missing"
        assert found["unlisted"] == ["y_train_000000.bin"]
        assert {row["tokens"] for row in found["shards"] if row["file"] not in wrong} >= {300}
        assert not {window["file"] for window in found["windows"]} & set(wrong)
    assert wrong[changed.name].startswith("must have sha256 ")
    code, printed = seen(capfd, str(data), "--check", "--windows", "0")
    printed = printed.replace("\n", "")
    assert f"{gone.name}: is missing" in printed
    assert "y_train_000000.bin: not in manifest.json, so nothing reads it" in printed
    assert "differs" in printed


def test_a_shard_that_is_missing_does_not_join_its_neighbours(tmp_path, capfd):
    for number, tokens in enumerate(([5, 6, 50256, 7], [8], [9, 50256, 4])):
        shards.write_shard(tmp_path / f"x_train_{number:06d}.bin", np.array(tokens, dtype=np.uint16))
    whole = json.loads(seen(capfd, str(tmp_path), "--json")[1])["splits"]["train"]
    (tmp_path / "x_train_000001.bin").write_bytes(b"")
    code, printed = seen(capfd, str(tmp_path), "--json")
    left = json.loads(printed)["splits"]["train"]
    assert code == 1
    assert (whole["documents"], whole["lengths"]["mean"]) == (3, 2)
    assert (left["documents"], left["lengths"]["longest"]) == (4, 2)


def test_a_document_of_both_splits_is_called_leakage(tmp_path, capfd):
    def write(split: str, *documents: list[int]) -> None:
        tokens = [token for one in documents for token in (50256, *one)]
        shards.write_shard(tmp_path / f"x_{split}_000000.bin", np.array(tokens, dtype=np.uint16))

    write("train", [1, 2], [3, 4], [1, 2], [5])
    write("val", [3, 4], [6])
    code, printed = seen(capfd, str(tmp_path), "--windows", "0")
    assert code == 0
    assert "leakage          val: 50.00%, 1 of them are in train too" in printed
    assert "train: 25.00%, 1 of 4 documents copy an earlier one\n" in printed
    write("val", [4, 3], [6])
    assert "leakage" not in seen(capfd, str(tmp_path), "--windows", "0")[1]


def write_nanogpt(directory: Path) -> None:
    for split in ("train", "val"):
        np.array([*range(300, 305), 50256, *range(400, 404), 50256], dtype="<u2").tofile(directory / f"{split}.bin")


def write_named(*names: str):
    def write(directory: Path) -> None:
        for name in names:
            tokens = np.array([50256, *range(300, 305), 50256, *range(400, 404)], dtype=np.uint16)
            path = directory / name
            np.save(path, tokens) if name.endswith(".npy") else shards.write_shard(path, tokens)

    return write


FOREIGN = {
    "nanoGPT": write_nanogpt,
    "llm.c": write_named("edu_fineweb_train_000001.bin", "edu_fineweb_val_000000.bin"),
    "llm.c without a number": write_named("TinyStories_train.bin", "TinyStories_val.bin"),
    "build-nanogpt": write_named("edufineweb_train_000001.npy", "edufineweb_val_000000.npy"),
    "a set called train": write_named("my_train_set_train_000000.bin", "my_train_set_val_000000.bin"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_data_of_others_is_shown_without_a_manifest(kind, tmp_path, capfd):
    FOREIGN[kind](tmp_path)
    code, printed = seen(capfd, str(tmp_path), "--json")
    found = json.loads(printed)
    assert code == 0
    for split in ("train", "val"):
        assert found["splits"][split]["shards"] == 1
        assert found["splits"][split]["tokens"] == 11
        assert found["splits"][split]["documents"] == 2
    assert {row["digest"] for row in found["shards"]} == {"none"}
    assert found["manifest"] is None
    assert found["kind"].endswith("taken to be GPT-2's tokens")


def test_what_is_no_data_is_named_with_the_way_in(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run" / "metrics.jsonl").touch()
    (tmp_path / "stopped" / shards.BUILDING).mkdir(parents=True)
    for path, words in (
        ("texts", "which is text (1 .txt); make token shards of it: gpt2 prepare texts"),
        ("a_run", "which is a run; give it as --run"),
        ("text", "which does not exist; did you mean texts?"),
        ("stopped", "got one that was stopped; run gpt2 prepare again"),
    ):
        assert run("data", path) == 2
        captured = capfd.readouterr()
        assert words in captured.err
        assert captured.out == ""
    assert run("data", "texts", "--windows", "-1") == 2
    assert "--windows must be from 0 to 1,000, got -1" in capfd.readouterr().err


# ---- What is printed ----------------------------------------------------------------------------------------------


def test_text_that_a_terminal_would_obey_is_escaped():
    hidden = "a\x1b[31mb\0c\td\r\n\u202ee\u200bf\x85g\ue000h\ufeff"
    assert tables.shown(hidden) == "a\\x1b[31mb\\x00c\\td\\r\n\\u202ee\\u200bf\\x85g\\ue000h\\ufeff"
    assert tables.shown("Grüße, 日本語 👋 ½ �\n") == "Grüße, 日本語 👋 ½ �\n"


def printed_of(encoding: str = "utf-8", is_terminal: bool = False, **changes) -> str:
    window = {
        "split": "val",
        "file": "x_val_000000.bin",
        "first_token": 5,
        "documents": ["日本" * 60, "[red]\x1b[2J:)"],
    }
    row = {"file": "x_train_000000.bin", "split": "train", "tokens": 7, "documents": 1, "bytes": 1038}
    found = {"directory": "d", "kind": "k", "tokenizer": "gpt2", "compared": "1 in 4", "bytes_per_token": 4.0}
    found |= {"shards": [row | {"digest": "none", "damage": None}], "splits": {}, "measured_tokens": 0}
    found |= {"unlisted": [], "manifest": None, "windows": [window], "damaged": 0}
    lines: list[str] = []
    stream = SimpleNamespace(encoding=encoding, isatty=lambda: is_terminal, flush=lambda: None)
    stream.write, stream.writelines = lines.append, lines.extend
    tables.write(found | changes, stream)
    return "".join(lines)


def test_wide_characters_fit_and_an_ascii_terminal_gets_ascii_borders():
    printed = printed_of()
    assert max(map(cell_len, printed.splitlines())) == 80
    assert printed.endswith("\n── document ──\n[red]\\x1b[2J:)\n")
    assert "\n-- document --\n" in printed_of(encoding="ascii")


def test_on_a_terminal_borders_and_digests_have_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = printed_of(is_terminal=True)
    assert "x_train_000000.bin train      7         1 1,038 B none" in printed  # whole, though it is narrow
    assert "\x1b[1;36m── document ──\x1b[0m" in printed
    assert "[red]\\x1b[2J:)" in printed


def test_of_a_thousand_shards_the_first_the_last_and_the_damaged_are_listed():
    row = {"split": "train", "tokens": 7, "documents": 1, "bytes": 1038, "digest": "ok", "damage": None}
    rows = [row | {"file": f"x_train_{number:06d}.bin"} for number in range(1000)]
    rows[500]["damage"] = "is missing"
    printed = printed_of(shards=rows)
    assert printed.count("x_train_") == 42  # one of them twice
    assert "\n...\n" in printed
    assert "d/x_train_000500.bin: is missing" in printed
