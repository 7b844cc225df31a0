"""`--resume-changed` keeps a run's weights on other data or another schedule, never for another model."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from runs import newest, train

from engine import config
from engine.errors import BadInput
from engine.run import checkpoint, metrics, resume
from engine.tokens.prepare import PrepareConfig, prepare

FLAGS = ["--eval-every", "None", "--save-every", "None", "--keep-last", "9"]


@pytest.fixture(scope="module")
def three_steps(shards, tmp_path_factory) -> Path:
    """A run of three steps of 256 tokens."""
    out = tmp_path_factory.mktemp("three") / "run"
    assert train(out, shards, *FLAGS, "--num-steps", "3") == 0
    return out


@pytest.fixture
def out(three_steps, tmp_path) -> Path:
    """A copy of `three_steps`, to be resumed."""
    shutil.copytree(three_steps, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """Token shards of other sources."""
    directory = tmp_path_factory.mktemp("others") / "own"
    prepare([str(ROOT / "bench")], PrepareConfig(out=str(directory), tokenizer="bytes", workers=1, val_fraction=0.2))
    return directory


def rows(out: Path) -> list[tuple[int, int]]:
    return [(row["step"], row["tokens"]) for row in metrics.read_rows(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("flags", "changes", "tokens"),
    [
        pytest.param(["--tokens-per-step", "512"], "tokens_per_step 256 -> 512", [768, 1280, 1792], id="batch"),
        pytest.param(
            ["--context", "16", "--tokens-per-step", "64"],
            "tokens_per_step 256 -> 64\n  context 32 -> 16",
            [768, 832, 896],
            id="context",
        ),
        pytest.param(
            ["--seed", "2", "--model.dropout", "0.1"],
            "model.dropout 0.0 -> 0.1\n  seed 1 -> 2",
            [768, 1024, 1280],
            id="seed and dropout",
        ),
    ],
)
def test_it_goes_on_with_another_schedule(out, shards, capfd, flags, changes, tokens):
    path, config_before = newest(out), (out / "config.json").read_bytes()
    assert train(out, shards, *FLAGS, "--num-steps", "5", *flags) == 2
    assert (out / "config.json").read_bytes() == config_before
    error = capfd.readouterr().err
    assert changes in error
    assert "to go on with its weights all the same, add --resume-changed" in error

    assert train(out, shards, *FLAGS, "--num-steps", "5", *flags, "--resume-changed") == 0
    assert f"going on from {path} although these changed\n  {changes}\n" in capfd.readouterr().out
    assert rows(out) == [(0, 0), (1, 256), (2, 512), *zip((3, 4, 5), tokens, strict=True)]
    state = checkpoint.read(newest(out)).state
    assert (state["step"], state["tokens"]) == (5, tokens[-1])


def test_tokens_go_on_over_several_changes(out, shards):
    for num_steps, tokens_per_step in ((4, 512), (5, 128), (6, 128)):
        flags = ["--num-steps", str(num_steps), "--tokens-per-step", str(tokens_per_step)]
        assert train(out, shards, *FLAGS, *flags, "--resume-changed") == 0
    assert rows(out) == [(0, 0), (1, 256), (2, 512), (3, 768), (4, 1280), (5, 1408), (6, 1536)]


def test_it_goes_on_with_other_data_from_the_same_weights(out, shards, others, capfd):
    assert train(out, others, *FLAGS, "--num-steps", "4") == 2
    error = capfd.readouterr().err
    assert "data_digest " in error
    assert "add --resume-changed" in error
    assert train(out, others, *FLAGS, "--num-steps", "4", "--resume-changed") == 0
    assert rows(out)[-1] == (4, 1024)
    before, after = (checkpoint.read(path).state["identity"] for path in sorted((out / "checkpoints").iterdir()))
    assert before["data_digest"] != after["data_digest"]
    last = metrics.read_rows(out / "metrics.jsonl")[3]
    assert last["loss"] < 5.4  # an untrained model's is above ln 257 = 5.55


def test_once_gone_on_the_same_command_needs_no_flag(out, shards):
    assert train(out, shards, *FLAGS, "--num-steps", "4", "--seed", "2", "--resume-changed") == 0
    assert train(out, shards, *FLAGS, "--num-steps", "5", "--seed", "2") == 0
    assert rows(out)[-1] == (5, 1280)


# ---- Changes that are refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--model.n-embd", "128"], "model.n_embd 64 -> 128"),
        (["--model.n-layer", "3", "--seed", "2"], "model.n_layer 2 -> 3\n  seed 1 -> 2"),
        (["--model.n-head", "1"], "model.n_head 2 -> 1"),
        (["--model.n-positions", "64", "--context", "32"], "model.n_positions 32 -> 64"),
        (["--optim.name", "muon"], "optim.name adamw -> muon"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_another_model_or_optimizer_is_refused_with_the_flag_too(out, shards, capfd, flags, changes):
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert train(out, shards, *FLAGS, "--num-steps", "5", *flags, "--resume-changed") == 2
    error = capfd.readouterr().err
    assert f"but these changed\n  {changes}\n" in error
    assert "add --resume-changed" not in error
    assert "--resume never" in error
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == kept


def find(out: Path, *flags: str, **changed) -> list[str]:
    """Lines of find_checkpoint with the run's flags and identity, some of either changed."""
    lines, past = [], json.loads((newest(out) / "state.json").read_text())["identity"]
    train_config = config.parse([*SMALL, "--out", str(out), "--num-steps", "5", *flags], "test")
    assert resume.find_checkpoint(train_config, past | changed, lines.append).step == 3
    return lines


CHANGES = {
    "optim.lr 0.002 -> 0.001": ["--optim.lr", "1e-3"],
    "optim.weight_decay 0.1 -> 0.2": ["--optim.weight-decay", "0.2"],
    "optim.warmup_tokens 512 -> 0\n  optim.clip 1.0 -> 2.0": ["--optim.clip", "2", "--optim.warmup-tokens", "0"],
    "init_from None -> runs/x": ["--init-from", "runs/x"],
    "precision fp32 -> bf16": [],
}


@pytest.mark.parametrize(("changes", "flags"), CHANGES.items(), ids=CHANGES)
@pytest.mark.parametrize("num_steps", ["3", "5"], ids=["finished", "unfinished"])
def test_each_setting_that_changes_what_is_computed_is_listed(three_steps, changes, flags, num_steps):
    flags, resolved = [*flags, "--num-steps", num_steps], {} if flags else {"precision": "bf16"}
    with pytest.raises(BadInput) as refused:
        find(three_steps, *flags, **resolved)
    assert f"but these changed\n  {changes}\n  choose another --out" in str(refused.value)
    assert ("its numbers belong to its old settings" in str(refused.value)) == (num_steps == "3")
    assert find(three_steps, *flags, "--resume-changed", **resolved)[0].endswith(f"these changed\n  {changes}")


def test_another_tokenizer_is_refused_with_the_flag_too(three_steps):
    with pytest.raises(
        BadInput, match=r"but these changed\n  tokenizer bytes -> gpt2\n  choose another --out, or [^;]*$"
    ):
        find(three_steps, "--resume-changed", tokenizer="gpt2")


def test_nothing_changed_warns_of_the_longer_schedule_alone(three_steps):
    for flags in ([], ["--resume-changed"]):
        assert find(three_steps, *flags) == ["num_steps 3 -> 5: the learning rate's schedule is that of 5 steps"]
