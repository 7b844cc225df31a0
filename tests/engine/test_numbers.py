"""Numbers that are not finite: in losses, logits, weights and flags. A sentence, and nothing is left behind."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import typing
from pathlib import Path

import pytest
import torch
import tyro
from conftest import SMALL
from runs import newest, run, train
from safetensors.torch import load_file, save_file

from engine import cli, evaluation
from engine.errors import BadInput
from engine.run import checkpoint, export
from model.gpt2 import GPT2, GPT2Config


def no_constant(name: str):
    raise AssertionError(f"{name} is no JSON")


def rows(out: Path) -> list[dict]:
    """Rows of metrics.jsonl. Asserts that every file of the run that should be JSON is."""
    for path in [*out.rglob("*.json"), out / "heartbeat"]:
        json.loads(path.read_text(), parse_constant=no_constant)
    return [json.loads(line, parse_constant=no_constant) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- Losses and logits --------------------------------------------------------------------------------------------


def test_a_divergence_that_meets_an_evaluation_ends_with_code_3_and_a_row_of_null(shards, tmp_path, capfd):
    out, flags = tmp_path / "run", ["--num-steps", "11", "--eval-every", "10"]
    assert train(out, shards, *flags, "--optim.lr", "1e10") == 3
    error = capfd.readouterr().err
    assert re.fullmatch(r"train: the validation loss must be finite, got (nan|inf) at step 10; .*--optim.lr.*\n", error)
    assert {"step": 10, "tokens": 2560, "val_loss": None} in rows(out)
    assert "=== step 10 ===" not in (out / "samples.txt").read_text()
    assert run("plot", "--run", str(out)) == 0
    assert not (out / "checkpoints").exists()
    assert train(out, shards, *flags, "--optim.lr", "1e-3") == 0  # nothing was saved: nothing blocks the same command
    assert [row["step"] for row in rows(out)] == list(range(12))
    assert all(row.get("val_loss", 0.0) is not None for row in rows(out))


def test_a_sample_of_logits_that_are_not_finite_ends_the_run_too(shards, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(evaluation, "mean_losses", lambda *_: [3.0])
    assert train(tmp_path / "run", shards, "--num-steps", "40", "--eval-every", "10", "--optim.lr", "1e30") == 3
    assert re.search(
        r"^train: at step 10: generate: the model's logits must be finite, got \d+", capfd.readouterr().err
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def scaled(trained, tmp_path):
    """A function that copies the run with one of its tensors multiplied."""

    def scale(name: str, factor: float) -> Path:
        out = tmp_path / "scaled"
        shutil.copytree(trained, out)
        edit(newest(out), lambda tensors: tensors[name].mul_(factor))
        return out

    return scale


def edit(path: Path, change) -> None:
    """Changes the tensors of a checkpoint, and its manifest to match."""
    file = path / checkpoint.MODEL
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][checkpoint.MODEL] = {"bytes": file.stat().st_size, "sha256": digest}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "flags", [["sample", "--prompt", "x"], ["sample", "--prompt", "x", "--temperature", "0"], ["eval"]]
)
def test_a_model_whose_logits_overflow_is_named_with_its_step(flags, scaled, capfd):
    out = scaled("ln_f.weight", 3e38)
    assert run(*flags, "--run", str(out)) == 3
    error = capfd.readouterr().err
    assert re.fullmatch(
        rf"{flags[0]}: .*must be finite, got .* at step 2 of {re.escape(str(out))}; try --best\n", error
    )


def test_a_loss_whose_perplexity_no_float_can_hold_is_still_a_loss(scaled, capfd):
    assert run("eval", "--run", str(scaled("ln_f.weight", 1e5))) == 0
    loss, perplexity = re.search(r"loss ([\d.]+) nats per byte, perplexity (\w+)", capfd.readouterr().out).groups()
    assert float(loss) > 710
    assert perplexity == "inf"


# ---- Weights ------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path) -> Path:
    """Weights in the Hugging Face layout, of SMALL's shape, two of whose numbers are not finite."""
    torch.manual_seed(0)
    GPT2(GPT2Config(2, 2, 64, 32, 257)).save_pretrained(tmp_path / "weights")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = math.nan
    tensors["transformer.ln_f.bias"][:2] = -math.inf
    save_file(tensors, tmp_path / "weights" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "weights"


def test_weights_that_are_not_finite_are_refused_by_name_and_out_stays_free(weights, shards, tmp_path, capfd):
    out = tmp_path / "out"
    flags = [*SMALL, "--data", str(shards), "--num-steps", "1"]
    commands = (["import", str(weights)], ["train", *flags, "--init-from", str(weights)])
    for command in commands:
        assert run(*command, "--out", str(out)) == 2
        assert "NaN or infinity: 1 in h.1.mlp.c_fc.weight, 2 in ln_f.bias; " in capfd.readouterr().err
        assert not out.exists()
    for other in (
        ["--model.n-positions", "16", "--init-from", str(weights)],
        ["--init-from", str(tmp_path / "nowhere")],
    ):
        assert run("train", *flags, *other, "--out", str(out)) == 2
        assert not out.exists()
    GPT2(GPT2Config(2, 2, 64, 32, 257)).save_pretrained(weights)
    for command in commands:
        assert run(*command, "--out", str(out)) == 0
        shutil.rmtree(out)


def test_a_checkpoint_whose_weights_were_made_infinite_is_refused_by_name(trained, shards, tmp_path, capfd):
    out, bad = tmp_path / "out", tmp_path / "bad"
    shutil.copytree(trained, bad)
    edit(newest(bad), lambda tensors: tensors["h.0.attn.c_proj.bias"].fill_(math.inf))
    flags = ["train", *SMALL, "--data", str(shards), "--num-steps", "3", "--out"]
    for command in (
        ["sample", "--run", str(bad), "--prompt", "x"],
        ["eval", "--run", str(bad)],
        ["export", "--run", str(bad), "--out", str(out)],
        [*flags, str(out), "--init-from", str(bad)],
        [*flags, str(bad)],
    ):
        assert run(*command) == 2, command
        error = capfd.readouterr().err
        assert error.endswith(
            "must hold finite parameters, got NaN or infinity: 64 in h.0.attn.c_proj.bias; use an older one\n"
        )
        assert not out.exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing_that_blocks_the_next_try(
    command, trained, tmp_path, monkeypatch, capfd
):
    GPT2(GPT2Config(1, 1, 8, 8, 257)).save_pretrained(tmp_path / "weights")
    args = [command, *(["--run", str(trained)] if command == "export" else [str(tmp_path / "weights")])]

    def fill(*_, **__):
        assert any((tmp_path / "out").iterdir())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", fill)
        patched.setattr(export, "save_tokenizer", fill)
        assert run(*args, "--out", str(tmp_path / "out")) == 2
    assert re.match(rf"{command}: --out must be .* No space left on device; ", capfd.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert run(*args, "--out", str(tmp_path / "out")) == 0


def test_a_model_that_is_not_finite_cannot_be_written(tmp_path):
    model = GPT2(GPT2Config(1, 1, 8, 8, 257))
    torch.nn.init.constant_(model.h[0].ln_1.weight, math.nan)
    with pytest.raises(
        ValueError, match=r"must have finite weights to be saved, got NaN or infinity: 8 in h\.0\.ln_1\.weight"
    ):
        model.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# ---- Flags --------------------------------------------------------------------------------------------------------


def float_flags(kind: type, prefix: str = "--") -> list[str]:
    """Flags of a dataclass that hold a float, or a float or None."""
    flags = []
    for name, of in typing.get_type_hints(kind).items():
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(of):
            flags += float_flags(of, f"{flag}.")
        elif of is float or float in typing.get_args(of):
            flags.append(flag)
    return flags


REQUIRED = {
    "prepare": ["stdlib", "--out", "out"],
    "train": ["tiny", "--out", "out"],
    "tune": ["tiny", "--out", "out"],
    "plan": ["gpt2"],
    "sample": ["--prompt", "x"],
}


def test_no_float_flag_of_any_command_takes_infinity_or_nan(trained, tmp_path, monkeypatch, capfd):
    kinds: dict[str, type] = {}

    def remember(kind, **_):
        kinds[command] = kind
        raise BadInput("enough")

    with monkeypatch.context() as patched:
        patched.setattr(tyro, "cli", remember)
        for command in cli.COMMANDS:
            assert run(command, *REQUIRED.get(command, [])) == 2
    assert kinds.keys() == cli.COMMANDS.keys()
    flags = {command: float_flags(kind) for command, kind in kinds.items()}
    assert {command for command in flags if flags[command]} == REQUIRED.keys()
    assert len(flags["train"]) >= 14
    assert "--model.dropout" in flags["train"]
    monkeypatch.chdir(tmp_path)
    for command, required in REQUIRED.items():
        required = [*required, "--run", str(trained)] if command == "sample" else required
        own = [flag for flag in flags[command] if not flag.startswith("--model.")]  # the model's are checked before
        for group in (own, *([flag] for flag in set(flags[command]) - set(own))):
            for value in ("inf", "nan"):
                assert run(command, *required, *(word for flag in group for word in (flag, value))) == 2
                said = re.sub(r"[│\s]+", " ", "".join(capfd.readouterr())).replace("_", "-")
                for flag in group:
                    name = flag.lstrip("-").removeprefix("model.")
                    assert re.search(rf"\b{name} must [^;]*, got {value}\b", said), (flag, said)
    assert list(tmp_path.iterdir()) == []
