"""Disks that refuse at any point: a sentence, exit code 2, and the same command succeeds afterwards.

One operation of a command fails after the other: each opening of a file for writing, each directory
made, each rename, each fsync. Then every file ends at a size, as on a disk that is full.
"""

import errno
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, run

from engine import cli, durable
from engine.errors import BadInput
from engine.run import export, plots
from engine.tokens import prepare
from engine.tokens.preparation import workers
from engine.tuning import record
from engine.tuning.record import Setup, Tuning
from model.gpt2 import GPT2, GPT2Config

REFUSALS = [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.EACCES, errno.EFBIG]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fault:
    """Makes one operation below a directory fail. Python's audit events come before the operation."""

    def __init__(self):
        self.below, self.number, self.seen = None, None, 0
        self.hit = False

    def arm(self, below: Path | None, number: int | None) -> None:
        """number: of the operation that fails, from 1; None: none does."""
        self.below, self.number = below and str(below), number
        if below is not None:
            self.seen, self.hit = 0, False

    def audit(self, event: str, arguments: tuple) -> None:
        """The hook: counts what changes the disk."""
        if self.below is None or event not in ("open", "os.mkdir", "os.rename", "os.link"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        if event != "os.mkdir" or not os.path.isdir(arguments[0]):  # which makes nothing
            self.count(arguments[0])

    def count(self, path: object) -> None:
        if self.below is None or not isinstance(path, str | Path) or not str(path).startswith(self.below):
            return
        self.seen += 1
        if self.seen == self.number:
            self.hit = True
            number = REFUSALS[self.seen % len(REFUSALS)]
            raise OSError(number, os.strerror(number), str(path))


FAULT = Fault()
sys.addaudithook(FAULT.audit)  # for the life of the process; does nothing while it is not armed


@pytest.fixture
def fault(monkeypatch):
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        FAULT.count(os.readlink(f"/proc/self/fd/{descriptor}"))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    yield FAULT
    FAULT.arm(None, None)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{number} is a number\n" * 100)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Weights in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("released") / "hf"
    torch.manual_seed(0)
    GPT2(GPT2Config(1, 1, 8, 16, 257)).save_pretrained(folder)
    return folder


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refusal(command) -> str | None:
    """The sentence that a command ends with, or None if it succeeds."""
    try:
        command()
    except BadInput as error:
        return str(error)
    return None


def fails_at_each_operation(
    fault: Fault, folder: Path, command, undo=lambda: None, goes_on_from: tuple[str, ...] = ()
) -> int:
    """Number of operations. Each in turn fails with a sentence, leaves nothing, and the command then succeeds.

    command: raises BadInput, as a command does. undo: removes what a success has left.
    goes_on_from: begins of the paths that it may leave, from which it goes on.
    """
    before, number = contents(folder), 0
    while True:
        number += 1
        fault.arm(folder, number)
        message = refusal(command)
        fault.arm(None, None)
        if not fault.hit:
            assert message is None
            undo()
            return number - 1
        assert message is not None, f"operation {number} failed and the command did not say so"
        assert "must be" in message
        assert "\n" not in message
        assert "Errno" not in message
        left = contents(folder) - before
        assert {path for path in left if not path.startswith(goes_on_from)} <= ({"out"} if goes_on_from else set())
        if left or number % 3 == 1:
            command()
            undo()


def test_prepare_fails_at_each_write_and_then_succeeds(text, tmp_path, fault, monkeypatch):
    config = prepare.PrepareConfig(out=str(tmp_path / "out"), tokenizer="bytes", workers=1, shard_tokens=9000)
    whole = prepare.prepare([str(text)], config)
    shutil.rmtree(tmp_path / "out")
    count = fails_at_each_operation(
        fault,
        tmp_path,
        lambda: prepare.prepare([str(text)], config),
        lambda: shutil.rmtree(tmp_path / "out"),
        ("out/",),
    )
    assert count >= 3 + 2 * len(whole["shards"])  # the directory, the lock, the manifest; each is written and renamed
    assert prepare.prepare([str(text)], config) == whole


@pytest.mark.slow  # export, which has most of its code, is not
def test_import_fails_at_each_write_and_then_succeeds(released, tmp_path, fault):
    fails_at_each_operation(
        fault,
        tmp_path,
        lambda: export.import_weights(str(released), str(tmp_path / "out")),
        lambda: shutil.rmtree(tmp_path / "out"),
    )


def test_export_fails_at_each_write_and_then_succeeds(trained, tmp_path, fault):
    loaded = export.load_model(trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "load_model", lambda *_, **__: loaded)
        fails_at_each_operation(
            fault,
            tmp_path,
            lambda: export.export(str(trained), str(tmp_path / "out")),
            lambda: shutil.rmtree(tmp_path / "out"),
        )


def test_a_plot_and_a_tuning_fail_at_each_write_and_keep_the_old_file(tmp_path, fault):
    figure, _ = plots.new_figure("a", "b", "c", "d")
    setup = Setup("fp32", 1)
    tuning = Tuning("tiny", {}, {"device": "x"}, "2026-01-01", setup, setup, 1.0, 1.0)
    for write, path in [
        (lambda: plots.save(figure, tmp_path / "a.png"), tmp_path / "a.png"),
        (lambda: record.save(tuning, tmp_path / "a.json"), tmp_path / "a.json"),
        (lambda: record.check_writable(tmp_path / "a.json"), tmp_path / "a.json"),
    ]:
        path.write_text("old")
        assert fails_at_each_operation(fault, tmp_path, write, lambda path=path: path.write_text("old")) >= 1


def test_a_run_and_its_data_are_read_without_a_write(trained, shards, fault, capfd):
    count = 0
    for folder in (trained, shards):
        for command in (
            ["sample", "--run", str(trained), "--prompt", "def", "--max-new-tokens", "1"],
            ["eval", "--run", str(trained)],
            ["verify", str(trained), str(shards)],
        ):
            fault.arm(folder, None)
            assert run(*command) == 0
            fault.arm(None, None)
            count += fault.seen
    assert count == 0


@pytest.mark.parametrize("limit", [0, 100, 1000, 5000])
def test_a_file_that_ends_while_it_is_written_is_a_sentence_and_leaves_nothing(text, released, tmp_path, limit, capsys):
    config = prepare.PrepareConfig(out=str(tmp_path / "a"), tokenizer="bytes", workers=1)
    commands = [
        lambda: prepare.prepare([str(text)], config),
        lambda: export.import_weights(str(released), str(tmp_path / "b")),
        lambda: durable.write(tmp_path / "c", bytes(limit + 1)),
    ]
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in commands:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ
        try:
            with pytest.raises((BadInput, OSError), match="File too large") as info:
                command()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        assert info.type is BadInput or info.value.filename == str(tmp_path / "c")
        assert contents(tmp_path) == set()
    for command in commands:
        command()


# ---- What no caller turned into a sentence ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/a"), "/d/a must lie on a disk with room, got No space"),
        (PermissionError(errno.EACCES, "Permission denied", "/d/a"), "/d/a must be open to this user, got Permission"),
        (OSError(errno.EMFILE, "Too many open files", "/d/a"), "raise the limit on open files"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"/d/a"), "choose a shorter name"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "needs memory and processes"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "set TMPDIR"),
        (MemoryError(), "its work must fit into memory"),
        (RuntimeError("can't start new thread"), "must be able to start threads"),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), "its work must fit into memory"),
        (RuntimeError("unable to open file </d/a> in read-only mode: Too many open files (24)"), "/d/a must be opened"),
        (ImportError("Advice\n\na.so: failed to map segment from shared object\n"), "its work must fit into memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_system_refuses_is_a_sentence_of_the_command(error, said, monkeypatch, capfd):
    def refused(*_: object) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "plot", refused)
    assert run("plot") == 2
    message = capfd.readouterr().err.strip()
    assert message.startswith("gpt2 plot: ")
    assert said in message
    assert "; " in message
    assert "\n" not in message


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), ConnectionResetError(104, "x"), OSError("x")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    def buggy(*_: object) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "plot", buggy)
    with pytest.raises(type(error)):
        run("plot")


def _end(batch: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("failing", [1, 2, 3], ids=["a worker", "the pool's thread", "the thread of its queue"])
def test_workers_that_cannot_work_are_a_sentence_and_none_of_them_stays(failing, monkeypatch):
    started, plain = [], threading.Thread.start

    def start(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == failing - 1:
            raise RuntimeError("can't start new thread")
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    before = set(multiprocessing.active_children())
    with pytest.raises(BadInput, match=r"its 2 worker processes must be able to run, got .*; use --workers 1"):
        list(workers.map_in_order(_end if failing == 1 else abs, range(9), 2, max_pending=4))
    for child in set(multiprocessing.active_children()) - before:
        # One that waits for work would stay. is_alive() may be wrong while the pool's thread reaps the child.
        assert multiprocessing.connection.wait([child.sentinel], 10)


LIMITS = [
    *(("prepare", resource.RLIMIT_FSIZE, limit) for limit in (0, 20_000)),
    *(("prepare", resource.RLIMIT_NOFILE, limit) for limit in (5, 10, 14)),
    *(("import", resource.RLIMIT_FSIZE, limit) for limit in (0, 100, 2_000)),  # its weights have 13 kB
    ("import", resource.RLIMIT_NOFILE, 5),
    *((command, resource.RLIMIT_AS, limit) for command in ("prepare", "import") for limit in (60_000_000, 120_000_000)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kind", "limit"), LIMITS)
def test_a_small_limit_is_a_sentence_and_without_it_the_same_command_succeeds(
    text, released, tmp_path, command, kind, limit
):
    source = text if command == "prepare" else released
    flags = ["--tokenizer", "bytes", "--workers", "2"] if command == "prepare" else []
    line = [sys.executable, "-m", "engine.cli", command, str(source), "--out", str(tmp_path / "out"), *flags]
    options = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
    refused = subprocess.run(line, preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)), **options)
    assert refused.returncode == 2, refused.stderr
    assert "must be" in refused.stderr or "must fit" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert contents(tmp_path) == set()
    assert subprocess.run(line, **options).returncode == 0
