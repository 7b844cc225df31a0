"""--init-from gives a model the sizes of its weights; only a flag that disagrees is refused, by its name."""

import dataclasses
import json
import shutil

import pytest
import runs
import torch

from engine import config, sizes
from engine.config import PRESETS, parse
from engine.errors import BadInput
from model.gpt2 import GPT2, GPT2Config

THEIRS = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 32, "vocab_size": 257}  # of the fixture `trained`
WORK = ["--tokens-per-step", "256", "--micro-batch-size", "4", "--num-steps", "1", "--sample-tokens", "4"]


def of(train: config.TrainConfig) -> dict[str, int]:
    return {name: getattr(train.model, name) for name in sizes.NAMES}


def test_weights_give_the_model_their_sizes_and_nothing_else_of_the_preset_changes(trained, tmp_path):
    for preset in ("gpt2", "mini"):
        out = str(tmp_path / "new")
        asked = parse([preset, "--init-from", str(trained), "--out", out], "gpt2 train")
        model = dataclasses.replace(PRESETS[preset].model, **THEIRS)
        assert asked == dataclasses.replace(PRESETS[preset], init_from=str(trained), out=out, model=model)


def test_a_preset_s_shorter_context_stays():
    asked = parse(["small", "--init-from", "openai-community/gpt2-medium"], "gpt2 train")
    assert of(asked) == of(PRESETS["gpt2-medium"])
    assert asked.sequence_length == PRESETS["small"].model.n_positions
    assert parse(["small", "--init-from", "gpt2", "--context", "512"], "gpt2 train").sequence_length == 512


def test_a_directory_in_the_hugging_face_layout_gives_its_sizes_and_padding_is_no_token(tmp_path):
    fields = THEIRS | {"vocab_size": 50304, "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert sizes.of_weights(str(tmp_path)) == THEIRS | {"vocab_size": 50304}
    assert of(parse(["gpt2", "--init-from", str(tmp_path)], "gpt2 train")) == THEIRS | {"vocab_size": 50257}
    for damaged in ("[]", "{", json.dumps(fields | {"n_layer": "2"})):
        (tmp_path / "config.json").write_text(damaged)
        assert sizes.of_weights(str(tmp_path)) is None


@pytest.mark.parametrize("flag", ["--model.n-layer", "--model.n_layer", "--model.n-positions", "--model.vocab-size"])
def test_a_flag_that_disagrees_is_refused_by_its_name(trained, flag):
    name = flag.replace("_", "-")
    with pytest.raises(
        BadInput, match=f"^gpt2 train: {name} must be that of the weights in --init-from .*, got 256; leave"
    ):
        parse(["tiny", "--init-from", str(trained), flag, "256"], "gpt2 train")
    theirs = str(THEIRS[name.removeprefix("--model.").replace("-", "_")])
    assert of(parse(["tiny", "--init-from", str(trained), flag, theirs], "gpt2 train")) == THEIRS


def test_a_run_from_weights_of_another_shape_trains_says_so_and_goes_on_without_them(trained, shards, tmp_path, capfd):
    source = tmp_path / "weights"
    shutil.copytree(trained, source)
    command = [
        "train",
        "mini",
        "--data",
        str(shards),
        "--out",
        str(tmp_path / "run"),
        "--init-from",
        str(source),
        *WORK,
    ]
    command += ["--eval-tokens", "512", "--optim.name", "adamw"]
    assert runs.run(*command) == 0
    assert (
        f"\ninitial weights: {source}, with its 2 layers, 2 heads, width 64, 32 positions and 257 tokens\n"
        in capfd.readouterr().out
    )
    shutil.rmtree(source)
    assert runs.run(*command, "--num-steps", "2") == 0
    assert "\ngoing on from " in capfd.readouterr().out


def test_imported_weights_name_no_data_that_nobody_named(shards, tmp_path, capfd):
    torch.manual_seed(0)
    GPT2(GPT2Config(**THEIRS)).save_pretrained(tmp_path / "hf")
    run = str(tmp_path / "run")
    assert runs.run("import", str(tmp_path / "hf"), "--out", run) == 0
    assert f"try: gpt2 sample --run {run} --prompt " in capfd.readouterr().out
    assert runs.run("eval", "--run", run) == 2
    said = capfd.readouterr().err
    assert said.startswith(
        f"eval: --data must be given, got none, and {run} holds weights from {tmp_path / 'hf'} and no"
    )
    assert runs.run("eval", "--run", run, "--data", str(shards), "--eval-tokens", "64") == 0
