"""Positions that no update used: sampling, evaluation and export leave them out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import newest, run, train

from engine import config, evaluation
from engine.distributed import Ranks
from engine.run import checkpoint, export, plots
from engine.tokens.shards import TokenStream
from model.gpt2 import GPT2, GPT2Config
from model.pretrained import released_views

TRAINED, PRESENT = 8, 32
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def short(shards, tmp_path_factory) -> Path:
    """A run of a model of 32 positions on a context of 8. Tests share it and must not change it."""
    out = tmp_path_factory.mktemp("runs") / "short"
    flags = ["--context", "8", "--num-steps", "160", "--eval-every", "None", "--sample-tokens", "40"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "draw", lambda *_: [])  # pictures cost more than the steps
        assert train(out, shards, *flags, "--optim.lr", "1e-2", "--micro-batch-size", "32") == 0
    return out


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda *_: [])


def whole_model(out: Path) -> GPT2:
    """The newest checkpoint's model with all of its positions."""
    saved = checkpoint.read(newest(out))
    model = GPT2(GPT2Config(**saved.state["identity"]["model"]))
    checkpoint.load_weights(saved, model)
    return model.eval()


def state(out: Path) -> dict:
    return checkpoint.read(newest(out)).state


def test_eval_uses_trained_positions_alone_and_the_others_would_cost_much(short, shards, capfd):
    assert run("eval", "--run", str(short)) == 0
    printed = float(re.search(r"at step 160: loss (\d\.\d{4}) ", capfd.readouterr().out)[1])
    assert printed == pytest.approx(state(short)["val_loss"], abs=1e-4)
    text = TokenStream.open(str(shards), "val", 257)
    losses = [
        evaluation.mean_loss(whole_model(short), text, evaluation.windows(text, T, 2048), T, ALONE)
        for T in (TRAINED, PRESENT)
    ]
    assert losses[1] > losses[0] + 0.2  # though more context would help a model that had learned to use it


def test_eval_of_a_context_that_this_checkpoint_was_not_trained_on_takes_the_shorter(short, tmp_path, capfd):
    shutil.copytree(short, tmp_path / "run")
    fields = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(fields | {"context": None}))
    assert config.load(tmp_path / "run").sequence_length == PRESENT
    assert run("eval", "--run", str(tmp_path / "run")) == 0
    assert float(re.search(r"loss (\d\.\d{4}) ", capfd.readouterr().out)[1]) == pytest.approx(
        state(short)["val_loss"], abs=1e-4
    )


def test_samples_read_the_run_s_context_while_training_and_afterwards(short, capfd):
    prompt = torch.tensor([list(b"def ")])
    options = {"temperature": 0.8, "top_k": 50, "seed": 1}
    wanted, others = (
        bytes(whole_model(short).generate(prompt, 40, **options, context=T)[0]).decode(errors="replace")
        for T in (TRAINED, PRESENT)
    )
    assert wanted != others
    assert (short / "samples.txt").read_text() == f"=== step 160 ===\n{wanted}\n\n"
    assert run("sample", "--run", str(short), "--prompt", "def ", "--max-new-tokens", "40", "--seed", "1") == 0
    assert capfd.readouterr().out == f"{wanted}\n"


def test_a_prompt_longer_than_what_was_trained_is_told_both_numbers(short, capfd):
    assert run("sample", "--run", str(short), "--prompt", "123456789") == 2
    assert capfd.readouterr().err == (
        "sample: --prompt must be 1 to 8 bytes long, got 9: of the model's 32 positions 8 were trained\n"
    )


def test_an_export_has_the_trained_positions_and_transformers_computes_the_same(short, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    assert run("export", "--run", str(short), "--out", str(out)) == 0
    fields, tokenizer = (json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert (fields["n_positions"], fields["n_ctx"], tokenizer["model_max_length"]) == (TRAINED, TRAINED, TRAINED)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
    ids = torch.tensor([list(b"def main")])
    torch.testing.assert_close(whole_model(short)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        GPT2.from_pretrained(out)(torch.zeros(1, 9, dtype=torch.int64))


# ---- What counts as trained ---------------------------------------------------------------------------------------


def trained_after(out: Path, shards: Path, steps: int, context: int, *flags: str) -> int:
    assert train(out, shards, "--num-steps", str(steps), "--context", str(context), "--eval-every", "None", *flags) == 0
    return state(out)["trained_positions"]


def test_the_longest_context_of_a_run_s_past_counts(short, shards, tmp_path):
    out, changed = tmp_path / "run", ["--resume-changed", "--optim.lr", "1e-2", "--sample-tokens", "40"]
    shutil.copytree(short, out)
    assert state(out)["trained_positions"] == TRAINED
    assert trained_after(out, shards, 161, 16, *changed) == 16
    assert trained_after(out, shards, 162, 4, *changed) == 16
    assert trained_after(tmp_path / "next", shards, 1, 4, "--init-from", str(out)) == 16
    assert trained_after(tmp_path / "next", shards, 2, 4, "--init-from", str(out)) == 16  # resumed


def test_all_positions_of_imported_weights_count(shards, tmp_path):
    model = GPT2(GPT2Config(2, 2, 64, PRESENT, 257))
    model.save_pretrained(tmp_path / "hf")
    assert run("import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")) == 0
    assert state(tmp_path / "run")["trained_positions"] == PRESENT
    for source in ("hf", "run"):
        assert trained_after(tmp_path / f"of {source}", shards, 1, 4, "--init-from", str(tmp_path / source)) == PRESENT


def test_a_checkpoint_older_than_the_count_has_its_run_s_context(short):
    saved = checkpoint.read(newest(short))
    del saved.state["trained_positions"]
    assert export.trained_positions(saved) == TRAINED
    assert (
        export.trained_positions(checkpoint.Checkpoint(saved.path, saved.state | {"trained_positions": 99})) == PRESENT
    )


def test_a_cropped_model_computes_the_same_where_it_still_has_positions(short):
    whole, cropped = whole_model(short), whole_model(short)
    cropped.crop(TRAINED)
    tokens = torch.arange(2 * TRAINED).view(2, TRAINED)
    assert torch.equal(cropped(tokens), whole(tokens))
    assert cropped.config.n_positions == TRAINED == len(released_views(cropped)["wpe.weight"])
    assert cropped.wpe.weight.requires_grad
