"""Another package called `kernels` or `model`: ours come first, and where they cannot, every command says so."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from engine import packages

STRANGER = "raise ImportError('a stranger')\n"


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A directory with a package `kernels` that cannot be imported."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STRANGER)
    return tmp_path


def python(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_ours_come_first_wherever_a_stranger_is(stranger):
    code = "import engine, kernels, model; print(kernels.__file__)"
    for path in (f"{stranger}:{ROOT}", f"{ROOT}:{stranger}"):
        done = python("-c", code, cwd=stranger, PYTHONPATH=path)
        assert (done.stdout.strip(), done.stderr) == (str(ROOT / "kernels" / "__init__.py"), "")


def test_a_worker_started_anew_finds_ours_too(stranger):
    code = (
        "import multiprocessing as m, engine\n"
        "from engine.packages import shadowed\n"
        "if __name__ == '__main__':\n"
        "    with m.get_context('spawn').Pool(1) as pool: print(pool.apply(shadowed))\n"
    )
    (stranger / "start.py").write_text(code)
    assert python("start.py", cwd=stranger, PYTHONPATH=f"{stranger}:{ROOT}").stdout == "None\n"


@pytest.mark.slow
def test_training_run_as_a_file_and_as_a_module_finds_ours(stranger):
    for how in ([str(ROOT / "engine" / "train.py")], ["-m", "engine.cli", "train"]):
        done = python(*how, "tiny", "--num-steps", "0", cwd=stranger, PYTHONPATH=f"{stranger}:{ROOT}")
        assert done.returncode == 2
        assert done.stderr == "gpt2 train: --num-steps must be at least 1, got 0\n"


@pytest.mark.parametrize("command", ["plot --run x", "train tiny", "verify x"])
def test_a_stranger_that_was_imported_first_is_a_sentence_in_every_command(command, stranger):
    (stranger / "kernels" / "__init__.py").write_text("")
    code = f"import sys, kernels\nfrom engine import cli\nsys.exit(cli.main({command.split()!r}))"
    done = python("-c", code, cwd=stranger, PYTHONPATH=f"{stranger}:{ROOT}")
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"gpt2: `import kernels` must find {ROOT / 'kernels'}, got {stranger / 'kernels'}; anoth"
    )
    assert done.stderr.count("\n") == 1


def test_a_stranger_in_the_place_of_ours_is_a_sentence(stranger, monkeypatch):
    monkeypatch.setattr(packages, "ROOT", stranger)
    monkeypatch.delitem(sys.modules, "kernels")
    said = packages.shadowed()
    assert said.startswith(
        f"gpt2: `import kernels` must find {stranger / 'kernels'}, got ImportError: a stranger; another"
    )
    (stranger / "kernels" / "__init__.py").write_text("")
    assert "another package" in packages.shadowed()  # it has no dispatch.py


def test_a_package_that_is_missing_is_pointed_out(monkeypatch):
    assert packages.shadowed() is None
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "model" else find(name))
    assert "`import model` must find" in packages.shadowed()
    assert "got nothing" in packages.shadowed()
