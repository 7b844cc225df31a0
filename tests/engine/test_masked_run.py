"""--document-mask: a run trained with it is evaluated, sampled and resumed with it, as its config says."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, newest, run, train

from engine import config, evaluation
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.run import checkpoint, export, plots
from engine.tokens.prepare import PrepareConfig, prepare
from engine.tokens.shards import TokenStream
from engine.tuning import choices
from engine.tuning.record import Setup
from model.gpt2 import GPT2

FLAGS = ["--num-steps", "4", "--eval-every", "2", "--save-every", "2", "--keep-last", "9", "--optim.lr", "1e-2"]
MASK = ["--document-mask", "--document-positions"]
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "draw", lambda *_: [])  # pictures cost more than the steps
        yield


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory) -> Path:
    """Token shards of documents of 6 to 25 bytes, less than the model's context of 32."""
    folder = tmp_path_factory.mktemp("short")
    lines = [json.dumps({"text": f"line {number} " * (1 + number % 3)}) for number in range(800)]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    options = PrepareConfig(out=str(folder / "shards"), tokenizer="bytes", workers=1, val_fraction=0.2)
    prepare([str(folder / "documents.jsonl")], options)
    return folder / "shards"


@pytest.fixture(scope="module")
def masked(short_documents, tmp_path_factory) -> Path:
    """A run of four steps with the mask. Tests share it and must not change it."""
    out = tmp_path_factory.mktemp("runs") / "masked"
    assert train(out, short_documents, *FLAGS, *MASK) == 0
    return out


def loss_of(model: GPT2, shards: Path) -> float:
    text = TokenStream.open(str(shards), "val", 257)
    return evaluation.mean_loss(model, text, evaluation.windows(text, 32, 512), 32, ALONE)


def test_validation_and_eval_have_the_mask_that_the_run_trained_with(masked, short_documents, capfd):
    validated = checkpoint.read(newest(masked)).state["val_loss"]
    model, tokenizer, _ = export.load_model(masked)
    assert (model.end_of_text, model.restarts_positions) == (tokenizer.end_of_text, True)
    assert loss_of(model, short_documents) == validated
    assert run("eval", "--run", str(masked)) == 0
    printed = re.search(r"at step 4 with its document mask: loss (\d\.\d{4}) ", capfd.readouterr().out)[1]
    assert float(printed) == pytest.approx(validated, abs=1e-4)
    assert run("eval", "--run", str(masked), "--json") == 0
    assert json.loads(capfd.readouterr().out)["document_mask"] is True
    model.mask_documents(tokenizer.end_of_text, restarts_positions=False)
    assert abs(loss_of(model, short_documents) - validated) > 1e-3
    model.mask_documents(None)
    assert abs(loss_of(model, short_documents) - validated) > 1e-3


def test_a_text_is_scored_with_the_mask_too(masked, tmp_path, capfd):
    """A line repeated as documents of its own costs what it costs once."""
    losses = []
    for count in (1, 3):
        (tmp_path / "lines.jsonl").write_text('{"text": "line 7"}\n' * count)
        assert run("eval", "--run", str(masked), "--data", str(tmp_path / "lines.jsonl"), "--json") == 0
        found = json.loads(capfd.readouterr().out)
        losses.append(found["loss"] * found["tokens"])
    once, thrice = losses
    model, tokenizer, _ = export.load_model(masked)
    tokens = torch.tensor([[tokenizer.end_of_text, *b"line 7"]])
    end = -model(tokens)[0, -1].log_softmax(-1)[tokenizer.end_of_text].item()
    assert thrice == pytest.approx(3 * once + 2 * end, rel=1e-5)


def test_a_masked_run_resumes_to_the_bit(masked, short_documents, tmp_path):
    shutil.copytree(masked, tmp_path / "stopped")
    shutil.rmtree(newest(tmp_path / "stopped"))
    assert train(tmp_path / "stopped", short_documents, *FLAGS, *MASK) == 0
    assert_same_run(masked, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ([], "document_mask True -> False\n  document_positions True -> False"),
        (["--document-mask"], "document_positions True -> False"),
    ],
    ids=["no mask", "positions go on"],
)
def test_another_mask_is_refused_on_resume(masked, short_documents, capfd, flags, changes):
    assert train(masked, short_documents, *FLAGS, *flags, "--num-steps", "5") == 2
    error = capfd.readouterr().err
    assert f"but these changed\n  {changes}\n" in error
    assert "add --resume-changed" in error


def test_a_run_says_that_it_masks_and_another_does_not(masked, short_documents, trained, tmp_path, capfd):
    flags = ["--num-steps", "1", "--eval-every", "None"]
    assert train(tmp_path / "on", short_documents, *flags, "--document-mask") == 0
    assert "\ndocuments: attention stays inside each, positions go on\n" in capfd.readouterr().out
    assert train(tmp_path / "off", short_documents, *flags) == 0
    assert "documents:" not in capfd.readouterr().out
    assert run("eval", "--run", str(trained)) == 0
    assert "mask" not in capfd.readouterr().out


def test_an_attention_tuned_without_a_mask_is_left_out():
    plain, tuned = TrainConfig(), Setup("fp32", 1, ops={"attention": "math"})
    for train_config, expected in ((plain, "math"), (dataclasses.replace(plain, document_mask=True), "torch")):
        ops = choices.ops(train_config, "fp32", ALONE, tuned)
        assert ops.choices[0].implementation == expected


def test_restarted_positions_need_the_mask(short_documents, capfd):
    assert run("train", "tiny", "--data", str(short_documents), "--document-positions") == 2
    assert "--document-positions must go with --document-mask, got none; add it" in capfd.readouterr().err


def test_configs_and_checkpoints_from_before_the_mask_load_without_one(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / config.CONFIG_FILE).read_text())
    assert saved.pop("document_mask") is saved.pop("document_positions") is False
    (tmp_path / "run" / config.CONFIG_FILE).write_text(json.dumps(saved))
    assert config.load(tmp_path / "run").document_mask is False
    found = export.find(tmp_path / "run", print, is_best=False)
    for name in ("document_mask", "document_positions"):
        del found.state["config"][name]
    assert export.load(found)[0].end_of_text is None
    found.state["config"]["document_mask"] = "yes"
    with pytest.raises(BadInput, match="must hold the config of the run that made it"):
        export.load(found)
