"""Command line: help without PyTorch; bad input gives a sentence, exit code 2 and no partial files."""

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from runs import run

from engine import cli
from engine.run import checkpoint
from kernels import dispatch

# ---- Help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS), ["train", "gpt2-xl"]], ids=" ".join)
def test_help_needs_no_torch_and_exits_with_0(command):
    # Importing PyTorch is what makes help slow. Seconds depend on the machine, so the test looks for the import.
    code = (
        "import sys\nfrom engine import cli\n"
        f"try: code = cli.main({[*command, '--help']!r})\n"
        "except SystemExit as done: code = done.code\n"
        "sys.exit(code or ('torch' in sys.modules and 9) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: gpt2" in done.stdout


def test_every_command_is_in_the_summary(capsys):
    assert run("--help") == 0
    output = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", output, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "name",
    [
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "engine" / "commands").glob("[a-z]*.py"))),
        "engine/config/fields.py",
        "engine/tokens/preparation/options.py",
        "model/presets.py",
    ],
)
def test_every_flag_is_explained_where_help_looks_for_it(name):
    # Help shows the comment above a field, or on its line. A formatter that wraps the line would hide it.
    source = (ROOT / name).read_text()
    classes = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name not in ("Encoded", "Subject")
    ]
    fields = [field for kind in classes for field in kind.body if isinstance(field, ast.AnnAssign)]
    assert fields
    for field in fields:
        nested = field.value is not None and "default_factory" in ast.unparse(field.value)
        above, line = source.splitlines()[field.lineno - 2 : field.lineno]
        is_explained = "  # " in line or above.strip().startswith("# ")
        assert nested or (field.end_lineno == field.lineno and is_explained), line


# ---- Bad input ----------------------------------------------------------------------------------------------------

BAD = {
    "nothing to verify": (["verify"], "a path must be given"),
    "verify of neither": (["verify", "."], "made by gpt2 prepare, or of a run"),
    "unknown command": (["trian"], 'did you mean "train"?'),
    "no preset": (["train"], "a preset must come first"),
    "unknown preset": (["train", "gpt2-mediun"], 'did you mean "gpt2-medium"?'),
    "unknown flag": (["train", "tiny", "--micro-batch", "3"], "--micro-batch-size"),
    "word for a number": (["train", "tiny", "--num-steps", "many"], "many"),
    "unknown precision": (["train", "tiny", "--precision", "bf15"], "bf16"),
    "several problems": (["train", "tiny", "--num-steps", "0", "--context", "999"], "--num-steps must be at least 1"),
    "context longer than positions": (
        ["train", "gpt2", "--context", "1025"],
        "--context must be at most the model's 1024",
    ),
    "heads that do not divide": (["train", "tiny", "--model.n-head", "3"], "multiple of n_head"),
    "data is not there": (["train", "tiny", "--data", "nowhere"], "make one with gpt2 prepare"),
    "source is not there": (["prepare", "nowhere", "--out", "x"], "got nowhere"),
    "no source": (["prepare", "--out", "x"], "a source must be given"),
    "no such run": (["sample", "--run", "nowhere", "--prompt", "x"], "made by gpt2 train"),
    "no such weights": (["import", "nowhere/here", "--out", "x"], "nowhere/here"),
    "export of no run": (["export", "--run", "nowhere", "--out", "x"], "made by gpt2 train"),
    "plot of no run": (["plot", "--run", "nowhere"], "made by gpt2 train"),
    "eval of no run": (["eval", "--run", "nowhere"], "made by gpt2 train"),
}


@pytest.mark.parametrize(("args", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_a_sentence_and_leaves_nothing(args, sentence, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(*args) == 2
    captured = capfd.readouterr()
    assert sentence in re.sub(r"\s*│\s*", " ", captured.err + captured.out)  # tyro draws a box around its messages
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


RUN_BAD = {
    "batch that does not divide": (["--tokens-per-step", "1000"], "the nearest --tokens-per-step are"),
    "micro-batch that does not divide": (["--micro-batch-size", "3"], "the nearest --micro-batch-size 2 and 4"),
    "more than the corpus": (["--tokens-per-step", "2097152"], "lower --tokens-per-step to at most"),
    "tokenizer that differs": (["--model.vocab-size", "50257"], "tokenizer bytes"),
    "triton on a CPU": (["--kernels", "triton"], "attention cannot: no CUDA device"),
    "tf32 on a CPU": (["--precision", "tf32"], "use fp32"),
    "weights that are not there": (["--init-from", "./nowhere"], "nowhere"),
    "checkpoint that is not there": (["--resume", "nowhere"], "must be a directory such as"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are good input on a GPU")
@pytest.mark.parametrize(("flags", "sentence"), RUN_BAD.values(), ids=RUN_BAD)
def test_bad_training_input_is_a_sentence_and_leaves_no_checkpoint(
    flags, sentence, shards, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)  # as outside this test suite
    out = tmp_path / "run"
    assert run("train", *SMALL, "--data", str(shards), "--out", str(out), *flags) == 2
    assert sentence in capfd.readouterr().err
    assert not (out / "checkpoints").exists()
    assert not (out / "config.json").exists()


SHARD_HARMS = {
    "cut short": (lambda content: content[:-2], "the file is cut short or damaged"),
    "foreign": (lambda content: b"\x7fELF" + content[4:], "the magic number must be 20240520"),
    "of another version": (lambda content: content[:4] + b"\x02" + content[5:], "the version must be 1, got 2"),
    "empty": (lambda content: b"", "the header must be 1024 bytes, got 0"),
    "with a token over the vocabulary": (lambda content: content[:1024] + b"\xff\xff" + content[1026:], "got 65535"),
    "of another corpus": (
        lambda content: content[:8] + b"\1\0\0\0" + content[12:1026],
        "tokens of manifest.json, got 1",
    ),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("harm", "sentence"), SHARD_HARMS.values(), ids=SHARD_HARMS)
def test_a_shard_that_is_no_good_is_refused_before_the_first_step(shards, tmp_path, capfd, split, harm, sentence):
    shutil.copytree(shards, tmp_path / "data")
    (bad,) = (tmp_path / "data").glob(f"*_{split}_*.bin")
    bad.write_bytes(harm(bad.read_bytes()))
    assert run("train", *SMALL, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")) == 2
    output = capfd.readouterr().err
    assert str(bad) in output
    assert sentence in output
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("listed", [False, True], ids=["as it is", "with a manifest to match"])
@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST])
def test_a_malicious_pickle_in_a_checkpoint_is_refused_and_does_not_run(trained, shards, tmp_path, name, listed):
    out, mark = tmp_path / "run", tmp_path / "it ran"
    shutil.copytree(trained, out)
    (path,) = out.glob(f"checkpoints/*/{name}")
    path.write_bytes(pickle.dumps(Bomb(mark)))
    if listed and name != checkpoint.MANIFEST:
        manifest = json.loads((path.parent / checkpoint.MANIFEST).read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
        (path.parent / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert run("train", *SMALL, "--data", str(shards), "--out", str(out), "--num-steps", "3") == 2
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # loading it would have run it


def test_an_out_that_is_a_file_is_refused_and_kept(shards, tmp_path, capfd):
    (tmp_path / "taken").write_text("mine")
    assert run("train", *SMALL, "--data", str(shards), "--out", str(tmp_path / "taken")) == 2
    assert "must be a directory that can be written" in capfd.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").write_text(" \n")
    assert run("prepare", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes") == 2
    assert "1 empty" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_whose_checkpoints_are_all_bad_names_the_way_out(trained, shards, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for path in out.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert run("train", *SMALL, "--data", str(shards), "--out", str(out), "--num-steps", "3") == 2
    output = capfd.readouterr().err
    assert "model.safetensors must have" in output
    assert "--resume never" in output
