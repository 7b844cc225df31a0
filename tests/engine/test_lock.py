"""One writer per directory: living holders are never pushed aside, dead ones never in the way."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from engine import lock
from engine.errors import BadInput

HOLD = """
import os, sys
from engine import lock
lock.BEAT = float(sys.argv[2])
held = lock.acquire(sys.argv[1], "train")
if len(sys.argv) > 3:
    exec(sys.argv[3])
print(os.getpid(), flush=True)
for line in sys.stdin:
    exec(line)
"""


@contextlib.contextmanager
def holder(out: Path, beat: float = 60.0, code: str = "") -> Iterator[subprocess.Popen]:
    """A process that holds the directory's lock until it is killed. Runs `code`, then each line of its stdin."""
    command = [sys.executable, "-c", HOLD, str(out), str(beat), *([code] if code else [])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        assert int(process.stdout.readline()) == process.pid
        yield process
    finally:
        process.kill()
        process.communicate()


def content(out: Path) -> dict:
    return json.loads((out / lock.NAME).read_text())


def forge(out: Path, **changed: object) -> dict:
    """Writes a lock of a holder that is gone, or of another host."""
    (out / lock.NAME).unlink(missing_ok=True)
    with lock.acquire(out, "train"):
        forged = content(out) | {"host": "elsewhere", "pid": 2**22 + 1, "nonce": "0" * 32} | changed
    (out / lock.NAME).write_text(json.dumps(forged) + "\n")
    forged["file"] = [(out / lock.NAME).stat().st_ino, str(out / lock.NAME)]
    (out / lock.NAME).write_text(json.dumps(forged) + "\n")
    return forged


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.4), ("SETTLE", 0.05), ("PAUSE", 0.01)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def no_kernel_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)


def test_a_second_writer_is_refused_and_told_who_writes_and_since_when(out):
    with holder(out) as first:
        before = (out / lock.NAME).read_bytes()
        for number in (signal.SIGCONT, signal.SIGSTOP):  # a suspended process is alive too
            first.send_signal(number)
            with pytest.raises(BadInput) as refused:
                lock.acquire(out, "prepare")
            assert str(refused.value) == (
                f"prepare: --out {out} must have one writer, got process {first.pid} of host {socket.gethostname()} "
                f"(gpt2 train, since {content(out)['begun']}) there; wait for it, stop it or choose another --out"
            )
        assert (out / lock.NAME).read_bytes() == before


def test_a_killed_holder_and_its_workers_are_in_nobody_s_way(out, capfd):
    with holder(out, code="child = os.fork()\nif child == 0: import time; time.sleep(60); os._exit(0)") as first:
        worker = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())
        try:
            first.kill()
            first.wait()
            with lock.acquire(out, "train"):
                assert content(out)["pid"] == os.getpid()
        finally:
            os.kill(worker, signal.SIGKILL)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"train: --out {out}: taken over from process {first.pid} of host ")
    assert line.endswith(", which is gone")
    assert list(out.iterdir()) == []


def test_a_process_locks_a_directory_once_and_keeps_it_when_it_tries_again(out):
    refused = []

    def again():
        with pytest.raises(BadInput, match=f"got process {os.getpid()} of host .* there; wait for it"):
            lock.acquire(out / ".." / "out", "train")
        refused.append(True)

    with lock.acquire(out, "train"):
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        again()
        assert refused == [True, True]
        code = "import sys; from engine import lock; lock._is_alive = lambda *_: False; lock.ATTEMPTS = 2\n"
        code += "try: lock.acquire(sys.argv[1], 'train')\nexcept lock.BadInput: sys.exit(7)"
        assert subprocess.run([sys.executable, "-c", code, out], cwd=ROOT).returncode == 7  # the kernel's lock is whole
    with lock.acquire(out, "train"):
        pass


def test_a_directory_that_was_made_for_nothing_is_removed_and_no_other(tmp_path, out):
    with lock.acquire(tmp_path / "new", "train"), lock.acquire(out, "train"):
        assert lock.others(tmp_path / "new") == []
    with lock.acquire(tmp_path / "used", "train"):
        (tmp_path / "used" / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "used"]
    (tmp_path / "file").touch()
    with pytest.raises(
        BadInput, match=r"train: --out must be a directory that can be written, got .*file: File exists"
    ):
        lock.acquire(tmp_path / "file", "train")


def test_a_file_that_its_holder_removes_meanwhile_is_not_the_lock(out, quick, monkeypatch):
    plain, calls = lock._lock, []

    def lock_late(file):
        calls.append(file)
        if len(calls) == 1:  # opened already, and locked only when the holder before has released it
            (out / lock.NAME).unlink()
        return plain(file)

    monkeypatch.setattr(lock, "_lock", lock_late)
    with lock.acquire(out, "train"):
        assert content(out)["pid"] == os.getpid()


ANOTHER_BOOT = {"boot": "00000000-0000-0000-0000-000000000000"}


@pytest.mark.parametrize("has_kernel_locks", [True, False])
@pytest.mark.parametrize(
    "forged",
    [ANOTHER_BOOT, {"namespace": "pid:[1]", "kernel": None}, {"boot": ""}],
    ids=["another boot", "another container", "no boot"],
)
def test_a_holder_that_cannot_be_seen_is_alive_while_its_counter_moves(
    out, quick, request, capfd, forged, has_kernel_locks
):
    if not has_kernel_locks:
        request.getfixturevalue("no_kernel_locks")
    there, ended = forge(out, **forged), threading.Event()

    def beat():
        count = 0
        while not ended.wait(0.05):
            count += 1
            (out / lock.NAME).write_text(json.dumps(there | {"beat": f"{count:010d}"}) + "\n")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(BadInput, match="got process 4194305 of host elsewhere"):
            lock.acquire(out, "train")
    finally:
        ended.set()
        thread.join()
    assert content(out)["nonce"] == there["nonce"]
    capfd.readouterr()
    with lock.acquire(out, "train"):
        assert content(out)["pid"] == os.getpid()
    waits, takes = capfd.readouterr().err.splitlines()
    assert "(gpt2 train, since " in waits
    assert waits.endswith("which cannot be seen from here; waiting up to 0.4 s for a sign of life")
    assert "taken over from process 4194305 of host elsewhere" in takes
    assert not (out / lock.NAME).exists()


def test_a_container_that_is_started_again_does_not_wait_for_the_one_that_was_killed(out, quick, capfd):
    """The kernel is the same, and has ended the lock of the process that cannot be seen."""
    forge(out, boot=lock._boot(), namespace="pid:[1]", kernel=out.stat().st_dev)
    with lock.acquire(out, "train"):
        assert content(out)["kernel"] == out.stat().st_dev
    assert "waiting" not in capfd.readouterr().err


def test_a_container_with_a_mount_of_its_own_is_waited_for(out, quick, capfd):
    """Through another mount of the same files both get the kernel's lock."""
    forge(out, boot=lock._boot(), namespace="pid:[1]", kernel=out.stat().st_dev + 1)
    with lock.acquire(out, "train"):
        assert "waiting" in capfd.readouterr().err


@pytest.mark.parametrize("has_kernel_locks", [True, False])
def test_another_process_with_a_dead_holder_s_number_is_not_the_holder(out, request, has_kernel_locks):
    if not has_kernel_locks:
        request.getfixturevalue("no_kernel_locks")
        request.getfixturevalue("quick")
    forge(out, pid=os.getppid(), start="1")
    lock.acquire(out, "train").release()
    forge(out, pid=os.getppid(), start=lock._stat(os.getppid())[1])
    with pytest.raises(
        BadInput, match=f"got process {os.getppid()} of"
    ):  # this is that process, wherever it has its lock
        lock.acquire(out, "train")
    forge(out, pid=os.getpid(), start=lock._stat(os.getpid())[1])  # an earlier lock of this process
    lock.acquire(out, "train").release()
    zombie = subprocess.Popen(["true"])
    while lock._stat(zombie.pid)[0] != "Z":
        time.sleep(0.01)
    forge(out, pid=zombie.pid, start=lock._stat(zombie.pid)[1])
    lock.acquire(out, "train").release()
    zombie.wait()


@pytest.mark.parametrize(
    "text", [b"", b"\0" * 300, b"null\n", b'{"pid": 1}', b"\xff"], ids=["empty", "zeros", "null", "little", "no text"]
)
def test_a_lock_file_that_names_nobody_holds_nothing(out, quick, text):
    (out / lock.NAME).write_bytes(text)
    with lock.acquire(out, "train"):
        assert content(out)["pid"] == os.getpid()


def test_a_copy_of_a_directory_in_use_is_nobody_s(out, tmp_path):
    with holder(out):
        shutil.copytree(out, tmp_path / "copy")
        lock.acquire(tmp_path / "copy", "train").release()


def test_a_lock_that_a_server_keeps_for_a_host_that_is_gone_is_replaced(out, quick):
    gone = f"import json; there = lock._read(held._file) | {ANOTHER_BOOT}; "
    gone += "os.pwrite(held._file, json.dumps(there).encode(), 0)"
    with holder(out, beat=0.05, code=gone), pytest.raises(BadInput, match="must have one writer"):
        lock.acquire(out, "train")
    (out / lock.NAME).unlink()
    with holder(out, code=gone) as silent:
        with lock.acquire(out, "train"):
            print("held.check()", file=silent.stdin, flush=True)  # it was cut off, and comes back
            assert silent.wait() == 4
            assert content(out)["pid"] == os.getpid()
        assert "but it was moved, or its .lock was deleted" in silent.stderr.read()


def test_without_the_kernel_s_locks_the_last_to_write_has_it(out, quick, no_kernel_locks, monkeypatch):
    def overwrite(seconds):
        if seconds == lock.SETTLE:
            (out / lock.NAME).write_text(json.dumps(there) + "\n")

    there = forge(out)
    (out / lock.NAME).unlink()
    monkeypatch.setattr(lock.time, "sleep", overwrite)
    with pytest.raises(BadInput, match="got process 4194305 of host elsewhere"):
        lock.acquire(out, "train")
    assert content(out) == there


def test_a_holder_that_was_taken_over_ends_with_code_4_and_touches_nothing(out, tmp_path):
    there = {"nonce": "1" * 32, "host": "elsewhere", "pid": 7, "command": "train", "begun": "2026-01-01 00:00:00"}
    with holder(out, beat=0.05) as first:
        text = json.dumps(there | {"beat": "000", "start": "", "file": ["", ""]}) + "\n"
        (out / lock.NAME).write_text(text)  # a shorter line: a beat in place must not make two of it
        assert first.wait(10) == 4
        assert "must have one writer, but process 7 of host elsewhere (gpt2 train, since 2026" in first.stderr.read()
        assert "1" * 32 in (out / lock.NAME).read_text()
    (out / lock.NAME).unlink()
    with holder(out) as first:
        (out / lock.NAME).write_text(text)
        print("held.release(); print(list(lock._live), flush=True)", file=first.stdin, flush=True)
        assert first.stdout.readline() == "[]\n"
        assert (out / lock.NAME).read_text() == text
    (out / lock.NAME).unlink()
    with holder(out) as first:
        out.rename(tmp_path / "elsewhere")
        print("lock.check_all()", file=first.stdin, flush=True)
        assert first.wait(10) == 4
    assert not out.exists()


RACE = """
import os, sys, time
from engine import lock
ready, start = os.pipe(), os.pipe()
children = []
for _ in range(12):
    if (child := os.fork()) == 0:
        os.close(start[1])
        os.read(start[0], 1)
        try:
            lock.acquire(sys.argv[1], "train")
        except lock.BadInput as error:
            winner = lock._read_at(lock.Path(sys.argv[1], lock.NAME))["pid"]
            os._exit(2 if f"got process {winner} of" in str(error) else 3)
        time.sleep(1.5)
        os._exit(0)
    children.append(child)
os.close(start[1])
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_of_twelve_that_take_over_one_dead_holder_s_lock_one_wins_and_the_others_name_it(out):
    forge(out)
    done = subprocess.run([sys.executable, "-c", RACE, out], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{[0] + [2] * 11}\n", done.stderr
    assert done.stderr.count("taken over from process 4194305") == 1


def test_a_release_leaves_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.Lock, "_beat", lambda self: (self._ended.wait(), time.sleep(0.3)))  # one that ends late
    with lock.acquire(tmp_path / "out", "train"):
        assert "lock" in [thread.name for thread in threading.enumerate()]
    assert "lock" not in [thread.name for thread in threading.enumerate()]
