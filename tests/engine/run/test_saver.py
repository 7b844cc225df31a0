"""Asynchronous saves: a checkpoint holds the state at its call, and a failed save costs no other one."""

import json
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

from engine import optim
from engine.config import OptimConfig, TrainConfig
from engine.distributed import Ranks
from engine.errors import BAD_INPUT, BadInput, Diverged
from engine.run import checkpoint
from engine.run.saver import Saver
from model.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=100)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Run:
    """A model in training, its saver, and the lines that the saver printed."""

    def __init__(self, out: Path, optimizer: str = "adamw", async_save: bool = True, rank: int = 0):
        torch.manual_seed(0)
        self.config = TrainConfig(
            out=str(out), keep_last=9, async_save=async_save, model=TINY, optim=OptimConfig(optimizer, lr=1e-2)
        )
        self.model = GPT2(TINY)
        self.optimizer = optim.build(self.model, self.config.optim)
        self.lines: list[str] = []
        ranks = Ranks(rank, rank, rank + 1, torch.device("cpu"))
        self.saver = Saver(self.config, ranks, self.model, self.optimizer, self.lines.append)
        self.step = 0

    def update(self) -> None:
        """One update, in place."""
        tokens = torch.randint(100, (4, 9), generator=torch.Generator().manual_seed(self.step))
        self.model(tokens[:, :-1], tokens[:, 1:]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self) -> dict[str, torch.Tensor]:
        """Saves, and returns copies of all tensors that are saved."""
        copies = {name: t.clone() for name, t in checkpoint.named_tensors(self.model, self.optimizer).items()}
        self.saver.save({"step": self.step})
        return copies


def saved(out: Path, step: int, optimizer: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, loaded into another model."""
    run = Run(out, optimizer)
    loaded = checkpoint.read(out / "checkpoints" / f"step_{step:08d}")
    checkpoint.load_weights(loaded, run.model)
    checkpoint.load_optimizer(loaded, run.model, run.optimizer)
    return checkpoint.named_tensors(run.model, run.optimizer)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((out / "checkpoints").glob("step_*"))]


class Gate:
    """Delays every checkpoint.write until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.begun, write = threading.Event(), [], checkpoint.write

        def waiting(out, state, *rest):
            self.begun.append(state["step"])
            assert self.opened.wait(20)
            return write(out, state, *rest)

        monkeypatch.setattr(checkpoint, "write", waiting)


def in_thread(call) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


# ---- The moment of the call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_saved_is_the_moment_of_the_call_though_training_goes_on(tmp_path, monkeypatch, optimizer):
    gate, run = Gate(monkeypatch), Run(tmp_path, optimizer)
    wanted = {}
    for _ in range(3):  # later copies reuse the memory of the first
        gate.opened.clear()
        run.update()
        wanted[run.step] = run.save()  # returns, although nothing can be written yet
        for _ in range(2):
            run.update()
        with torch.no_grad():
            next(run.model.parameters()).add_(1.0)
        gate.opened.set()
        run.saver.wait()
        assert run.saver.last_step == run.step - 2
    run.saver.close()
    assert steps(tmp_path) == sorted(wanted) == [1, 4, 7]
    for step, tensors in wanted.items():
        assert any(name.endswith("momentum") for name in tensors) == (optimizer == "muon")
        assert_same(saved(tmp_path, step, optimizer), tensors)
    assert run.lines == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_save_at_once_is_the_same_to_the_byte(tmp_path, optimizer):
    for name, async_save in (("later", True), ("now", False)):
        run = Run(tmp_path / name, optimizer, async_save)
        run.update()
        run.save()
        if not async_save:
            assert steps(tmp_path / name) == [1]  # before anything waits for it
            assert run.saver.last_step == 1
        run.saver.close()
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST):
        left, right = (tmp_path / name / "checkpoints/step_00000001" / file for name in ("later", "now"))
        assert left.read_bytes() == right.read_bytes()


def test_the_next_save_and_the_end_wait_for_the_last_one(tmp_path, monkeypatch):
    gate, run = Gate(monkeypatch), Run(tmp_path)
    run.update()
    first = run.save()
    run.update()
    second = {name: t.clone() for name, t in checkpoint.named_tensors(run.model, run.optimizer).items()}
    saving = in_thread(lambda: run.saver.save({"step": 2}))
    saving.join(0.2)
    assert saving.is_alive()
    assert (gate.begun, steps(tmp_path)) == ([1], [])
    gate.opened.set()
    saving.join(20)
    assert not saving.is_alive()
    run.saver.wait()

    gate.opened.clear()
    run.update()
    run.save()
    closing_ = in_thread(run.saver.close)
    closing_.join(0.2)
    assert closing_.is_alive()
    gate.opened.set()
    closing_.join(20)
    assert not closing_.is_alive()
    assert steps(tmp_path) == [1, 2, 3]
    assert_same(saved(tmp_path, 1, "adamw"), first)
    assert_same(saved(tmp_path, 2, "adamw"), second)


def test_the_slowest_save_is_known(tmp_path, monkeypatch):
    run, seconds = Run(tmp_path), [0.0, 0.3, 0.0]
    monkeypatch.setattr(checkpoint, "write", lambda *_: threading.Event().wait(seconds.pop(0)))
    for _ in range(3):
        run.save()
    run.saver.close()
    assert 0.3 <= run.saver.seconds < 2


def test_rank_0_alone_writes_a_whole_model(tmp_path):
    run = Run(tmp_path, rank=1)
    run.update()
    run.save()
    run.saver.close()
    assert not list(tmp_path.iterdir())


# ---- Saves that fail ----------------------------------------------------------------------------------------------


class Disk:
    """Makes the saves of some steps fail."""

    def __init__(self, monkeypatch, refused: set[int]):
        write = checkpoint.write

        def refusing(out, state, *rest):
            if state["step"] in refused:
                raise OSError(28, "No space left on device", f"{out}/model.safetensors")
            return write(out, state, *rest)

        monkeypatch.setattr(checkpoint, "write", refusing)


BOTH = pytest.mark.parametrize("async_save", [True, False], ids=["async", "sync"])


def saves(run: Run, count: int) -> None:
    """Updates and saves, as the loop does, and closes."""
    with closing(run.saver):
        for _ in range(count):
            run.update()
            run.save()


@BOTH
def test_one_failed_save_warns_with_needed_and_free_and_training_goes_on(tmp_path, monkeypatch, async_save):
    Disk(monkeypatch, {2})
    run = Run(tmp_path, async_save=async_save)
    saves(run, 3)
    assert steps(tmp_path) == [1, 3]
    tensors = checkpoint.named_tensors(run.model, run.optimizer).values()
    needed = sum(t.numel() * t.element_size() for t in tensors) / 2**20
    assert len(run.lines) == 1
    assert run.lines[0].startswith(f"checkpoint: saving must write {needed:,.1f} MiB to {tmp_path}, got ")
    assert " MiB free: [Errno 28] No space left on device: " in run.lines[0]
    assert run.lines[0].endswith("make room there; training goes on, saved up to step 1")


@BOTH
def test_two_failed_in_a_row_end_the_run(tmp_path, monkeypatch, async_save):
    Disk(monkeypatch, {2, 3})
    run = Run(tmp_path, async_save=async_save)
    with pytest.raises(BadInput, match=r"No space left.*; the run ends here, saved up to step 1$"):
        saves(run, 5)
    assert run.step <= 4  # the save after them raises, at the latest
    assert len(run.lines) == 2
    assert steps(tmp_path) == [1]


@BOTH
def test_a_good_save_in_between_begins_the_count_anew(tmp_path, monkeypatch, async_save):
    Disk(monkeypatch, {1, 3, 5})
    run = Run(tmp_path, async_save=async_save)
    saves(run, 6)
    assert steps(tmp_path) == [2, 4, 6]
    assert [line.rpartition("; ")[2].partition(", ")[2] for line in run.lines] == [
        "nothing was saved",
        "saved up to step 2",
        "saved up to step 4",
    ]


def test_a_save_counts_once_it_is_whole_not_when_the_next_begins(tmp_path):
    run = Run(tmp_path)
    run.saver.save({"step": 7})
    run.saver._thread.join()
    assert run.saver.last_saved() == "saved up to step 7"  # what a second signal says meanwhile
    run.saver.close()
    assert run.saver.is_closed


@BOTH
def test_the_last_save_must_not_fail(tmp_path, monkeypatch, async_save):
    Disk(monkeypatch, {3})
    run = Run(tmp_path, async_save=async_save)
    with pytest.raises(BadInput, match=r"the run ends here, saved up to step 2$"):
        saves(run, 3)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, async_save, value):
    run = Run(tmp_path, async_save=async_save)
    saves(run, 1)
    with torch.no_grad():
        run.model.h[1].mlp.c_fc.weight[3, 5] = value
    monkeypatch.setattr(run, "update", lambda: None)
    with pytest.raises(Diverged, match=r"got others: 1 in model\.h\.1\.mlp\.c_fc\.weight; nothing was saved"):
        saves(run, 2)  # the second save raises the error of the first; close raises no other
    assert steps(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_nor_is_a_moment(tmp_path):
    run = Run(tmp_path)
    run.update()
    run.optimizer.state[run.model.wte.weight]["exp_avg_sq"][0, 0] = float("inf")
    run.save()
    with pytest.raises(Diverged, match=r"optimizer\.wte\.weight\.exp_avg_sq"):
        run.saver.close()
    assert steps(tmp_path) == []


@BOTH
def test_an_error_that_is_not_the_disk_s_is_raised_and_no_checkpoint_is_claimed(tmp_path, monkeypatch, async_save):
    run = Run(tmp_path, async_save=async_save)
    monkeypatch.setattr(checkpoint, "write", lambda *_: [][0])
    with pytest.raises(IndexError):
        saves(run, 2)
    assert run.saver.last_step is None


# ---- A real full disk ---------------------------------------------------------------------------------------------


def _why_no_tmpfs() -> str | None:
    """Reason why no tmpfs can be mounted here, or None."""
    try:
        done = subprocess.run(
            ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True
        )
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else f"unshare -Urm mount -t tmpfs: {done.stderr.strip()}"


needs_tmpfs = pytest.mark.skipif((_reason := _why_no_tmpfs()) is not None, reason=_reason or "")

# Trains with --out on a tmpfs of so many bytes, once for each. With "fill" a file takes the rest of it after the first
# checkpoint. A fork each; the last line of each is JSON: exit code, step of the newest whole checkpoint, names of all.
ON_SMALL_DISKS = """
import json, os, subprocess, sys
from pathlib import Path
from engine import cli
from engine.run import checkpoint
asked = json.loads(sys.argv[2])
for name, (size, fill, flags) in asked.items():
    if os.fork() == 0:
        break
    os.wait()
else:
    sys.exit()
disk = Path(sys.argv[1], name)
disk.mkdir()
said = os.open(f"{disk}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
os.dup2(said, 1), os.dup2(said, 2)
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
out, write = disk / "run", checkpoint.write
def then_fill(*args):
    path = write(*args)
    if not (disk / "junk").exists():
        with (disk / "junk").open("wb", buffering=0) as junk:
            try:
                while junk.write(bytes(4096)):
                    pass
            except OSError:
                junk.truncate(junk.tell() - KEPT)
    return path
if fill:
    checkpoint.write = then_fill
KEPT = 0  # bytes left
try:
    cli.main(["train", *sys.argv[3:], *flags, "--out", str(out)])
except SystemExit as end:
    code = end.code
newest = checkpoint.newest(out, print)
names = sorted(path.name for path in (out / "checkpoints").glob("*"))
print(json.dumps([code, newest and newest.step, names]))
"""


DISKS = {  # size, whether it fills up, flags
    "small": ("2m", False, ["--num-steps", "2"]),
    "full": ("8m", True, ["--num-steps", "12", "--save-every", "2", "--eval-every", "None", "--keep-last", "1"]),
}


@pytest.fixture(scope="module")
def disks(tmp_path_factory, shards) -> dict[str, tuple[list, str]]:
    """Of each disk ([exit code, step of the newest whole checkpoint, names of all], output)."""
    root = tmp_path_factory.mktemp("disks")
    command = ["unshare", "-Urm", sys.executable, "-c", ON_SMALL_DISKS, str(root), json.dumps(DISKS)]
    command += [*SMALL, "--data", str(shards)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    texts = {name: (root / f"{name}.txt").read_text() for name in DISKS}
    return {name: (json.loads(text.splitlines()[-1]), text) for name, text in texts.items()}


@needs_tmpfs
def test_a_disk_that_cannot_hold_the_checkpoints_is_refused_before_training(disks):
    ended, output = disks["small"]
    assert ended == [BAD_INPUT, None, []]
    assert "must have 2.5 MiB free, for 1 checkpoint of 1.5 MiB, got 2.0 MiB; make room there" in output
    assert "step:" not in output


@needs_tmpfs
def test_a_disk_that_fills_up_costs_no_whole_checkpoint(disks):
    ended, output = disks["full"]
    assert ended == [BAD_INPUT, 2, ["step_00000002"]]
    assert output.count("checkpoint: saving must write 1.5 MiB to ") == 3  # two warnings and the final error
    assert output.count("got 0.0 MiB free: ") == 3
    assert "; training goes on, saved up to step 2" in output
    assert "; make room there; the run ends here, saved up to step 2" in output
    assert "Traceback" not in output
