"""docs/library.md and examples/: every block and every program runs, and does what it says."""

import ast
import os
import re
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model import GPT2, GPT2Config

DOCUMENT = ROOT / "docs" / "library.md"
EXAMPLES = ROOT / "examples"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_here(name: str, *args: object, monkeypatch) -> None:
    """Runs an example in this process, which has imported PyTorch already."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run(name: str, *args: object) -> str:
    """Runs an example as a program and returns what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)", text)]


def test_the_blocks_of_library_md_run_top_to_bottom(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    names = {}
    try:
        for code in BLOCK.findall(DOCUMENT.read_text(encoding="utf-8")):
            exec(compile(code, DOCUMENT.name, "exec"), names)
    finally:
        torch.set_rng_state(state)
    assert names["out"].shape == (4, 64, 2, 32)
    assert names["qkv"].grad.isfinite().all()
    assert names["checkpoint"].step == 3
    printed = capfd.readouterr().out
    assert "done: 3 steps" in printed
    assert "linear_cross_entropy" in printed
    assert printed.splitlines()[-1].startswith("data: must be a directory of token shards, got nowhere, which does not")


@pytest.mark.slow
def test_the_own_data_set_is_learned(monkeypatch, capfd):
    run_here("own_data.py", "--steps", 80, monkeypatch=monkeypatch)
    assert int(re.search(r"sorts (\d+)% of 64 new questions", capfd.readouterr().out)[1]) >= 50


def test_the_loop_of_40_lines_learns_and_writes(shards, monkeypatch, capfd):
    (main,) = (
        n for n in ast.walk(ast.parse((EXAMPLES / "training_loop.py").read_text())) if isinstance(n, ast.FunctionDef)
    )
    assert main.end_lineno - main.lineno < 40
    of_micro_batches, forward = [], GPT2.forward
    noted = lambda *args: of_micro_batches.append(loss := forward(*args)) or loss  # noqa: E731
    monkeypatch.setattr(GPT2, "forward", noted)
    run_here("training_loop.py", shards, "--steps", 4, monkeypatch=monkeypatch)
    printed = capfd.readouterr().out
    first, last = losses(printed)
    assert last < first - 0.1
    assert last == pytest.approx(sum(of_micro_batches[6:8]).item() / 2, abs=5.1e-4)
    assert "\ndef " in printed
    with pytest.raises(SystemExit):
        run_here("training_loop.py", shards, "--steps", 0, monkeypatch=monkeypatch)
    assert "error: --steps must be at least 1, got 0" in capfd.readouterr().err


def test_a_mistake_ends_an_example_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("The dog sat on the mat. " * 300)
    (tmp_path / "run-data").mkdir()
    (tmp_path / "run-data" / "other_train_000000.bin").write_bytes(b"of another text")
    monkeypatch.chdir(tmp_path)
    for name, words, said in (
        ("training_loop.py", ["nowhere"], "data: must be a directory of token shards, got nowhere"),
        ("own_optimizer.py", ["nowhere"], "data: must be a directory of token shards, got nowhere"),
        ("fine_tune.py", ["gpt2", "text.txt", "run"], "name another run than run, or delete run and run-data"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_here(name, *words, monkeypatch=monkeypatch)
        assert said in ended.value.code


def test_fine_tuning_stops_at_ctrl_c_and_puts_the_handler_back(tmp_path):
    GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32)).save_pretrained(tmp_path / "weights")
    names = runpy.run_path(str(EXAMPLES / "fine_tune.py"))
    before, asked = signal.getsignal(signal.SIGINT), []

    def run_training(config, stop):
        signal.raise_signal(signal.SIGINT)
        asked.append(stop.is_set())

    names["tune"].__globals__.update(prepare=lambda *_: None, run_training=run_training)
    try:
        names["tune"](str(tmp_path / "weights"), "text.txt", str(tmp_path / "run"), ["--num-steps", "2"])
        assert asked == [True]
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_our_ops_in_transformers_gpt2_give_the_same_loss_and_gradients():
    pytest.importorskip("transformers")
    printed = run("someone_elses_model.py", "--layers", 2)
    theirs, ours = re.search(r"loss (\S+) as it was, (\S+) with our ops", printed).groups()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    assert float(re.search(r"at most (\S+) of their norm", printed)[1]) < 1e-5


@pytest.mark.slow
def test_an_own_optimizer_trains_in_the_engine_s_update_and_skips_what_is_not_finite(shards):
    rows = losses(run("own_optimizer.py", shards, "--steps", 40))
    assert rows[-1] < rows[0] - 1.0
    lion = runpy.run_path(str(EXAMPLES / "own_optimizer.py"))["Lion"]
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = lion([weight])
    for found_inf, moves in ((0.0, True), (1.0, False)):
        before, weight.grad = weight.detach().clone(), torch.full((3,), float("nan") if found_inf else 1.0)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert torch.equal(weight, before) == (not moves)
        assert optimizer.state[weight]["mean"].isfinite().all()


@pytest.mark.slow
def test_weights_of_others_are_tuned_on_a_text_file_and_the_same_command_goes_on(tmp_path):
    GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32)).save_pretrained(tmp_path / "weights")
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 300)
    words = (tmp_path / "weights", tmp_path / "text.txt", tmp_path / "tuned", "--tokens-per-step", "256")
    words = (*words, "--eval-tokens", "512", "--sample-tokens", "4", "--num-steps")
    for steps in (2, 3):
        printed = run("fine_tune.py", *words, steps)
        assert f"done: {steps} steps" in printed
        assert f"\nstep {steps}: The " in printed
    assert "going on from" in printed


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_how_it_is_called(path):
    asked = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"python examples/{path.name}" in asked.stdout + asked.stderr
