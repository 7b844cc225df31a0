"""Commands on an existing run: sample, export, import, eval and plot."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from runs import run

from engine.run import checkpoint
from engine.tokens.shards import tokenizer_name
from model.gpt2 import GPT2, GPT2Config

# ---- Sampling -----------------------------------------------------------------------------------------------------


def sample(trained: Path, *flags: str) -> int:
    return run("sample", "--run", str(trained), "--max-new-tokens", "20", *flags)


def test_samples_are_repeatable_and_different_from_each_other(trained, capfd):
    outputs = []
    for _ in range(2):
        assert sample(trained, "--prompt", "def ", "--seed", "1", "--num-samples", "2", "--top-p", "0.95") == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1]
    _, first, second = re.split(r"--- sample \d of 2 ---\n", outputs[0])
    assert first.startswith("def ")
    assert first.strip() != second.strip()


def test_samples_of_a_batch_are_those_of_their_seeds_alone_and_end_before_a_stop_string(trained, capfd):
    flags = ["--prompt", "def ", "--repetition-penalty", "1.1", "--min-p", "0.01"]

    def printed(*more: str) -> str:
        assert sample(trained, *flags, *more) == 0
        return capfd.readouterr().out

    alone = [printed("--seed", str(seed)) for seed in range(3, 21)]
    headings = [f"--- sample {number} of 18 ---\n" for number in range(1, 19)]
    together = printed("--seed", "3", "--num-samples", "18")
    assert together == "\n".join(heading + text for heading, text in zip(headings, alone, strict=True))
    stop = alone[0][9:11]
    cut = ["def " + text.removesuffix("\n").removeprefix("def ").partition(stop)[0] for text in alone]
    assert printed("--seed", "3", "--stop", stop) == f"{cut[0]}\n"
    assert printed("--seed", "3", "--stop", "nowhere", stop, "--num-samples", "2") == (
        f"--- sample 1 of 2 ---\n{cut[0]}\n\n--- sample 2 of 2 ---\n{cut[1]}\n"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        pytest.param(["--prompt", ""], "must be 1 to 32 bytes long, got 0", id="empty prompt"),
        pytest.param(["--prompt", "x" * 33], "must be 1 to 32 bytes long, got 33", id="prompt too long"),
        pytest.param(
            ["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0", id="negative temperature"
        ),
        pytest.param(["--prompt", "x", "--top-k", "0"], "top_k must be at least 1", id="no choice"),
        pytest.param(
            ["--prompt", "x", "--top-p", "2"], "top_p must be above 0 and at most 1", id="too much probability"
        ),
        pytest.param(["--prompt", "x", "--min-p", "2"], "min_p must be 0 to 1, got 2.0", id="min_p"),
        pytest.param(
            ["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty must be 0.01 to 100", id="penalty"
        ),
        pytest.param(["--prompt", "x", "--stop", "a", ""], "--stop must be strings of at least", id="empty stop"),
        pytest.param(["--prompt", "x", "--num-samples", "0"], "--num-samples must be at least 1", id="no samples"),
    ],
)
def test_bad_sampling_input_is_a_sentence(trained, flags, sentence, capfd):
    assert sample(trained, *flags) == 2
    captured = capfd.readouterr()
    assert sentence in captured.err
    assert captured.out == ""


def test_samples_stream_as_they_are_drawn(trained):
    command = [sys.executable, "-m", "engine.cli", "sample", "--run", str(trained), "--prompt", "d"]
    command += ["--max-new-tokens", "100000", "--temperature", "1", "--seed", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    first = process.stdout.read(8)  # without streaming this would wait minutes for all 100,000 tokens
    began = time.monotonic()
    process.stdout.close()  # as `| head -c 8` does
    assert process.wait(timeout=30) == 0
    assert time.monotonic() - began < 30
    assert first.startswith(b"d")


# ---- Weights in and out -------------------------------------------------------------------------------------------


def test_a_run_exported_and_imported_is_the_same_model(trained, tmp_path, capfd):
    assert run("export", "--run", str(trained), "--out", str(tmp_path / "hf")) == 0
    assert run("import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")) == 0
    outputs = []
    for directory in (trained, tmp_path / "run"):
        capfd.readouterr()
        assert sample(directory, "--prompt", "def ", "--seed", "5") == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1]


def test_an_exported_run_opens_in_transformers_and_says_the_same(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert run("export", "--run", str(trained), "--out", str(tmp_path / "hf")) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    ours = GPT2.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([tokenizer("def main(argv):")["input_ids"]])
    assert ids.tolist()[0] == list(b"def main(argv):")
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_imported_weights_are_trained_from_with_init_from(shards, tmp_path, capfd):
    torch.manual_seed(0)
    GPT2(GPT2Config(2, 2, 64, 32, 257)).save_pretrained(tmp_path / "hf")
    assert run("import", str(tmp_path / "hf"), "--out", str(tmp_path / "imported")) == 0
    flags = ["train", *SMALL, "--data", str(shards), "--num-steps", "1"]
    assert run(*flags, "--out", str(tmp_path / "imported")) == 2
    assert "--init-from" in capfd.readouterr().err
    losses = []
    for source in ("hf", "imported"):
        assert run(*flags, "--out", str(tmp_path / source / "tuned"), "--init-from", str(tmp_path / source)) == 0
        losses.append(capfd.readouterr().out.split("final validation loss ")[1].split()[0])
    assert losses[0] == losses[1]


def test_out_directories_that_hold_something_are_left_alone(trained, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert run("export", "--run", str(trained), "--out", str(tmp_path / "full")) == 2
    assert run("import", str(trained), "--out", str(tmp_path / "full")) == 2
    assert capfd.readouterr().err.count("must be new or empty") == 2
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


# ---- The best one -------------------------------------------------------------------------------------------------


@pytest.fixture
def worsened(trained, tmp_path) -> Path:
    """A copy of the run, whose best step is 2, with a checkpoint of step 3 that has a higher loss."""
    shutil.copytree(trained, tmp_path / "worsened")
    state = checkpoint.newest(trained, print).state
    torch.manual_seed(3)
    model = GPT2(GPT2Config(**state["identity"]["model"]))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # so that its samples differ, though neither has learned much
    checkpoint.save(tmp_path / "worsened", state | {"step": 3, "val_loss": state["val_loss"] + 1}, model, None, 9)
    return tmp_path / "worsened"


def test_best_samples_the_checkpoint_with_the_lowest_loss(trained, worsened, capfd):
    outputs = []
    for directory, flags in ((trained, []), (worsened, ["--best"]), (worsened, [])):
        assert sample(directory, "--prompt", "def ", "--seed", "5", *flags) == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_best_evaluates_the_checkpoint_with_the_lowest_loss(trained, worsened, capfd):
    losses = []
    for directory, flags, step in ((trained, [], 2), (worsened, ["--best"], 2), (worsened, [], 3)):
        assert run("eval", "--run", str(directory), *flags) == 0
        losses.append(re.search(rf"at step {step}: loss (\d+\.\d{{4}}) ", capfd.readouterr().out).group(1))
    assert losses[0] == losses[1] != losses[2]


def test_best_exports_the_checkpoint_with_the_lowest_loss(trained, worsened, tmp_path):
    for name, directory, flags in (("own", trained, []), ("best", worsened, ["--best"]), ("newest", worsened, [])):
        assert run("export", "--run", str(directory), "--out", str(tmp_path / name), *flags) == 0
    own, best, newest = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "best", "newest"))
    assert own == best != newest


@pytest.mark.parametrize("command", [["sample", "--prompt", "x"], ["eval"], ["export", "--out", "hf"]], ids=" ".join)
def test_best_of_a_run_without_a_validation_loss_is_a_sentence(command, tmp_path, monkeypatch, capfd):
    GPT2(GPT2Config(1, 1, 8, 8, 257)).save_pretrained(tmp_path / "weights")
    assert run("import", str(tmp_path / "weights"), "--out", str(tmp_path / "run")) == 0
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert run(*command, "--run", "run", "--best") == 2
    captured = capfd.readouterr()
    assert captured.err == (
        "run: run must hold a checkpoint with a validation loss to have a best one, got none; leave out --best to take "
        "the newest, of step 0\n"
    )
    assert captured.out == ""
    assert not (tmp_path / "hf").exists()


# ---- Evaluation and plots -----------------------------------------------------------------------------------------


def test_eval_prints_the_run_s_own_validation_loss(trained, capfd):
    assert run("eval", "--run", str(trained)) == 0
    loss = re.search(r"at step 2: loss (\d\.\d{4}) nats per byte, perplexity", capfd.readouterr().out).group(1)
    assert f'"val_loss": {loss[:4]}' in (trained / "metrics.jsonl").read_text()


def test_plot_draws_both_pictures_again(trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run").glob("*.png"):
        path.unlink()
    assert run("plot", "--run", str(tmp_path / "run")) == 0
    pictures = [Path(line) for line in capfd.readouterr().out.split()]
    assert [path.name for path in pictures] == ["loss_curve.png", "lr_schedule.png"]
    assert all(path.parent == tmp_path / "run" and path.is_file() for path in pictures)


def test_a_prepared_corpus_trains(tmp_path, capfd):
    (tmp_path / "text.md").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    out = tmp_path / "shards"
    assert run("prepare", str(tmp_path / "text.md"), "--out", str(out), "--tokenizer", "bytes", "--workers", "1") == 0
    assert "validation by the tail of each document" in capfd.readouterr().out
    assert tokenizer_name(out) == "bytes"
    assert run("train", *SMALL, "--data", str(out), "--out", str(tmp_path / "run"), "--num-steps", "1") == 0
    assert checkpoint.newest(tmp_path / "run", print).step == 1
