"""Machines without Triton, a C compiler or a network: one line says what is used instead and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

from engine import device

LACKS = """
import os, socket, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def refuse(*args, **options):
    print("a connection was tried", file=sys.stderr)
    raise OSError("Network is unreachable")

if "triton" in sys.argv[1]:
    sys.meta_path.insert(0, Hidden())
if "network" in sys.argv[1]:
    socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse

from engine import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def gpt2(lacks: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `gpt2 ARGS` in a process without what `lacks` names: triton, compiler, network, or several."""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    surroundings.pop("TRITON_INTERPRET", None)  # conftest.py sets it
    if "compiler" in lacks:
        surroundings |= {"PATH": "/nonexistent", "CC": "/nonexistent", "CXX": "/nonexistent"}
    command = [sys.executable, "-c", LACKS, lacks, *args]
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)


def train(lacks: str, shards: Path, out: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return gpt2(
        lacks, "train", *SMALL, "--data", str(shards), "--out", str(out), "--num-steps", "2", *flags, **environment
    )


def lines(done: subprocess.CompletedProcess, beginning: str) -> list[str]:
    """Lines of stdout with this beginning. Asserts that the process succeeded."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(beginning)]


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")


@cpu_only
def test_a_machine_without_anything_trains_and_says_so_in_a_line_each(shards, tmp_path):
    done = train("triton compiler network", shards, tmp_path / "run", "--compile")
    assert lines(done, "kernels: ") == ["kernels: torch: Triton is not installed"]
    assert lines(done, "compile: ") == ["compile: skipped, there is no C compiler here: steps run uncompiled"]
    assert lines(done, "done: 2 steps")
    assert "a connection was tried" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


@cpu_only
def test_triton_asked_for_where_there_is_none_is_a_sentence(shards, tmp_path):
    done = train("triton", shards, tmp_path / "run", "--kernels", "triton")
    assert done.returncode == 2
    assert "attention cannot: Triton is not installed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@cpu_only
def test_doctor_on_a_machine_without_anything_has_a_row_for_each(tmp_path):
    done = gpt2("triton compiler network", "doctor", "--precision", "fp32")
    assert lines(done, "C compiler") == ["C compiler            none: neither Triton nor torch.compile can run"]
    assert lines(done, "GPU") == ["GPU                   no CUDA device"]
    assert len([line for line in lines(done, "") if line.endswith("torch: Triton is not installed")]) == 6
    assert "a connection was tried" not in done.stderr


@cpu_only
def test_without_a_gpu_or_a_network_text_is_prepared_trained_on_and_continued(shards, tmp_path):
    (tmp_path / "text.md").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    prepared = gpt2("network", "prepare", str(tmp_path / "text.md"), "--out", str(tmp_path / "data"), "--workers", "1")
    assert lines(prepared, str(tmp_path / "data"))
    trained = train("network", shards, tmp_path / "run")
    assert lines(trained, "kernels: ") == ["kernels: torch: no CUDA device"]
    assert lines(trained, "compile: ") == ["compile: off, the default on a cpu"]
    sampled = gpt2("network", "sample", "--run", str(tmp_path / "run"), "--prompt", "def ", "--max-new-tokens", "3")
    assert lines(sampled, "def ")
    assert "a connection was tried" not in prepared.stderr + trained.stderr + sampled.stderr


def test_weights_by_name_without_a_network_are_a_sentence(tmp_path):
    pytest.importorskip("huggingface_hub")
    out, cache = tmp_path / "run", tmp_path / "cache"
    done = gpt2("network", "import", "gpt2", "--out", str(out), HF_HOME=str(cache), HF_HUB_DISABLE_XET="1")
    assert done.returncode == 2
    assert "download config.json and model.safetensors by other means" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(("variable", "kind"), [("CXX", "cpu"), ("CC", "cuda")])
def test_the_reason_for_no_compiler_holds_on_both_devices(monkeypatch, tmp_path, variable, kind):
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.wants_compile(True, torch.device(kind)) == (
        False,
        "skipped, there is no C compiler here: steps run uncompiled",
    )


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("tyro", ["train", "tiny"]),
        ("tyro", ["prepare", "stdlib", "--out", "data"]),
        ("torch", ["doctor"]),
        ("tiktoken", ["prepare", "LICENSE", "--out", "data"]),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(package, command, tmp_path):
    (tmp_path / "LICENSE").with_suffix(".txt").write_text("some text\n" * 50)
    command = [word.replace("LICENSE", "LICENSE.txt") for word in command]
    program = f"import sys; sys.modules[{package!r}] = None; from engine.cli import main; sys.exit(main({command!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert f"gpt2 {command[0]}: the package {package} must be installed" in done.stderr
    assert "Traceback" not in done.stderr
