"""Checkpoints of a sharded run: loaded at any world size, in any --parallel mode, and as a plain model."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from runs import measured, newest, torchrun, train
from safetensors.torch import load_file

from engine import cli
from engine.config import PRESETS, TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.run import checkpoint, metrics, resume
from engine.run.verify import checkpoint_damage

STEPS = ["--num-steps", "8", "--eval-every", "4", "--save-every", "4", "--keep-last", "9", "--micro-batch-size", "2"]
STEPS += ["--optim.name", "muon", "--optim.muon-rows"]


def without_last(run: Path, copy: Path) -> Path:
    """Copies a run without its last checkpoint, which leaves that of step 4. Returns the copy."""
    shutil.copytree(run, copy)
    shutil.rmtree(newest(copy))
    return copy


def content(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, unsharded."""
    if not (path / checkpoint.SHARDED).is_dir():
        files = {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer")}
        return {f"{file}.{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    directory = str(path / checkpoint.SHARDED)
    sizes = HuggingFaceStorageReader(directory).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size) for name, entry in sizes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(directory), no_dist=True)
    return tensors


def assert_close_runs(left: Path, right: Path) -> None:
    """Asserts that losses agree within 1e-5 and weights within 1e-4.

    Moments are not compared: those of a gradient that is only rounding noise may differ more.
    """
    for ours, theirs in zip(*(metrics.read_rows(out / "metrics.jsonl") for out in (left, right)), strict=True):
        for name in ("loss", "val_loss"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5)
    ours, theirs = content(newest(left)), content(newest(right))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def one(shards, tmp_path_factory) -> Path:
    """An unsharded run on one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert train(out, shards, *STEPS) == 0
    return out


@pytest.fixture(scope="module")
def sharded(shards, tmp_path_factory) -> Path:
    """The same run on two processes with --parallel fsdp."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    done = torchrun(2, out, shards, *STEPS, "--parallel", "fsdp", "--recompute", "attention")
    assert done.returncode == 0, done.stderr
    return out


def test_a_sharded_run_learns_what_one_process_does(one, sharded):
    assert_close_runs(one, sharded)
    assert (one / "samples.txt").read_text() == (sharded / "samples.txt").read_text()


def test_no_process_wrote_the_whole_model_and_nothing_is_a_pickle(sharded):
    files = sorted((newest(sharded) / checkpoint.SHARDED).iterdir())
    assert [path.suffix for path in files] == [".safetensors"] * 2
    largest = max(tensor.numel() for tensor in content(newest(sharded)).values())
    for path in files:
        assert max(tensor.numel() for tensor in load_file(path).values()) < 0.75 * largest


def test_resume_of_a_sharded_run_is_bitwise_identical(sharded, shards, tmp_path):
    out = without_last(sharded, tmp_path / "run")
    assert torchrun(2, out, shards, *STEPS, "--parallel", "fsdp", "--recompute", "attention").returncode == 0
    assert measured(out) == measured(sharded)
    ours, theirs = content(newest(out)), content(newest(sharded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_four_processes_in_replicas_of_two_go_on_from_two_shards(one, sharded, shards, tmp_path):
    out = without_last(sharded, tmp_path / "run")
    done = torchrun(4, out, shards, *STEPS, "--parallel", "hsdp", "--shard-size", "2")
    assert done.returncode == 0, done.stderr
    assert_close_runs(one, out)


@pytest.mark.slow
def test_one_process_goes_on_from_two_and_two_from_one_with_the_same_batches(one, sharded, shards, tmp_path):
    out = without_last(sharded, tmp_path / "plain")
    assert train(out, shards, *STEPS) == 0
    assert not (newest(out) / checkpoint.SHARDED).exists()
    assert_close_runs(one, out)
    out = without_last(one, tmp_path / "sharded")
    assert torchrun(2, out, shards, *STEPS, "--parallel", "fsdp").returncode == 0
    assert (newest(out) / checkpoint.SHARDED).is_dir()
    assert_close_runs(one, out)


def test_a_sharded_checkpoint_is_sampled_evaluated_and_exported_like_any_other(one, sharded, tmp_path, capfd):
    outputs = []
    for run in (one, sharded):
        assert cli.main(["eval", "--run", str(run)]) == 0
        outputs.append(capfd.readouterr().out.replace(str(run), "run"))
    assert outputs[0] == outputs[1]
    assert cli.main(["export", "--run", str(sharded), "--out", str(tmp_path / "exported")]) == 0
    assert cli.main(["verify", str(sharded)]) == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "lose", "add"])
def test_damage_to_any_shard_is_found(sharded, tmp_path, harm):
    shutil.copytree(newest(sharded), tmp_path / "copy")
    for path in sorted((tmp_path / "copy" / checkpoint.SHARDED).iterdir()):
        content = path.read_bytes()
        assert checkpoint_damage(tmp_path / "copy") is None
        if harm == "flip":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        elif harm == "cut":
            path.write_bytes(content[:-2])
        elif harm == "lose":
            path.unlink()
        else:
            path.with_name("shard-00009-model-00001-of-00001.safetensors").write_bytes(content)
        assert ("shard-00009" if harm == "add" else path.name) in checkpoint_damage(tmp_path / "copy")
        path.write_bytes(content)
        path.with_name("shard-00009-model-00001-of-00001.safetensors").unlink(missing_ok=True)


def test_an_out_that_other_hosts_do_not_see_is_refused_where_it_is_sharded(tmp_path, monkeypatch):
    config = TrainConfig(out=str(tmp_path / "here"), parallel="fsdp", model=PRESETS["tiny"].model)
    elsewhere = Ranks(1, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(Ranks, "broadcast_object", lambda self, value: value)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [None, value])
    with pytest.raises(BadInput, match="rank 1: train: --out must be on a file system that all hosts share"):
        resume.check_shared_out(config.out, config.parallel, elsewhere)


def test_a_checkpoint_without_the_optimizer_s_state_is_never_written(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([model.weight])
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="every parameter must be the optimizer's, got another bias"):
        checkpoint.save(tmp_path, {"step": 1}, model, optimizer, 1)
    assert not json.dumps([str(path) for path in tmp_path.rglob("step_*")]).strip("[]")
