"""gpt2 eval on a text file, on HellaSwag and on LAMBADA: what it prints, and what it refuses."""

import dataclasses
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import question_sets
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ENVIRONMENT, run

from engine import evaluation
from engine.commands import evaluating
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.run import export
from engine.tasks import text
from engine.tokens import tokenizer as tokenizers

MOST = 32  # positions of the run


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("questions")
    sets = question_sets.short().items()
    return {name: str(question_sets.write(folder / f"{name}.jsonl", records)) for name, records in sets}


def found(capfd, trained, *flags: str) -> dict:
    """The JSON that the command prints."""
    capfd.readouterr()
    assert run("eval", "--run", str(trained), "--json", *flags) == 0
    return json.loads(capfd.readouterr().out)


# ---- Text ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(count=st.integers(2, 300), most=st.integers(1, 40), data=st.data())
def test_every_token_but_the_first_is_predicted_once_with_the_context_that_the_stride_leaves(count, most, data):
    stride = data.draw(st.integers(1, most))
    tokens = np.arange(count, dtype=np.uint16)
    windows = text.requests(tokens, most, stride)
    predicted = [each.tokens[-each.count :] for each in windows]
    assert np.concatenate(predicted).tolist() == list(range(1, count))
    assert all(len(each.tokens) <= most + 1 and (np.diff(each.tokens) == 1).all() for each in windows)
    for each in windows[1:]:
        assert len(each.tokens) == most + 1  # all the context that the model reads
        assert each.count <= stride
    assert windows[0].tokens[0] == 0


@torch.no_grad()
def test_the_loss_of_a_text_file_is_that_of_its_tokens_one_by_one(trained, tmp_path, capfd):
    words = "def naïve(x):\n    return x  # “twice”\n" * 3
    (tmp_path / "text.txt").write_text(words)
    model, tokenizer, _ = export.load_model(trained)
    tokens = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(words).tolist()])
    for flags, stride in (([], MOST), (["--stride", "5"], 5)):
        nats, begin = 0.0, 1
        while begin < len(tokens):
            end = min(len(tokens), begin + (MOST if begin == 1 else stride))
            for place in range(begin, end):
                logits = model(tokens[None, max(0, end - MOST - 1) : place])[0, -1].double()
                nats -= float(logits.log_softmax(-1)[tokens[place]])
            begin = end
        figures = found(capfd, trained, "--data", str(tmp_path / "text.txt"), *flags)
        assert figures["loss"] == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)
        assert figures["tokens"] == figures["bytes"] == len(words.encode())
        assert figures["bits_per_byte"] == pytest.approx(nats / len(words.encode()) / math.log(2), abs=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_documents_are_divided_by_tokens_of_no_bytes_that_are_predicted(trained, tmp_path, capfd):
    lines = ['{"text": "abc"}', "", '{"text": ""}', '{"text": null}', '{"text": "défg"}', '{"text": " "}']
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    figures = found(capfd, trained, "--data", str(tmp_path / "two.jsonl"))
    assert (figures["tokens"], figures["bytes"]) == (3 + 1 + 5, 3 + 5)
    assert found(capfd, trained, "--data", str(tmp_path / "two.jsonl"), "--eval-tokens", "4")["bytes"] == 3


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_bytes_of_tokens_are_those_of_their_text(name):
    tokenizer = tokenizers.load(name)
    words = "Ünïcode, 日本語 and 🙂🙂 " + "many words, " * 50
    tokens, num_bytes = tokenizer.encode(words), len(words.encode("utf-8"))
    assert evaluation.num_bytes(tokens, tokenizer) == num_bytes
    with_ends = np.append(tokens, [tokenizer.end_of_text] * 2).astype(np.uint16)
    assert evaluation.num_bytes(with_ends, tokenizer) == num_bytes


def test_a_byte_of_the_validation_split_has_the_bits_of_its_loss(trained, capfd):
    figures = found(capfd, trained)
    assert figures["bits_per_byte"] == pytest.approx(
        figures["loss"] * figures["tokens"] / figures["bytes"] / math.log(2)
    )
    assert figures["tokens"] - 3 <= figures["bytes"] <= figures["tokens"]  # without the ends of documents


def test_a_damaged_checkpoint_is_passed_over_on_stderr_and_stdout_is_json_alone(trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "run")
    newer = tmp_path / "run" / "checkpoints" / "step_00000003"
    newer.mkdir()
    assert run("eval", "--run", str(tmp_path / "run"), "--json", "--eval-tokens", "64") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["step"] == 2
    assert printed.err.startswith(f"passing over {newer}: ")


# ---- Questions ----------------------------------------------------------------------------------------------------


def test_both_conventions_and_lambada_are_printed_with_counts_and_standard_errors(trained, files, capfd):
    flags = ["--hellaswag", files["hellaswag"], "--lambada", files["lambada"]]
    figures = found(capfd, trained, *flags)
    assert figures.keys() == {"run", "step", "hellaswag", "lambada"}  # no loss, which nobody asked for
    assert figures["hellaswag"].keys() == {"llm.c", "lm-eval"}
    for each in (*figures["hellaswag"].values(), figures["lambada"]):
        assert each["examples"] == 12
        assert each["acc_correct"] == each["acc"] * 12
        assert each["acc_stderr"] == pytest.approx(math.sqrt(each["acc"] * (1 - each["acc"]) / 11))
    assert run("eval", "--run", str(trained), *flags) == 0
    printed = capfd.readouterr().out
    one = figures["hellaswag"]["llm.c"]
    accuracies = [f"{name} {100 * one[name]:.2f}% +- {100 * one[f'{name}_stderr']:.2f}" for name in ("acc", "acc_norm")]
    assert f"  llm.c    {accuracies[0]} ({one['acc_correct']} right)  {accuracies[1]} " in printed
    assert f"perplexity of the last word {figures['lambada']['ppl']:.2f}\n" in printed
    assert max(map(len, printed.replace(str(trained), "run").splitlines())) <= 80
    few = found(capfd, trained, *flags, "--limit", "1", "--convention", "lm-eval", "--eval-tokens", "64")
    assert few["hellaswag"].keys() == {"lm-eval"}
    assert (few["lambada"]["examples"], few["lambada"]["acc_stderr"], few["tokens"]) == (1, None, 64)


GOOD = question_sets.short()
BAD = {
    "no JSON": ("hellaswag", '{"ind": 3', "no JSON"),
    "a list": ("hellaswag", "[1]", "a list instead of an object"),
    "a missing field": ("hellaswag", {"ctx_b": ...}, "no field ctx_b"),
    "three endings": ("hellaswag", {"endings": ["a", "b", "c"]}, "3 endings instead of 4"),
    "a label of 4": ("hellaswag", {"label": 4}, "the label 4 instead of 0 to 3"),
    "a label in words": ("hellaswag", {"label": "one"}, 'the label "one" instead of 0 to 3'),
    "no label, as in the test split": ("hellaswag", {"label": ...}, "no field label"),
    "an empty ending": ("hellaswag", {"endings": ["a", "b", "", "d"]}, "an empty ending"),
    "an ending of artefacts": ("hellaswag", {"endings": ["a", "b", "[step]", "d"]}, "an empty ending"),
    "bytes that are no UTF-8": ("lambada", b'{"text": "a \xff"}', "not UTF-8 at byte 12"),
    "a text of one word": ("lambada", {"text": "Hello"}, "does not end in a space and a word"),
    "a space at the end": ("lambada", {"text": "Hello you "}, "does not end in a space and a word"),
    "a number": ("lambada", {"text": 3}, "an integer in field text, which must be text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_line_that_is_no_example_is_named(case, trained, tmp_path, capfd):
    name, change, words = BAD[case]
    if isinstance(change, dict):
        change = json.dumps({key: value for key, value in (GOOD[name][1] | change).items() if value is not ...})
    line = change if isinstance(change, bytes) else change.encode()
    path = tmp_path / "set.jsonl"
    path.write_bytes(json.dumps(GOOD[name][0]).encode() + b"\n\n" + line + b"\n")
    assert run("eval", "--run", str(trained), f"--{name}", str(path)) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"{path}: line 3 must be a ")
    assert re.search(f"got .*{words}.*; mend the line or leave it out\n$", said), said
    assert run("eval", "--run", str(trained), f"--{name}", str(path), "--limit", "1") == 0  # which is good


@pytest.mark.parametrize("name", ["hellaswag", "lambada"])
def test_an_example_that_is_longer_than_the_model_reads_needs_another_model_and_no_mending(
    name, trained, tmp_path, capfd
):
    change = {"hellaswag": {"endings": ["a", "b", "c" * 40, "d"]}, "lambada": {"text": "a " + "c" * 40}}[name]
    path = question_sets.write(tmp_path / "set.jsonl", [GOOD[name][0] | change])
    assert run("eval", "--run", str(trained), f"--{name}", str(path)) == 2
    assert re.search(
        f"^{path}: line 1 must be a .* example that the model can read, got 41 tokens to predict where the model reads "
        "1 to 32; use a model with a longer --context, or another tokenizer\n$",
        capfd.readouterr().err,
    )


def test_files_and_flags_that_cannot_be_used_are_sentences(trained, tmp_path, capfd):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b" + bytes(60))
    (tmp_path / "one_bad_byte.txt").write_bytes(b"text \xff")
    (tmp_path / "empty.txt").write_text("")
    for flags, words in (
        (["--hellaswag", "nowhere.jsonl"], "one JSON object a line, got No such file"),
        (["--hellaswag", str(tmp_path)], "got a directory"),
        (["--hellaswag", str(tmp_path / "empty.jsonl")], "must hold at least one HellaSwag example, got none"),
        (["--lambada", str(tmp_path / "packed.jsonl")], "got gzip data; try: mv "),
        (["--data", "nowhere.txt"], "--data must be a directory of token shards or a text file, got nowhere.txt"),
        (["--data", str(tmp_path / "one_bad_byte.txt")], r"must hold text in UTF-8, got not UTF-8 at byte 5 of 6"),
        (["--data", str(tmp_path / "empty.txt")], "must hold text, got no document that is not empty"),
        (["--data", str(tmp_path / "empty.jsonl")], "must hold text, got no document"),
        (["--stride", "4"], "--stride must go with --data FILE, a text file, got no --data; leave it out"),
        (["--data", __file__, "--stride", "33"], "at most the 32 tokens that the model reads, got 33"),
        (["--limit", "4"], "--limit must go with --hellaswag or --lambada, got neither"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
    ):
        assert run("eval", "--run", str(trained), *flags) == 2, flags
        captured = capfd.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


# ---- Several processes --------------------------------------------------------------------------------------------


def test_ranks_must_hold_the_same_text_shards_examples_and_checkpoint(trained, shards, files, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    paths = {name: Path(shutil.copy(file, tmp_path)) for name, file in files.items()}
    text, own = tmp_path / "text.txt", tmp_path / "shards"
    shutil.copytree(shards, own)
    text.write_text("some words")
    seen = []

    def checked(self, facts, who):
        seen.append((who, facts))
        raise BadInput("looked at")

    def differs(*flags: str, change) -> set[str]:
        command, before = ["eval", "--run", str(tmp_path / "run"), *flags], len(seen)
        assert run(*command) == 2
        change()
        assert run(*command) == 2
        (who, first), (_, second) = seen[before:]
        assert who == "eval"
        return {name for name in first if first[name] != second[name]}

    def swap(path: Path, old: bytes, new: bytes) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    monkeypatch.setattr(Ranks, "check_alike", checked)
    questions = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    assert differs(*questions, change=lambda: swap(paths["lambada"], b"from", b"form")) == {"lambada examples"}
    lm_eval = {"hellaswag examples lm-eval"}  # the first "self" is in ctx_b
    assert differs(*questions, change=lambda: swap(paths["hellaswag"], b"self", b"this")) == lm_eval
    assert differs("--data", str(text), change=lambda: text.write_text("some worms")) == {"tokens of the loss"}
    (shard,) = own.glob("*val*.bin")
    content = bytearray(shard.read_bytes())
    content[-64:] = bytes(64)  # the manifest still says the same
    change = partial(shard.write_bytes, content)
    assert differs("--data", str(own), "--eval-tokens", "1000000", change=change) == {"tokens of the loss"}
    manifest = tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json"
    assert differs(*questions, change=lambda: swap(manifest, b"{", b"{ ")) == {"checkpoint"}


def test_every_rank_takes_the_checkpoint_that_the_first_one_found(trained, monkeypatch):
    theirs, looked = export.find(trained, print, False), []
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [None, value])
    monkeypatch.setattr(Ranks, "broadcast_object", lambda self, value: theirs)
    monkeypatch.setattr(export, "find", lambda *args: looked.append(args))
    second = Ranks(1, 1, 2, torch.device("cpu"))
    assert evaluating._checkpoint(evaluating.Evaluate(run="nowhere"), second) is theirs
    assert looked == []
    subject = evaluating._load(theirs, second)
    assert subject.checkpoint is theirs
    with pytest.raises(BadInput, match=r"checkpoint: must be a directory such as .*, got nowhere"):
        evaluating._load(dataclasses.replace(theirs, path=Path("nowhere")), second)


@pytest.mark.slow
def test_two_hosts_with_other_files_at_the_same_paths_are_told_which_and_a_newer_checkpoint_of_one_is_not_taken(
    trained, files, tmp_path
):
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        shutil.copytree(trained, host / "run")
        shutil.copy(files["lambada"], host / "set.jsonl")
    shutil.copytree(trained / "checkpoints" / "step_00000002", hosts[1] / "run" / "checkpoints" / "step_00000003")
    flags = ["--run", "run", "--json", "--lambada", "set.jsonl"]

    def together() -> list[tuple[int, str, str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "engine.cli", "eval", *flags],
                env=ENVIRONMENT | where | {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
                **{"cwd": host, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
            )
            for rank, host in enumerate(hosts)
        ]
        outputs = [rank.communicate(timeout=120) for rank in ranks]
        return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]

    first, second = together()
    assert (first[0], second[0], second[1]) == (0, 0, ""), (first, second)
    assert json.loads(first[1])["step"] == 2
    lines = (hosts[1] / "set.jsonl").read_text().splitlines(keepends=True)
    (hosts[1] / "set.jsonl").write_text("".join(lines[1:]))
    for code, out, said in together():
        assert (code, out) == (2, "")
        assert re.search(r"eval: every rank .* differ\n  lambada examples: \w{12} on rank 0; \w{12} on rank 1\n", said)


@pytest.mark.slow
def test_two_processes_print_what_one_does(trained, files, tmp_path, capfd):
    flags = ["--run", str(trained), "--hellaswag", files["hellaswag"], "--lambada", files["lambada"], "--json"]
    flags += ["--data", str(ROOT / "pyproject.toml")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "--", "engine.cli", "eval", *flags]  # without -- torchrun takes --run for its own
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found(capfd, trained, *flags[2:])
    command[-1] = str(tmp_path / "nowhere")
    failed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert failed.returncode != 0
    assert 'Traceback (most recent call last):\n  File "engine' not in failed.stderr
    assert "--data must be a directory of token shards or a text file" in failed.stderr
