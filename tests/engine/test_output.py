"""Printing is no part of a run: whatever happens to stdout, a command ends as it would without."""

import errno
import io
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL
from runs import newest, run, steps, train

from engine import config, output
from engine.run import directory, metrics


class Failing(io.StringIO):
    """A stream whose writes fail, from the first or for a while."""

    encoding = "ascii"

    def __init__(self, number: int, times: int = 10**9):
        super().__init__()
        self.number, self.times = number, times

    def write(self, text: str) -> int:
        if self.times > 0:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        text.encode(self.encoding)
        return super().write(text)


def printing_to(stdout: io.StringIO | None, monkeypatch) -> io.StringIO:
    """Sets stdout, as if nothing had been printed yet. Returns what arrives on stderr."""
    monkeypatch.setattr(output, "_streams", {})
    monkeypatch.setattr(output.atexit, "register", lambda function: None)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return sys.stderr


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_run_whose_stdout_fails_trains_to_its_end_and_says_so_once(shards, tmp_path, monkeypatch, number):
    said = printing_to(Failing(number), monkeypatch)
    assert train(tmp_path / "run", shards, "--num-steps", "1") == 0
    assert said.getvalue() == (
        f"gpt2 train: stdout cannot be written ({os.strerror(number)}): training goes on without it, metrics.jsonl has "
        "the numbers\n"
    )
    assert [row["step"] for row in metrics.read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_a_line_after_a_failure_is_tried_again_and_what_the_encoding_lacks_is_escaped(monkeypatch):
    said = printing_to(Failing(errno.ENOSPC, times=2), monkeypatch)
    output.protect("gpt2 train")
    print("lost")
    print("é\ufffd\udcff", end="", flush=True)
    assert sys.stdout.getvalue() == r"\xe9\ufffd\udcff"
    assert len(said.getvalue().splitlines()) == 1
    assert (sys.stdout.encoding, sys.stdout.isatty()) == ("ascii", False)


def test_without_stdout_and_stderr_nothing_fails(monkeypatch):
    printing_to(None, monkeypatch)
    monkeypatch.setattr(sys, "stderr", None)
    output.protect("gpt2 train")
    print("to nobody", flush=True)
    print("to nobody", file=sys.stderr, flush=True)
    assert output.has_failed()


@pytest.mark.parametrize(
    ("number", "codes"),
    [(errno.EPIPE, {"verify": 1, "eval": 0, "plot": 0}), (errno.ENOSPC, {"verify": 1, "eval": 2, "plot": 0})],
)
def test_other_commands_end_with_the_true_code(trained, tmp_path, monkeypatch, number, codes):
    damaged = shutil.copytree(trained, tmp_path / "damaged")
    (newest(damaged) / "state.json").write_text("{}")
    paths = {"verify": [str(damaged)], "eval": ["--run", str(trained)], "plot": ["--run", str(trained)]}
    for command, code in codes.items():
        said = printing_to(Failing(number), monkeypatch)
        assert run(command, *paths[command]) == code
        is_said = f"gpt2 {command}: stdout cannot be written (No space left on device): what it prints is lost\n"
        assert said.getvalue() == (is_said if number == errno.ENOSPC else "")


def test_a_run_whose_reader_leaves_exits_with_0_and_python_adds_nothing(shards, tmp_path):
    """As `MPLBACKEND=nonsense gpt2 train ... | head -1`, under a name that is no UTF-8 and holds formulas."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff $\\frac$ \xe5\xad\xa6")
    command = [sys.executable, "-m", "engine.cli", "train", *SMALL, "--data", str(shards), "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense"}
    with subprocess.Popen(
        [*command, "--num-steps", "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith(rb"\udcff $\frac$ \u5b66: ")
        process.stdout.close()
        printed = process.stderr.read().decode().splitlines()
        assert process.wait() == 0
    assert [line[:56] for line in printed] == ["gpt2 train: stdout cannot be written (Broken pipe): trai"]
    assert {"loss_curve.png", "lr_schedule.png"} <= set(os.listdir(out))


def test_a_run_in_a_directory_that_is_not_utf_8_goes_on_and_is_sampled(shards, tmp_path, capfd):
    out = tmp_path / os.fsdecode(b"\xff")
    for count in ("1", "2"):
        assert train(out, shards, "--num-steps", count, "--prompt", "\udcffa", "--resume-changed") == 0
    assert steps(out)[-1] == 2
    assert run("sample", "--run", str(out), "--prompt", "a", "--max-new-tokens", "1") == 0
    assert run("export", "--run", str(out), "--out", str(out) + "hf") == 0
    assert run("import", str(out) + "hf", "--out", str(out) + "again") == 0
    assert "cannot be written" not in capfd.readouterr().err


# ---- The command as it was called ---------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A directory with .venv/bin/gpt2, which PATH does not hold; it is the current one."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("gpt2", "python"):
        (tmp_path / ".venv" / "bin" / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    return tmp_path


CALLED = {
    "python .venv/bin/gpt2 train tiny": ".venv/bin/gpt2",  # as the kernel starts a script
    "python HERE/.venv/bin/gpt2 sample": ".venv/bin/gpt2",
    "python -m engine.cli train": "python -m engine.cli",
    "HERE/.venv/bin/python -u engine/train.py tiny": ".venv/bin/gpt2",  # as torchrun starts a rank
    "HERE/.venv/bin/python /clone/engine/train.py tiny": ".venv/bin/gpt2",
    "python -c pass": "gpt2",
}


@pytest.mark.parametrize("call", CALLED)
def test_a_command_is_printed_as_a_shell_here_finds_it(call, environment, monkeypatch):
    words = call.replace("HERE", str(environment)).split()
    monkeypatch.setattr(sys, "orig_argv", words)
    assert output.program() == CALLED[call]
    monkeypatch.setenv("PATH", str(environment / ".venv" / "bin"))  # as activate does
    assert output.program() == ("gpt2" if "gpt2" in CALLED[call] else CALLED[call])


def test_without_a_gpt2_beside_python_the_module_is_named(environment, monkeypatch):
    (environment / ".venv" / "bin" / "gpt2").unlink()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "engine/train.py"])
    assert output.program() == ".venv/bin/python -m engine.cli"


def test_what_a_run_says_to_try_is_a_command_that_runs(trained, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", ".venv/bin/gpt2", "train"])
    last = directory.report(config.load(trained), "byte", "done", 2, 1.0).splitlines()[-1]
    assert last.startswith("try: .venv/bin/gpt2 sample --run ")
