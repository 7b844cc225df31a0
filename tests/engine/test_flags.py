"""Flags at their edges: every integer and every float flag of every command ends in success or a sentence."""

import dataclasses
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import runs
from conftest import ROOT, SMALL

from engine import commands, device, flags
from engine import config as configs
from engine.checks import doctor
from engine.config import PRESETS, OptimConfig, TrainConfig, batch_shape
from engine.errors import BadInput
from engine.planning import memory
from engine.tuning import tune
from model.presets import GPT2Config, parameter_shapes

INTEGERS = (0, -1, -5, 2**31, 2**63, 2**64, 10**30)
FLOATS = (1e-320, 1e308, -0.0)


def numbers(kind: type) -> list[tuple[str, tuple]]:
    """(field, values to try) of each integer and float field of a dataclass."""
    found = []
    for each in dataclasses.fields(kind):
        if each.type in (int, int | None):
            found.append((each.name, INTEGERS))
        elif each.type in (float, float | None):
            found.append((each.name, FLOATS))
    return found


def edges(kind: type, prefix: str = "--") -> list[tuple[str, str]]:
    """(flag, value) pairs of a dataclass."""
    return [(prefix + name.replace("_", "-"), str(value)) for name, values in numbers(kind) for value in values]


TRAIN = edges(TrainConfig) + edges(OptimConfig, "--optim.") + edges(GPT2Config, "--model.")
YEARS = {("--num-steps", str(2**31)), ("--sample-tokens", str(2**31))}  # of work, which is what they ask for


def test_every_number_of_a_training_config_is_judged_without_an_error_of_its_own():
    judged = 0
    for part, kind in (("", TrainConfig), ("optim", OptimConfig), ("model", GPT2Config)):
        for name, values in numbers(kind):
            for value in values:
                base = PRESETS["tiny"]
                try:
                    nested = dataclasses.replace(getattr(base, part), **{name: value}) if part else value
                    config = dataclasses.replace(base, **{part or name: nested})
                except ValueError as error:  # GPT2Config's own sentence, which tyro prints
                    wrong = [str(error)]
                else:
                    wrong = config.problems()
                    if not wrong and part != "model":
                        device.check_memory(config, device.torch.device("cuda"))
                assert value not in (2**63, 2**64, 10**30) or wrong, (name, value)
                assert all("must" in line and "got" in line for line in wrong)
                judged += 1
    assert judged == len(TRAIN) > 150


@pytest.mark.parametrize(("wanted", "tokens"), [(7, 10**15), (2**40, 2**62 + 64), (10**9 + 7, 2**60 * 3), (3, 2**62)])
def test_the_advice_for_a_batch_takes_no_search(wanted, tokens):
    began = time.monotonic()
    with pytest.raises(BadInput, match="the nearest --tokens-per-step are") as raised:
        batch_shape(TrainConfig(tokens_per_step=tokens, context=64, micro_batch_size=wanted), 1)
    assert time.monotonic() - began < 1
    for size in str(raised.value).partition("--micro-batch-size ")[2].split(" and "):
        assert not size or (tokens // 64) % int(size) == 0


def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(shards, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("model.gpt2.GPT2.__init__", lambda *_: pytest.fail("it must not be built"))
    began = time.monotonic()
    for sizes in (["--model.n-layer", "10000000"], ["--model.n-positions", str(2**40), "--context", "32"]):
        assert runs.train(tmp_path / "run", shards, *sizes) == 2
        said = capfd.readouterr().err
        assert "the model of each process must fit into this host's memory, got" in said
        assert "choose a smaller preset, or lower --model.n-layer" in said
    assert time.monotonic() - began < 20
    assert not (tmp_path / "run").exists()


def ended(command: str, *args: str) -> None:
    """Asserts that a command ends with success or with a sentence."""
    assert runs.run(command, *args) in (0, 2), (command, args)


def test_every_number_of_the_other_commands_ends_in_success_or_a_sentence(trained, monkeypatch, capfd):
    for flag, value in edges(commands.KINDS["sample"]):
        ended("sample", "--run", str(trained), "--prompt", "d", "--max-new-tokens", "2", flag, value)
    for flag, value in edges(commands.KINDS["eval"]):
        ended("eval", "--run", str(trained), flag, value)
    monkeypatch.setattr(doctor, "report", lambda *_, **__: SimpleNamespace(text=lambda _: "", failed=None))
    for flag, value in edges(commands.KINDS["doctor"]):
        ended("doctor", "--precision", "fp32", flag, value)
    monkeypatch.setattr(tune, "tune", lambda *_: None)
    for flag, values in (("--micro-batch-size", INTEGERS), ("--max-minutes", FLOATS)):
        for value in values:
            ended("tune", "tiny", flag, str(value))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("value", ["0", "-5"])
def test_no_token_to_evaluate_on_is_no_default(trained, value, capfd):
    assert runs.run("eval", "--run", str(trained), "--eval-tokens", value) == 2
    assert capfd.readouterr().err == f"eval: --eval-tokens must be at least 1, got {value}\n"


def test_a_probability_below_float32_keeps_the_most_likely_token(trained, capfd):
    texts = []
    for choice in (["--top-p", "1e-320"], ["--temperature", "0"]):
        assert runs.run("sample", "--run", str(trained), "--prompt", "d", "--max-new-tokens", "8", *choice) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "value"), [pair for pair in TRAIN if pair not in YEARS])
def test_every_number_of_train_ends_in_success_or_a_sentence(flag, value, shards, tmp_path, capfd):
    code = runs.run(
        "train", *SMALL, "--data", str(shards), "--out", str(tmp_path / "run"), "--num-steps", "2", flag, value
    )
    said = capfd.readouterr().err
    assert code in (0, 2, 3), said
    assert "Traceback" not in said


# ---- Hints --------------------------------------------------------------------------------------------------------

OTHERS = {
    ("train", "--lr"): "--optim.lr",
    ("train", "--learning-rate=3e-4"): "--optim.lr",
    ("train", "--epochs"): "--num-steps; an epoch is the training tokens / --tokens-per-step",
    ("train", "--max_steps"): "--num-steps",
    ("train", "--batch-size"): "--tokens-per-step, ",
    ("train", "--bf16"): "--precision",
    ("train", "--device"): "CUDA_VISIBLE_DEVICES in front",
    ("train", "--model"): "the word after the command",
    ("train", "--output-dir"): "--out",
    ("train", "--block-size"): "--context",
    ("train", "--model-name-or-path"): "--init-from",
    ("train", "--config_file"): "--config, a TOML or a run's config.json",
    ("train", "--dump-config"): "--print-config, ",
    ("doctor", "--self-check"): "--check, ",
    ("sample", "--model"): "--run",
    ("sample", "--max-length"): "--max-new-tokens",
    ("sample", "--device"): "CUDA_VISIBLE_DEVICES in front",
    ("eval", "--checkpoint"): "--run",
    ("prepare", "--num-proc"): "--workers",
    ("tune", "--model"): "the word after the command",
}


@pytest.mark.parametrize(("command", "flag"), OTHERS, ids=[" ".join(pair) for pair in OTHERS])
def test_a_flag_of_another_trainer_is_told_ours(command, flag, capsys):
    words = ["tiny", flag, "1"] if command == "train" else [flag, "1"]
    assert runs.run(command, *words) == 2
    said = capsys.readouterr().err
    assert f"a flag must be one that --help lists, got {flag.partition('=')[0].replace('_', '-')}; here it is " in said
    assert OTHERS[command, flag] in said


def test_every_hint_names_a_flag_that_exists():
    known = flags.names(configs.Asked) | {"--workers", "--tokenizer"}
    for kind in (commands.KINDS["sample"], commands.KINDS["eval"], commands.KINDS["doctor"]):
        known |= flags.names(kind)
    for ours, theirs in flags.HINTS:
        assert ours.replace(",", " ").replace(";", " ").split()[0] in known, ours
        assert not {f"--{name}" for name in theirs.split()} & (flags.names(TrainConfig) - {"--model", "--optim"}), (
            theirs
        )


# ---- Presets and versions -----------------------------------------------------------------------------------------


def test_help_of_train_and_presets_list_each_preset_with_its_sizes_and_machine_in_80_columns(capsys):
    assert runs.run("train", "--help") == 0
    told = capsys.readouterr().out
    assert runs.run("presets") == 0
    table = capsys.readouterr().out
    assert table in told
    assert max(map(len, table.splitlines())) <= 80
    lines = {line.split()[0]: " ".join(line.split()) for line in table.splitlines()[1 : 1 + len(PRESETS)]}
    assert set(lines) == set(PRESETS)
    assert lines["gpt2"] == "gpt2 124,439,808 12 12 768 1024 524,288 10.0B 6.0e-4 1.9 GiB"
    assert lines["tiny"] == "tiny 834,432 4 4 128 64 1,024 0.8M 6.0e-3 10 MiB"
    assert set(configs.MACHINES) < set(PRESETS)
    assert all(f"{name}: {words}\n" in table for name, words in configs.MACHINES.items())


def test_presets_as_json_say_what_the_configs_say(capsys):
    assert runs.run("presets", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["preset"] for row in rows] == list(PRESETS)
    for row in rows:
        preset, shapes = PRESETS[row["preset"]], parameter_shapes(PRESETS[row["preset"]].model)
        count = sum(map(math.prod, shapes.values()))
        padding = (preset.model.padded_vocab_size - preset.model.vocab_size) * preset.model.n_embd
        assert row["parameters"] == count - padding
        planned = memory.parts(preset, 1, "fp32")
        assert row["memory_bytes"] == 2 * planned["weights"] + planned["moments"]  # gradients are as large as weights
        assert row["tokens"] == preset.num_steps * row["tokens_per_step"]
        assert (row["peak_muon_lr"] is None) == (preset.optim.name == "adamw")


@pytest.mark.parametrize("word", ["--version", "version"])
def test_the_versions_are_printed_without_importing_torch(word):
    code = f"import sys\nfrom engine import cli\ncode = cli.main([{word!r}])\nsys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    python = ".".join(map(str, sys.version_info[:3]))
    ours, torch = (importlib.metadata.version(name) for name in ("gpt2-engine", "torch"))
    assert (done.returncode, done.stdout) == (0, f"gpt2-engine {ours}, torch {torch}, Python {python}\n")
