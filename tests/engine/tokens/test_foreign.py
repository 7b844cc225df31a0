"""What a user gives in place of data, a run or weights is named, with the way in; names of shards."""

import json
import os
import re
import sys

import numpy as np
import pytest
from conftest import ROOT
from runs import run

from engine import config
from engine.errors import BadInput
from engine.tokens import foreign, names, shards
from engine.tokens.prepare import PrepareConfig, prepare
from engine.tokens.shards import TokenStream

VOCAB = 50257
GPT2_CONFIG, RUN_CONFIG = {"model_type": "gpt2"}, {"tokens_per_step": 8, "data": "."}
HEADER = np.array([20240520, 1, *[0] * 254], dtype="<i4").tobytes()

# Files at a path, what they are called, and the way in. "NAME" stands for the path.
PLACES = {
    "shards": ({"x_train_000000.bin": b""}, "a directory of token shards", "give it as --data"),
    "one .bin for each split": ({"t_train.bin": HEADER}, "a directory of tokens", "give it as --data"),
    "nanoGPT's tokens": ({"train.bin": b"\1\0\2\0", "val.bin": b"\1\0", "x.py": b""}, "tokens, a .bin", "as --data"),
    "nanoGPT's characters": ({"train.bin": b"\1\0", "val.bin": b"\1\0", "meta.pkl": b""}, "own (meta.pkl)", "prepare"),
    "text called train.bin": ({"train.bin": b"a\n", "val.bin": b"b\n"}, "a directory of tokens", "give it as --data"),
    "a run": (
        {"config.json": RUN_CONFIG},
        "a run",
        "give it as --run, or as --init-from to train from it; its data is .",
    ),
    "a run of an older version": ({"metrics.jsonl": b""}, "a run", "give it as --run"),
    "weights": (
        {"config.json": GPT2_CONFIG, "model.safetensors": b""},
        "Hugging Face",
        "gpt2 import NAME --out runs/it",
    ),
    "another model": ({"config.json": {"model_type": "llama"}}, "of a llama", "only a GPT-2"),
    "a pickle alone": ({"pytorch_model.bin": b""}, "Hugging Face layout", "gpt2 import NAME"),
    "nanoGPT's run": ({"ckpt.pt": b""}, "a directory with ckpt.pt", "gpt2 import NAME/ckpt.pt --out runs/it"),
    "text": (
        {"a.jsonl": b"", "b.txt": b"", "c.txt": b""},
        "text (2 .txt, 1 .jsonl)",
        "gpt2 prepare NAME --out data/it",
    ),
    "text inside": ({"en/a.jsonl": b"", "README.md": b""}, "with text in its own directories", "gpt2 prepare NAME"),
    "runs inside": ({"a/metrics.jsonl": b"", "notes.txt": b""}, "with runs in its own", "give one of them: NAME/a"),
    "a dataset": ({"data-0.arrow": b""}, "a dataset of the datasets library", "to_parquet"),
    "a stopped preparation": ({".building/x": b""}, "a preparation that was stopped", "run gpt2 prepare again"),
    "nothing known": ({f"{number}.dat": b"" for number in range(9)}, "with 0.dat, 1.dat, 2.dat and 6 more in it", ""),
    "nothing": ({}, "an empty directory", ""),
}
FILES = {
    "tale.txt": (b"Once", "a file of text", "gpt2 prepare NAME --out data/tale"),
    "ckpt.pt": (b"", "a checkpoint of PyTorch", "gpt2 import NAME --out runs/ckpt"),
    "x_val_000000.bin": (HEADER, "a file of tokens", "give its directory, "),
    "x_val_000000.npy": (b"\x93NUMPY", "a file of tokens", "give its directory, "),
    "model.safetensors": (b"", "one file of weights", "give its directory, "),
    "gpt2_124M.bin": (b"\xc6\xd7\x34\x01", "weights in llm.c's format", "export_hf.py"),
    "stories_val.bin": (b"\xa1\xd9\x34\x01", "llm.c's tokens of Llama 3", "gpt2 prepare"),
    "hellaswag_val.bin": (b"\x8a\xd8\x34\x01", "questions", "nothing here reads it"),
    "photo": (b"\xff\xd8", "a file", ""),
}


def fill(directory, entries):
    directory.mkdir()
    for name, content in entries.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)
    return directory


@pytest.mark.parametrize("place", PLACES)
def test_what_a_directory_holds_is_named_with_the_way_in(place, tmp_path):
    entries, words, way = PLACES[place]
    path = fill(tmp_path / "it", entries)
    assert words in foreign.hint(path)
    assert way.replace("NAME", str(path)) in foreign.hint(path)


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_is_named_with_the_way_in(name, tmp_path):
    content, words, way = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert f"is {words}" in foreign.hint(tmp_path / name) or words in foreign.hint(tmp_path / name)
    assert way.replace("NAME", str(tmp_path / name)) in foreign.hint(tmp_path / name)


def test_a_path_with_a_typo_gets_its_nearest_sibling(tmp_path):
    (tmp_path / "runs" / "gpt2").mkdir(parents=True)
    for typed in ("runs/gtp2", "rnus/gpt2"):
        assert foreign.hint(tmp_path / typed).endswith(f"does not exist; did you mean {tmp_path}/runs/gpt2?")
    assert foreign.hint(tmp_path / "runs/other", "make one") == ", which does not exist; make one"


def test_a_way_in_names_the_command_as_it_was_called(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "engine.cli"])
    found = [foreign.hint(fill(tmp_path / str(i), entries)) for i, (entries, *_) in enumerate(PLACES.values())]
    for name, (content, *_) in FILES.items():
        (tmp_path / name).write_bytes(content)
        found.append(foreign.hint(tmp_path / name))
    for split in ("train", "val"):
        np.arange(90, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    with pytest.raises(BadInput) as raised:
        shards.open_tokens(tmp_path / "train.bin")
    named = re.findall(r"(\S+) (?:prepare|import)\b", " ".join([*found, str(raised.value)]))
    assert len(named) >= 12
    assert {*named} == {"engine.cli"}


def test_nothing_at_a_path_ends_in_an_exception_or_a_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    assert "a named pipe" in foreign.hint(tmp_path / "pipe")
    assert "a link to nowhere" in foreign.hint(tmp_path / "link")
    assert "a device" in foreign.hint("/dev/zero")
    for path in ("x" * 5000, "a\0b", "", tmp_path / "pipe" / "below"):
        assert foreign.hint(path).startswith(", which ")


def test_every_command_names_what_was_given_in_place_of_what_it_takes(tmp_path, trained, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = fill(tmp_path / "hf", PLACES["weights"][0])
    texts = fill(tmp_path / "texts", PLACES["text"][0])
    checkpoint = next((trained / "checkpoints").glob("step_*"))
    asked = {
        ("sample", "--run", "hf", "--prompt", "a"): "Hugging Face layout; make a run of it: gpt2 import hf --out",
        ("eval", "--run", str(checkpoint)): f"a checkpoint of a run; give the run, {trained}",
        ("eval", "--run", str(trained), "--data", str(trained)): "which is a run; give it as --run",
        ("eval", "--run", str(trained), "--data", "texts"): "which is text (2 .txt, 1 .jsonl); make token shards of it",
        ("verify", "hf"): "weights in the Hugging Face layout",
        ("verify", str(checkpoint)): "a checkpoint of a run; give the run",
        ("import", str(trained), "--out", "new"): "which is a run; give it as --run, or as --init-from",
        ("import", "texts", "--out", "new"): "which is text",
        ("export", "--run", "texst", "--out", "new"): "which does not exist; did you mean texts?",
    }
    for args, sentence in asked.items():
        assert run(*args) == 2, args
        assert sentence in capfd.readouterr().err, args
    with pytest.raises(BadInput, match="which is weights in the Hugging Face layout"):
        config.load(weights)
    with pytest.raises(BadInput, match="which is a checkpoint of a run; give the run"):
        shards.tokenizer_name(checkpoint)
    with pytest.raises(BadInput, match=r"which is text .*gpt2 prepare "):
        TokenStream.open(texts, "train", VOCAB)


# ---- Names of shards ----------------------------------------------------------------------------------------------


def write(directory, name, first, count=9):
    path = directory / name
    tokens = np.arange(first, first + count, dtype=np.uint16)
    np.save(path, tokens) if name.endswith(".npy") else shards.write_shard(path, tokens)
    return path


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_the_split_is_what_stands_before_the_number(suffix, tmp_path):
    for place, name in enumerate(("my_train_set_train", "my_train_set_val", "my_val_set_train")):
        write(tmp_path, f"{name}_000000.{suffix}", 100 * place)
    for name in ("my_train_notes_of_val.npy", "my_train_set_val.bin"):  # of no split for sure
        write(tmp_path, name, 900)
    assert TokenStream.open(tmp_path, "val", VOCAB).read(0, 9).tolist() == list(range(100, 109))
    assert TokenStream.open(tmp_path, "train", VOCAB).read(0, 18).tolist() == [*range(9), *range(200, 209)]
    assert len(names.find(tmp_path)) == 3


def test_the_shards_of_build_nanogpt_and_llmc_are_found_by_their_names(tmp_path):
    for name in ("edufineweb_{}.npy", "edu_fineweb_{}.bin", "tiny_stories_{}.bin"):
        (directory := tmp_path / name[:8]).mkdir()
        write(directory, name.format("val_000000"), 0)
        for number in (1, 2, 10):
            write(directory, name.format(f"train_{number:06d}"), 100 * number)
        assert TokenStream.open(directory, "val", VOCAB).read(0, 9).tolist() == list(range(9))
        stream = TokenStream.open(directory, "train", VOCAB)
        assert stream.read(0, len(stream))[::9].tolist() == [100, 200, 1000]


def test_what_stands_after_the_split_need_not_be_a_number(tmp_path):
    for place, name in enumerate(("x_train_a.bin", "x_train_b.npy", "a_train_x_val_train.2-of-2.bin")):
        write(tmp_path, name, 100 * place)
    assert foreign.what(tmp_path).kind == "data"
    assert TokenStream.open(tmp_path, "train", VOCAB).read(0, 18).tolist() == [*range(9), *range(100, 109)]
    assert TokenStream.open(tmp_path, "val", VOCAB).read(0, 9).tolist() == list(range(200, 209))


def test_a_manifest_says_the_split_of_a_shard_of_any_name(tmp_path):
    listed = {"a.bin": "train", "b_train_000000.bin": "val", "my_val.bin": "train"}
    for place, name in enumerate(listed):
        write(tmp_path, name, 100 * place)
    of = [{"file": name, "split": split, "sha256": ""} for name, split in listed.items()]
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": "gpt2", "shards": of}))
    assert TokenStream.open(tmp_path, "train", VOCAB).read(0, 18).tolist() == [*range(9), *range(200, 209)]
    assert TokenStream.open(tmp_path, "val", VOCAB).read(0, 9).tolist() == list(range(100, 109))
    for name in ("a.bin", "x" * 9000):
        (tmp_path / "a.bin").unlink(missing_ok=True)
        (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": "gpt2", "shards": [of[0] | {"file": name}]}))
        with pytest.raises(BadInput, match=f"must be there, missing {name[:80]}") as raised:
            TokenStream.open(tmp_path, "train", VOCAB)
        assert len(str(raised.value)) < 500


def test_a_set_called_train_keeps_its_validation_apart_from_prepare_on(tmp_path, capfd):
    out = tmp_path / "my_train_set"
    asked = PrepareConfig(out=str(out), tokenizer="bytes", workers=1, val_fraction=0.5, overwrite=True)
    manifest = prepare([str(ROOT / "engine" / "run")], asked)
    bare = {split: manifest["tokens"][split] for split in ("train", "val")}
    (out / "manifest.json").unlink()
    assert {split: len(TokenStream.open(out, split, 257)) for split in bare} == bare
    (kept := out / "a_train_log.bin").touch()
    prepare([str(ROOT / "engine" / "health")], asked)
    assert kept.exists()  # and is no shard
    assert run("verify", str(out)) == 0
    assert capfd.readouterr().out.endswith("all 3 whole\n")


def test_llmc_s_names_without_a_number_are_read_where_no_other_is(tmp_path):
    write(tmp_path, "tiny_shakespeare_train.bin", 0)
    write(tmp_path, "tiny_shakespeare_val.bin", 50)
    assert TokenStream.open(tmp_path, "train", VOCAB).read(0, 9).tolist() == list(range(9))
    assert TokenStream.open(tmp_path, "val", VOCAB).read(0, 9).tolist() == list(range(50, 59))
    write(tmp_path, "other_train.bin", 100)
    with pytest.raises(BadInput, match=r"must hold one set .* got other_train.bin, tiny_shakespeare_train.bin; p"):
        TokenStream.open(tmp_path, "train", VOCAB)
    write(tmp_path, "x_train_000000.bin", 200)
    assert TokenStream.open(tmp_path, "train", VOCAB).read(0, 9).tolist() == list(range(200, 209))


def test_nanogpt_s_files_without_a_header_are_read_and_said(tmp_path, capfd):
    for split, first in (("train", 300), ("val", 5)):
        np.arange(first, first + 9, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    stream = TokenStream.open(tmp_path, "train", VOCAB)
    assert stream.read(0, 9).tolist() == list(range(300, 309))
    assert stream.origin == ", nanoGPT's train.bin and val.bin, taken to be GPT-2's tokens"
    assert TokenStream.open(tmp_path, "val", VOCAB).read(0, 9).tolist() == list(range(5, 14))
    assert shards.tokenizer_name(tmp_path) == "gpt2"
    assert run("verify", str(tmp_path)) == 0
    np.array([60000] * 9, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(BadInput, match=r"train.bin: every token must be below the vocabulary size 50257, got 60000"):
        TokenStream.open(tmp_path, "train", VOCAB)


NOT_TOKENS = {
    "characters": (np.arange(90, dtype="<u2").tobytes(), "must be GPT-2's, got none above 89, as characters"),
    "an odd number of bytes": (b"\0" * 1025, "the magic number must be"),
    "a text": (b"Once upon a time.\n" * 100, "the magic number must be"),
    "a header of another kind": (np.array([20240522, *[0] * 300], "<i4").tobytes(), "the magic number must be"),
    "nothing": (b"", "the header must be 1024 bytes, got 0"),
}


@pytest.mark.parametrize("what", NOT_TOKENS)
def test_what_is_not_nanogpt_s_tokens_is_not_read_as_them(what, tmp_path):
    content, sentence = NOT_TOKENS[what]
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(sentence)):
        TokenStream.open(tmp_path, "train", VOCAB)


def test_nanogpt_s_characters_with_their_own_vocabulary_are_not_read(tmp_path):
    for split in ("train", "val"):
        np.arange(300, 400, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(BadInput, match=r"a vocabulary of its own \(meta.pkl\); make token shards of its text"):
        TokenStream.open(tmp_path, "train", VOCAB)
