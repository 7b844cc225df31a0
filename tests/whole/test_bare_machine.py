"""Machines without Triton, a C compiler or a network: one line says what is used instead and why."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import runs
import torch
from conftest import ROOT, SMALL

from engine import device
from engine.checks import compiler
from engine.distributed import Ranks
from engine.errors import Diverged
from model.gpt2 import GPT2

LACKS = """
import io, os, socket, sys, tempfile

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def refuse(*args, **options):
    if args[0] != socket.gethostname():  # the host's own name, which gpt2 doctor looks up as Gloo does
        print("a connection was tried", file=sys.stderr)
    raise OSError("Network is unreachable")

if "triton" in sys.argv[1]:
    sys.meta_path.insert(0, Hidden())
if "directory" in sys.argv[1]:
    tempfile._candidate_tempdir_list = lambda: ["/proc/nonexistent"]
if "network" in sys.argv[1]:
    socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse

def without_proc(function):
    def call(path, *args, **options):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *args, **options)
    return call

if "linux" in sys.argv[1]:
    import torch._inductor.config, torch.distributed
    for name in ("sched_getaffinity", "posix_fallocate", "posix_fadvise", "fdatasync", "O_DIRECT"):
        delattr(os, name)
    io.open, os.open, os.readlink = map(without_proc, (io.open, os.open, os.readlink))

from engine import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def gpt2(lacks: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `gpt2 ARGS` in a process without what `lacks` names: triton, compiler, network, or several.

    directory: a temporary one, a home and caches, so that only --out can be written. linux: /proc, /sys and
    system calls that macOS lacks.
    """
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    surroundings.pop("TRITON_INTERPRET", None)  # conftest.py sets it
    if "compiler" in lacks:
        surroundings |= {"PATH": "/nonexistent", "CC": "/nonexistent", "CXX": "/nonexistent"}
    if "directory" in lacks:
        names = ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")
        surroundings |= dict.fromkeys(names, "/proc/nonexistent")  # which root cannot make either
    if lacks == "network":  # which what is imported does not look for
        return forks.run("-c", LACKS, lacks, *args, seconds=300, **environment)
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
    done = train("triton compiler network directory", shards, tmp_path / "run", "--compile")
    assert lines(done, "kernels: ") == ["kernels: torch: Triton is not installed"]
    assert lines(done, "compile: ") == ["compile: skipped, there is no C++ compiler here: steps run uncompiled"]
    assert lines(done, "done: 2 steps")
    starts = ["train: TMPDIR must be a dir", "train: TORCHINDUCTOR_CACHE_"]
    assert [line[:27] for line in done.stderr.splitlines()] == starts
    assert {"loss_curve.png", "lr_schedule.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.mark.slow
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
    assert lines(done, "C compiler") == ["C compiler            none: Triton cannot run, nor torch.compile on a GPU"]
    assert lines(done, "C++ compiler") == ["C++ compiler          none: torch.compile cannot run on a CPU"]
    assert lines(done, "Gloo") == [
        "Gloo                  lo, since this host's name leads to no address here; other hosts need GLOO_SOCKET_IFNAME"
    ]
    assert lines(done, "GPU  ") == ["GPU                   no CUDA device"]
    assert len([line for line in lines(done, "") if line.endswith("torch: Triton is not installed")]) == 6
    assert "a connection was tried" not in done.stderr


@pytest.mark.slow
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


@pytest.mark.slow
@cpu_only
def test_a_machine_without_proc_and_the_calls_of_linux_trains_and_goes_on(shards, tmp_path):
    assert lines(train("linux triton", shards, tmp_path / "run"), "done: 2 steps")
    assert lines(train("linux triton", shards, tmp_path / "run", "--num-steps", "3"), "done: 3 steps")
    assert lines(gpt2("linux triton", "sample", "--run", str(tmp_path / "run"), "--prompt", "def "), "def ")
    assert lines(gpt2("linux triton", "doctor", "--precision", "fp32"), "processor")


def test_weights_by_name_without_a_network_are_a_sentence(tmp_path):
    pytest.importorskip("huggingface_hub")
    out, cache = tmp_path / "run", tmp_path / "cache"
    done = gpt2("network", "import", "gpt2", "--out", str(out), HF_HOME=str(cache), HF_HUB_DISABLE_XET="1")
    assert done.returncode == 2
    assert "download config.json and model.safetensors by other means" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(("language", "kind"), [("C++", "cpu"), ("C", "cuda")])
def test_the_reason_for_no_compiler_holds_on_both_devices(monkeypatch, tmp_path, language, kind):
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.wants_compile(True, torch.device(kind)) == (
        False,
        f"skipped, there is no {language} compiler here: steps run uncompiled",
    )


def refuse_to_map(path: str) -> None:
    raise OSError(f"{path}: failed to map segment from shared object")  # as on a disk mounted noexec


def test_a_compiler_that_is_there_and_cannot_build_is_the_reason(monkeypatch, tmp_path):
    on = torch.device("cpu")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    if shutil.which("g++"):
        assert device.wants_compile(True, on) == (True, "on")
    monkeypatch.setenv("CXX", "/bin/false")
    assert f"the compiler /bin/false fails in {tmp_path / 'cache'} (exit code 1)" in device.wants_compile(True, on)[1]
    monkeypatch.setenv("CXX", "/bin/true")
    monkeypatch.setattr(device.ctypes, "CDLL", refuse_to_map)
    assert "failed to map segment from shared object" in device.wants_compile(True, on)[1]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nonexistent")
    is_compiled, why = device.wants_compile(True, on)
    assert not is_compiled
    assert why.startswith("skipped, compiled code cannot be kept and opened (")


@dataclasses.dataclass(frozen=True)
class Two(Ranks):
    """Two ranks, of which the second cannot compile."""

    def gather(self, value):
        return [value, (False, "skipped, there is no C compiler here: steps run uncompiled")]


def test_one_rank_that_cannot_compile_keeps_all_from_it(monkeypatch):
    monkeypatch.setattr(device, "wants_compile", lambda *_: (True, "on"))
    ranks = Two(0, 0, 2, torch.device("cpu"))
    assert compiler.wanted(True, False, ranks) == (
        False,
        "skipped, there is no C compiler here: steps run uncompiled (rank 1)",
    )
    with pytest.raises(Diverged, match="with --strict the training step must be compiled, got: skipped, there is no C"):
        compiler.wanted(True, True, ranks)


def test_strict_ends_a_run_that_cannot_compile_with_code_3(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/bin/false")
    assert runs.train(tmp_path / "run", shards, "--compile", "--strict") == 3
    assert "the compiler /bin/false fails" in capfd.readouterr().err


@pytest.mark.parametrize(
    "stray",
    [
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "x"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "2"},
        {"LOCAL_WORLD_SIZE": "x"},
    ],
)
def test_variables_that_a_scheduler_left_are_a_sentence(stray, shards, tmp_path, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    assert runs.train(tmp_path / "run", shards) == 2
    said = capfd.readouterr().err
    assert said.startswith("distributed: LOCAL_RANK and RANK must be numbers below WORLD_SIZE")
    assert all(f"{name}={value}" in said for name, value in stray.items() if not name.startswith("MASTER"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sample", "eval", "export"])
def test_a_model_too_large_for_memory_is_a_sentence(command, trained, tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 6442450944 bytes.")

    monkeypatch.setattr(GPT2, "__init__", fail)
    flags = {"sample": ["--prompt", "a"], "export": ["--out", str(tmp_path / "hf")]}
    assert runs.run(command, "--run", str(trained), *flags.get(command, [])) == 2
    assert (
        f"gpt2 {command}: the model and its work must fit into memory, got out of memory, asking for 6.0 GiB more"
        in (capfd.readouterr().err)
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
