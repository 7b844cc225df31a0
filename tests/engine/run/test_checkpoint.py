"""Checkpoints: complete or absent. After damage, a failing disk or a kill the newest whole one loads."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from runs import load_filled, refuse, save_filled, steps
from safetensors import safe_open
from torch import nn

from engine import optim
from engine.config import OptimConfig
from engine.errors import BadInput
from engine.run import checkpoint
from engine.run.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE
from engine.run.verify import checkpoint_damage
from model.gpt2 import GPT2, GPT2Config

FILES = [MODEL, OPTIMIZER, STATE, MANIFEST]
SMALL = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=100)


def training(seed: int = 0) -> tuple[GPT2, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = GPT2(SMALL)
    return model, optim.build(model, OptimConfig(lr=1e-2))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(100, (4, 9), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def moments(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {name: optimizer.state[p] for name, p in model.named_parameters()}


# ---- Round trip ---------------------------------------------------------------------------------------------------


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path):
    model, optimizer = training()
    for seed in range(3):
        update(model, optimizer, seed)
    path = checkpoint.save(tmp_path, {"step": 3, "note": "é"}, model, optimizer, 2)

    again, its_optimizer = training(seed=1)
    newest = checkpoint.newest(tmp_path, refuse)
    assert (newest.path, newest.step, newest.state) == (path, 3, {"step": 3, "note": "é"})
    checkpoint.load_weights(newest, again)
    checkpoint.load_optimizer(newest, again, its_optimizer)
    for seed in (None, 10, 11):
        if seed is not None:
            update(model, optimizer, seed)
            update(again, its_optimizer, seed)
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), (name, seed)
        theirs = moments(again, its_optimizer)
        for name, ours in moments(model, optimizer).items():
            assert ours.keys() == theirs[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(ours[m], theirs[name][m]) for m in ours), (name, seed)
    assert checkpoint_damage(path) is None  # further training did not write into the file


def test_a_checkpoint_is_tensors_and_json_under_the_raw_model_s_names(tmp_path):
    model, optimizer = training()
    compiled = torch.compile(model, backend="eager")
    update(compiled, optimizer, 0)
    path = checkpoint.save(tmp_path, {"step": 1}, model, optimizer, 2)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)  # no pickle among them
    with safe_open(path / MODEL, "pt") as file:
        assert sorted(file.keys()) == sorted(names)
    with safe_open(path / OPTIMIZER, "pt") as file:
        assert sorted(file.keys()) == sorted(f"{n}.{m}" for n in names for m in ("exp_avg", "exp_avg_sq", "step"))
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {(path / MANIFEST).stat().st_mode & 0o777}


def test_the_manifest_lists_true_bytes_and_digests(tmp_path):
    path = save_filled(tmp_path, 1)
    contents = {name: (path / name).read_bytes() for name in (MODEL, OPTIMIZER, STATE)}
    assert json.loads((path / MANIFEST).read_text()) == {
        "version": 1,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }


def test_weights_alone_cannot_be_trained_on(tmp_path):
    model, optimizer = training()
    checkpoint.save(tmp_path, {"step": 0}, model, None, 1)
    newest = checkpoint.newest(tmp_path, refuse)
    checkpoint.load_weights(newest, model)
    with pytest.raises(BadInput, match=r"must hold the optimizer's state .*, got weights alone; .* --init-from"):
        checkpoint.load_optimizer(newest, model, optimizer)


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 2, bias=False), nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 2))], ids=str
)
def test_another_model_s_weights_are_refused_and_nothing_is_copied(tmp_path, other):
    save_filled(tmp_path, 7)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(BadInput, match=r"must hold this model's parameters, but .* differs"):
        checkpoint.load_weights(checkpoint.newest(tmp_path, refuse), other)
    assert all(map(torch.equal, before, other.parameters()))


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere", refuse) is None
    with pytest.raises(BadInput, match=r"must be a directory such as .*, got .*nowhere"):
        checkpoint.read(tmp_path / "nowhere")


# ---- Damage -------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # two bytes: JSON is whole without its last newline


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # in the last weight, or a digest
    path.write_bytes(content)


def zero_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(min(64, len(content))))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, empty, flip_a_bit, zero_the_end, os.unlink])
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path, name, harm):
    save_filled(tmp_path, 1)
    good = save_filled(tmp_path, 2)
    bad = save_filled(tmp_path, 3)
    harm(bad / name)
    warnings = []
    newest = checkpoint.newest(tmp_path, warnings.append)
    assert newest.path == good
    assert load_filled(newest) == 2
    assert len(warnings) == 1
    assert re.search(rf"^passing over {bad}: {re.escape(name)} \w+", warnings[0])
    with pytest.raises(BadInput, match=rf"{bad} must be whole, but {re.escape(name)} .*; use an older one"):
        checkpoint.read(bad)
    assert bad.exists()  # kept for inspection


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path):
    path = save_filled(tmp_path, 1)
    whole = (path / MANIFEST).read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (path / MANIFEST).write_bytes(flipped)
        assert checkpoint_damage(path) is not None, (position, flipped)


def test_if_all_are_damaged_each_is_listed_with_the_way_out(tmp_path):
    harms = {save_filled(tmp_path, 1): truncate, save_filled(tmp_path, 2): empty, save_filled(tmp_path, 3): flip_a_bit}
    for path, harm in harms.items():
        harm(path / MODEL)
    with pytest.raises(BadInput) as raised:
        checkpoint.newest(tmp_path, refuse)
    assert "--resume never" in str(raised.value)
    assert all(f"{path}: {MODEL} " in str(raised.value) for path in harms)


# ---- Rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep_last):
    for step in range(1, 6):
        save_filled(tmp_path, step, keep_last)
    assert steps(tmp_path) == [1, 2, 3, 4, 5][-keep_last:]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_what_was_just_written_stays_though_later_ones_exist(tmp_path, keep_last):
    for step in (10, 20, 30, 40):
        save_filled(tmp_path, step)
    assert save_filled(tmp_path, 25, keep_last).exists()
    assert load_filled(checkpoint.read(tmp_path / "checkpoints/step_00000025")) == 25
    assert steps(tmp_path) == {1: [25, 30, 40], 2: [20, 25, 30, 40]}[keep_last]


def test_a_damaged_later_one_costs_no_good_one_its_place(tmp_path):
    for step in (10, 20, 30):
        save_filled(tmp_path, step)
    truncate(tmp_path / "checkpoints/step_00000030" / MODEL)
    save_filled(tmp_path, 25, keep_last=2)
    truncate(tmp_path / "checkpoints/step_00000025" / MODEL)
    assert load_filled(checkpoint.newest(tmp_path, lambda line: None)) == 20


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    save_filled(tmp_path, 1)
    truncate(save_filled(tmp_path, 2) / MODEL)
    save_filled(tmp_path, 2)
    assert load_filled(checkpoint.newest(tmp_path, refuse)) == 2


# ---- Failing disks and kills --------------------------------------------------------------------------------------


class FailingDisk:
    """Records every write, fsync and rename of a save in order. Call `fails_at` raises OSError."""

    def __init__(self, monkeypatch, fails_at: int | None = None):
        self.calls, self.fails_at = [], fails_at
        for owner, name in (
            (checkpoint, "save_file"),
            (os, "fsync"),
            (Path, "write_text"),
            (Path, "write_bytes"),
            (Path, "mkdir"),
            (Path, "rename"),
        ):
            monkeypatch.setattr(owner, name, self.record(getattr(owner, name), name))

    def record(self, call, name):
        def recorded(*args, **options):
            self.calls.append(name)
            if len(self.calls) - 1 == self.fails_at:
                if name in ("save_file", "write_text", "write_bytes"):  # part of it is written
                    with open(args[1] if name == "save_file" else args[0], "wb") as file:
                        file.write(b"{")
                raise OSError(28, "No space left on device")
            return call(*args, **options)

        return recorded


CALLS = ["mkdir", "mkdir", "save_file", "fsync", "save_file", "fsync", "write_text", "fsync"]
CALLS += ["write_text", "fsync", "fsync", "rename", "fsync"]
CALLS += ["write_bytes", "fsync", "fsync"]  # of OUT/latest


def test_these_are_all_the_calls_of_a_save(tmp_path, monkeypatch):
    """Files are flushed before the manifest is written, manifest and directory before the rename."""
    (tmp_path / "checkpoints").mkdir()
    disk = FailingDisk(monkeypatch)
    save_filled(tmp_path, 1)
    assert disk.calls == CALLS


@pytest.mark.parametrize("fails_at", range(len(CALLS)), ids=[f"{i} {call}" for i, call in enumerate(CALLS)])
def test_a_failing_disk_leaves_the_older_ones_and_no_part(tmp_path, fails_at):
    for step in (1, 2):
        save_filled(tmp_path, step)
    with pytest.MonkeyPatch.context() as monkeypatch:
        FailingDisk(monkeypatch, fails_at)
        with pytest.raises(OSError, match="No space left"):
            save_filled(tmp_path, 3, keep_last=1)
    renamed = fails_at > CALLS.index("rename")
    assert steps(tmp_path) == ([1, 2, 3] if renamed else [1, 2])
    assert all(path.name.startswith("step_") for path in (tmp_path / "checkpoints").iterdir())
    assert load_filled(checkpoint.newest(tmp_path, refuse)) == (3 if renamed else 2)
    save_filled(tmp_path, 3, keep_last=1)
    assert steps(tmp_path) == [3]


def test_a_full_disk_is_an_os_error(tmp_path):
    """safetensors raises an error type of its own, which must become an OSError."""
    save_filled(tmp_path, 1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # bytes
    try:
        with pytest.raises(OSError, match=f"{MODEL}: .*too large"):
            save_filled(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_leftovers_of_a_killed_save_are_cleaned_by_the_next(tmp_path):
    leftover = tmp_path / "checkpoints" / ".writing_step_00000009_123"
    leftover.mkdir(parents=True)
    (leftover / MODEL).write_bytes(b"half")
    assert checkpoint.newest(tmp_path, refuse) is None
    save_filled(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def _save_forever(out: Path, first: int, announce) -> None:
    for step in range(first, 10**8):
        save_filled(out, step, keep_last=2)
        announce.send(step)


def test_a_kill_at_any_moment_loses_nothing_announced(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine.run.checkpoint", "engine.optim", "torch._dynamo"])  # imported once for all
    last, seconds = 0, random.Random(0)
    for _ in range(8):
        listen, announce = context.Pipe(duplex=False)
        child = context.Process(target=_save_forever, args=(tmp_path, last + 1, announce))
        child.start()
        announce.close()
        last = listen.recv()
        child.join(seconds.uniform(0.0, 0.1))  # a save takes a few ms
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        while True:
            try:
                last = listen.recv()
            except EOFError:
                break
        step = load_filled(checkpoint.newest(tmp_path, refuse))
        assert last <= step <= last + 1
        last = step
