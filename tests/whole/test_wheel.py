"""The wheel, installed in an environment of its own, trains `tiny` in another directory."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without the repository on its path; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Path of the wheel, built from a copy of the tracked files, so that it needs no untracked one."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "engine", "kernels", "model", "setup.py", "pyproject.toml", cwd=ROOT).split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin directory of an environment with the wheel and this environment's other packages."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    packages = next((home / "lib").glob("python*/site-packages"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", home / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    # Searched after the wheel. addsitedir would also run this environment's .pth files, such as an editable install's.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return home / "bin"


def test_the_wheel_holds_every_module_and_the_vocabulary(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = run("git", "ls-files", "engine", "kernels", "model", cwd=ROOT).split()
    assert set(sources) <= packed
    assert "engine/tokens/assets/r50k_base.tiktoken" in packed
    for name in ("report.js", "first_run.csv", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"):
        assert f"engine/comparison/assets/{name}" in packed


def test_it_prepares_trains_and_samples_in_another_directory(installed, tmp_path):
    python = installed / "python"
    where = run(python, "-c", "import engine, kernels, model; print(engine.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where
    gpt2 = installed / "gpt2"
    (tmp_path / "text.txt").write_text("".join(f"def f{number}(): return {number}\n" for number in range(9999)))
    bytes_of_fifth = ("--tokenizer", "bytes", "--val-fraction", "0.2")
    assert "tokenizer bytes" in run(gpt2, "prepare", "text.txt", "--out", "data", *bytes_of_fifth, cwd=tmp_path)
    small = ("--num-steps", "3", "--eval-tokens", "1024", "--sample-tokens", "8")
    assert "done: 3 steps" in run(gpt2, "train", "tiny", "--data", "data", "--out", "run", *small, cwd=tmp_path)
    text = run(gpt2, "sample", "--run", "run", "--prompt", "def ", "--max-new-tokens", "8", cwd=tmp_path)
    assert text.startswith("def ")


def test_a_stranger_named_kernels_is_passed_over_and_in_the_place_of_ours_it_is_a_sentence(installed, tmp_path):
    def refused(**environment: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
        command = [installed / "gpt2", "verify", "nowhere"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        return done.stderr

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('a stranger')\n")
    assert refused(PYTHONPATH=str(tmp_path)).startswith("verify: ")
    ours = next(installed.parent.glob("lib/python*/site-packages/kernels/__init__.py"))
    content = ours.read_text()
    try:
        ours.write_text(
            "raise ImportError('a stranger')\n"
        )  # as pip leaves it when another `kernels` is installed later
        assert refused().startswith(
            f"gpt2: `import kernels` must find {ours.parent}, got ImportError: a stranger; another"
        )
    finally:
        ours.write_text(content)
