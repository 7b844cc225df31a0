"""The tuning file: whole or ignored with a sentence, and behind every flag."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from runs import run

from engine.config import PRESETS, TrainConfig, parse
from engine.errors import BadInput
from engine.tuning import record
from engine.tuning.record import Setup, Tuning

CPU = torch.device("cpu")


def config(*flags: str) -> TrainConfig:
    return parse(["tiny", *flags], "gpt2 train")


def tuning(of: TrainConfig, **setup) -> Tuning:
    """A tuning of this machine for a run's model."""
    shape = record.shape_of(of.model, of.sequence_length)
    shipped = Setup("fp32", 16)
    found = dataclasses.replace(shipped, **setup)
    return Tuning("tiny", shape, record.machine_of(CPU), "2026-11-25", shipped, found, 100.0, 125.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_tuning_is_read_as_it_was_written(tmp_path):
    written = tuning(config(), tiles={"attention_fwd/16bit 64": {"BLOCK_M": 64}}, ops={"attention": "cudnn"}, threads=2)
    record.save(written, tmp_path / "deep" / "file.json")
    assert record.load(tmp_path / "deep" / "file.json") == written
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.json"]


def test_auto_finds_this_machine_s_file_by_itself_and_names_it():
    of = config()
    assert record.find(of, CPU) == (None, "")
    written = tuning(of, micro_batch_size=8, ops={"attention": "flash"})
    path = record.path_of(written.shape, CPU)
    record.save(written, path)
    assert "gpt2-engine/tune" in str(path)
    found, note = record.find(of, CPU)
    assert found == written
    assert note.startswith("tuned: tiny on ")
    assert note.endswith("2026-11-25, 1.25x: B = 8, fp32, eager, attention flash")
    assert record.find(config("--tuned", "never"), CPU) == (None, "")
    assert record.find(config("--model.n-layer", "3"), CPU) == (None, "")
    assert record.find(config("--context", "32"), CPU) == (None, "")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: text[:100], id="cut short"),
        pytest.param(lambda text: text.replace('"flash"', '"flush"'), id="a value changed"),
        pytest.param(lambda text: "[]", id="not an object"),
        pytest.param(lambda text: "{}", id="empty"),
    ],
)
def test_a_damaged_file_is_ignored_with_a_sentence(tmp_path, damage):
    path = tmp_path / "file.json"
    record.save(tuning(config(), ops={"attention": "flash"}), path)
    path.write_text(damage(path.read_text()))
    found, note = record.find(config("--tuned", str(path)), CPU)
    assert found is None
    assert note.startswith(f"tuned: ignored, {path} is damaged (")
    assert "\n" not in note


@pytest.mark.parametrize("name", ["device", "driver", "torch", "triton", "code"])
def test_a_file_of_another_machine_or_version_is_ignored_and_says_what_differs(tmp_path, name):
    path, here = tmp_path / "file.json", tuning(config())
    record.save(dataclasses.replace(here, machine=here.machine | {name: "old"}), path)
    found, note = record.find(config("--tuned", str(path)), CPU)
    assert found is None
    assert f"{name} old -> {here.machine[name]}" in note


def test_a_file_of_another_model_is_ignored_and_says_what_differs(tmp_path):
    path = tmp_path / "file.json"
    record.save(tuning(PRESETS["mini"]), path)
    found, note = record.find(config("--tuned", str(path)), CPU)
    assert found is None
    assert "n_layer 6 -> 4" in note


def test_a_file_that_is_named_must_exist():
    with pytest.raises(BadInput, match="--tuned must be auto, never or a file made by gpt2 tune, got nowhere"):
        record.find(config("--tuned", "nowhere"), CPU)


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "tuning.json", tmp_path):
        with pytest.raises(
            BadInput, match=r"tune: --out must be a file that can be written.*, or choose another --out"
        ):
            record.save(tuning(config()), path)


def test_the_tuning_sets_what_no_flag_sets():
    found = tuning(config(), micro_batch_size=8, recompute="block", compile=True)
    taken = record.applied(found, config(), 1)
    assert (taken.micro_batch_size, taken.recompute, taken.compile) == (8, "block", True)
    taken = record.applied(found, config("--micro-batch-size", "4", "--no-compile"), 1)
    assert (taken.micro_batch_size, taken.recompute, taken.compile) == (4, "none", False)
    assert record.applied(found, config("--head", "sampled"), 1).compile is None  # which is not compiled
    assert record.applied(found, config("--recompute", "attention"), 1).recompute == "attention"
    assert record.applied(found, config(), 4).micro_batch_size is None  # 4 processes have 4 sequences each


# ---- A run --------------------------------------------------------------------------------------------------------

PAIRS = zip(SMALL[1::2], SMALL[2::2], strict=True)
FLAGS = [word for pair in PAIRS if pair[0] not in ("--precision", "--micro-batch-size") for word in pair]


def train(shards, out, *flags: str) -> int:
    return run("train", "tiny", *FLAGS, "--data", str(shards), "--out", str(out), *flags)


@pytest.fixture
def tuned(tmp_path) -> str:
    """A file for the small model: half its micro-batch, bf16, plain attention."""
    path, of = tmp_path / "tuned.json", config(*FLAGS)
    record.save(tuning(of, micro_batch_size=2, precision="bf16", ops={"attention": "math"}), path)
    return str(path)


def resolved(out) -> dict:
    return json.loads((out / "config.json").read_text())["resolved"]


def test_a_run_takes_what_was_tuned_and_says_so_first(shards, tmp_path, tuned, capsys):
    assert train(shards, tmp_path / "run", "--num-steps", "1", "--tuned", tuned) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tuned: tiny on ")
    assert "2 sequences x 32 x 4 micro-batches" in lines[2]
    assert lines[4] == "precision: bf16, tuned"
    assert "math: tuned (attention)" in lines[5]
    assert resolved(tmp_path / "run")["precision"] == "bf16"


def test_a_run_goes_on_in_the_precision_that_it_began_with(shards, tmp_path, tuned, capsys):
    assert train(shards, tmp_path / "run", "--num-steps", "1", "--tuned", tuned) == 0
    assert train(shards, tmp_path / "run", "--num-steps", "2", "--tuned", "never") == 0
    assert "precision: bf16, as this run began" in capsys.readouterr().out
    assert train(shards, tmp_path / "plain", "--num-steps", "1", "--tuned", "never", "--precision", "fp32") == 0
    assert train(shards, tmp_path / "plain", "--num-steps", "2", "--tuned", tuned) == 0
    output = capsys.readouterr().out
    assert "tuned: ignored, it is for bf16 and this run is in fp32" in output
    assert "precision: fp32, as this run began" in output
    assert "4 sequences x" in output or "8 sequences x" in output


def test_a_tuning_made_between_two_launches_of_a_run_changes_nothing(shards, tmp_path, tuned, monkeypatch, capsys):
    assert train(shards, tmp_path / "run", "--num-steps", "1", "--precision", "fp32") == 0
    found = record.load(Path(tuned))
    found = dataclasses.replace(found, setup=dataclasses.replace(found.setup, precision="fp32"))
    monkeypatch.setattr(record, "find", lambda config, device: (found, f"tuned: {found}"))
    assert train(shards, tmp_path / "run", "--num-steps", "2", "--precision", "fp32") == 0
    assert "tuned: ignored, this run began without it or with another; --tuned FILE takes it" in capsys.readouterr().out
    assert train(shards, tmp_path / "new", "--num-steps", "1", "--precision", "fp32") == 0
    assert train(shards, tmp_path / "new", "--num-steps", "2", "--precision", "fp32") == 0  # began with it
    assert "ignored" not in capsys.readouterr().out


def test_the_old_variable_only_says_what_replaced_it(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPT2_AUTOTUNE", "1")
    assert train(shards, tmp_path / "run", "--num-steps", "1", "--precision", "fp32") == 0
    assert capsys.readouterr().out.count("GPT2_AUTOTUNE is now `gpt2 tune`") == 1
