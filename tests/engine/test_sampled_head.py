"""--head sampled: a run that trains on a sample of the vocabulary, validated with all of it."""

import shutil

import forks
import numpy as np
import pytest
import torch
from conftest import SMALL
from runs import assert_same_run, measured, newest, run, train

from engine import evaluation, start
from engine.distributed import Ranks
from engine.run import checkpoint, export, metrics, plots
from engine.tokens import mixture
from engine.tokens.shards import TokenStream

RANK = """import sys
from engine import cli, start
start.FREQUENT, start.SAMPLED = 24, 16
cli.main(sys.argv[1:])"""
FLAGS = ["--num-steps", "4", "--eval-every", "2", "--save-every", "2", "--keep-last", "9", "--optim.lr", "1e-2"]
SAMPLED = [*FLAGS, "--head", "sampled"]


@pytest.fixture(autouse=True, scope="module")
def few_tokens():
    """A head of 24 + 16 tokens for the 257 of bytes, and no pictures, which cost more than the steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "draw", lambda *_: [])
        patched.setattr(start, "FREQUENT", 24)
        patched.setattr(start, "SAMPLED", 16)
        yield


@pytest.fixture(scope="module")
def sampled(shards, tmp_path_factory):
    """A run of four steps. Tests share it and must not change it."""
    out = tmp_path_factory.mktemp("runs") / "sampled"
    assert train(out, shards, *SAMPLED) == 0
    return out


def test_a_sampled_run_says_so_and_resumes_to_the_bit(sampled, shards, tmp_path, capfd):
    shutil.copytree(sampled, tmp_path / "stopped")
    shutil.rmtree(newest(tmp_path / "stopped"))
    assert train(tmp_path / "stopped", shards, *SAMPLED) == 0
    line = "\nhead: 24 frequent tokens, a micro-batch's targets and 16 others drawn for it; validation takes all 257\n"
    assert line in capfd.readouterr().out
    assert_same_run(sampled, tmp_path / "stopped")


def test_two_processes_draw_what_one_does(sampled, shards, tmp_path):
    command = ["train", *SMALL, "--data", shards, "--out", tmp_path / "two", *SAMPLED]
    done = forks.run("-c", RANK, *command, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (metrics.read_rows(out / "metrics.jsonl") for out in (sampled, tmp_path / "two"))
    assert len(one) == len(two) == 5
    for left, right in zip(one, two, strict=True):
        for name in ("loss", "val_loss"):
            assert left.get(name) == pytest.approx(right.get(name), abs=1e-5)


@pytest.mark.parametrize("flags", ["--document-mask --model.dropout 0.1", "--precision bf16"])
def test_it_goes_with_other_choices(shards, tmp_path, flags):
    assert train(tmp_path / "run", shards, *SAMPLED, *flags.split(), "--num-steps", "2") == 0
    first, last = (row["val_loss"] for row in measured(tmp_path / "run") if "val_loss" in row)
    assert last < first


def test_its_validation_loss_is_that_of_the_whole_vocabulary(sampled, shards):
    model = export.load_model(sampled)[0]
    assert model.training_loss is None
    text = TokenStream.open(str(shards), "val", 257)
    validated = checkpoint.read(newest(sampled)).state["val_loss"]
    windows = evaluation.windows(text, 32, 512)
    assert evaluation.mean_loss(model, text, windows, 32, Ranks(0, 0, 1, torch.device("cpu"))) == validated


def test_it_learns_another_thing_than_the_full_head_from_the_same_start(sampled, shards, tmp_path):
    assert train(tmp_path / "full", shards, *FLAGS) == 0
    first, *_, last = zip(measured(sampled), measured(tmp_path / "full"), strict=True)
    assert first[0]["val_loss"] == first[1]["val_loss"]
    assert last[0]["val_loss"] != last[1]["val_loss"]


def test_every_training_loss_of_a_run_takes_its_data_s_frequent_tokens(shards, tmp_path, monkeypatch):
    taken, real = [], start.sampled_cross_entropy

    def recorded(*inputs, **options):
        taken.append((options["frequent"].tolist(), options["size"]))
        return real(*inputs, **options)

    monkeypatch.setattr(start, "sampled_cross_entropy", recorded)
    assert train(tmp_path / "run", shards, *SAMPLED, "--num-steps", "1") == 0
    expected = mixture.frequent(TokenStream.open(str(shards), "train", 257), 32, 24).tolist()
    assert taken == [(expected, 16)] * 2  # micro-batches


def test_another_head_is_refused_on_resume(sampled, shards, capfd):
    assert train(sampled, shards, *FLAGS, "--num-steps", "5") == 2
    assert "but these changed\n  head sampled -> full\n" in capfd.readouterr().err


def test_a_vocabulary_with_nothing_to_leave_out_is_refused(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(start, "SAMPLED", 257 - 24)
    assert train(tmp_path / "run", shards, *SAMPLED) == 2
    assert "must have a vocabulary of more than the 257 tokens that it computes, got 257" in capfd.readouterr().err


@pytest.mark.parametrize("flags", [["--compile"], ["--parallel", "fsdp"]], ids=" ".join)
def test_what_a_sampled_head_does_not_go_with_is_refused(shards, capfd, flags):
    assert run("train", "tiny", "--data", str(shards), "--head", "sampled", *flags) == 2
    assert f"must go with --no-compile and --parallel ddp, got {' '.join(flags)}; " in capfd.readouterr().err


def test_another_device_than_a_cpu_is_refused(monkeypatch):
    config = start.TrainConfig(head="sampled")
    start.check_head(config, torch.device("cpu"))
    with pytest.raises(start.BadInput, match="must run on a CPU, got cuda"):
        start.check_head(config, torch.device("cuda"))


def test_the_frequent_tokens_are_counted_in_all_of_a_stream(monkeypatch, shards):
    text = TokenStream.open(str(shards), "train", 257)
    counts = np.bincount(text.read(1, 32 * text.num_windows(32)), minlength=257)
    assert (counts[mixture.frequent(text, 32, 9)] == np.sort(counts)[::-1][:9]).all()
    other = TokenStream.open(str(shards), "val", 257)
    in_other = np.bincount(other.read(1, 32 * other.num_windows(32)), minlength=257)
    shares = 1 * counts / counts.sum() + 3 * in_other / in_other.sum()
    both = mixture.Mixture([mixture.Source("a", 1), mixture.Source("b", 3)], [text, other])
    assert (shares[mixture.frequent(both, 32, 9)] == np.sort(shares)[::-1][:9]).all()
    monkeypatch.setattr(mixture, "COUNTED_TOKENS", 2048)  # windows spread over the stream say nearly the same
    assert len({*mixture.frequent(text, 32, 9)} & {*np.argsort(-counts)[:9]}) >= 7
