"""Standard output and error that cannot end a command: printing is no part of a run.

A character that the stream's encoding lacks is written as a backslash escape. A write that fails (a
reader that has gone, a full disk, a lost terminal, a stream closed from the start) is reported once
on the other stream. What could not be written may be lost, and the next line is tried again.
"""

import atexit
import contextlib
import errno
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

TRAIN = "training goes on without it, metrics.jsonl has the numbers"
OTHER = "what it prints is lost"


class Stream:
    """A text stream whose write and flush raise no OSError. All else is the inner stream's.

    inner: None if the process was started with this stream closed.
    """

    def __init__(self, inner: TextIO | None, name: str):
        self.inner = open(os.devnull, "w") if inner is None else inner  # noqa: SIM115  (open to the end)
        self.was_closed, self.name = inner is None, name
        self.command = "gpt2"
        self.failure: str | None = None  # why the first write failed
        self.has_lost_its_reader = False

    def write(self, text: str) -> int:
        """Writes the text, with escapes where the encoding lacks a character."""
        try:
            if self.was_closed:
                raise OSError(errno.EBADF, "it is closed")
            try:
                self.inner.write(text)
            except UnicodeEncodeError:
                self.inner.write(text.encode(self.inner.encoding, "backslashreplace").decode(self.inner.encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._fail(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Writes each of the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Writes what is buffered."""
        try:
            self.inner.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _fail(self, error: Exception) -> None:
        self.has_lost_its_reader |= isinstance(error, BrokenPipeError)
        if self.failure is not None:
            return
        self.failure = getattr(error, "strerror", None) or str(error)
        is_train = self.command == "gpt2 train"
        other = _streams["stderr" if self.name == "stdout" else "stdout"]
        if is_train or not self.has_lost_its_reader:  # what `| head -1` has of other commands is all it wants
            line = f"{self.command}: {self.name} cannot be written ({self.failure}): {TRAIN if is_train else OTHER}"
            other.write(line + "\n")
            other.flush()


def program() -> str:
    """The `gpt2` command as a shell here finds it: how this process was started, or the one beside its Python.

    Such as "gpt2", ".venv/bin/gpt2" or "python -m engine.cli".
    """
    python, *words = sys.orig_argv or ["python"]
    script = next((word for word in words if not word.startswith("-")), "")
    if script == "engine.cli" and "-m" in words:
        return f"{_shortest(python)} -m engine.cli"
    if Path(script).name == "gpt2":
        return _shortest(script)
    if script == "engine.train" or script.endswith(os.path.join("engine", "train.py")):  # torchrun's, or run itself
        beside = Path(sys.executable).with_name("gpt2")
        return _shortest(str(beside)) if beside.is_file() else f"{_shortest(sys.executable)} -m engine.cli"
    return "gpt2"


def _shortest(path: str) -> str:
    """A program's name if PATH leads to it, else its path as typed, or the shorter way to it; in a shell's quotes."""
    found = shutil.which(Path(path).name)
    if found is not None and os.path.abspath(found) == os.path.abspath(path):
        return shlex.quote(Path(path).name)
    if not os.path.isabs(path):  # as typed
        return shlex.quote(path)
    return shlex.quote(min(os.path.relpath(path), path, key=len))


_streams: dict[str, Stream] = {}


def protect(command: str) -> None:
    """Puts a Stream in place of sys.stdout and sys.stderr. Safe to call again.

    command: the name that messages begin with, such as "gpt2 train".
    """
    for number in (0, 1, 2):  # else the next file opened would have the number, and get what C code prints
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if not _streams:
        atexit.register(_finish)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Stream):  # a test may have put another one in place
            stream = Stream(stream, name)
            setattr(sys, name, stream)
        stream.command = command
        _streams[name] = stream


def columns(stream: TextIO) -> int | None:
    """Width of the terminal behind a stream now, or None if it is not one or does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def has_failed() -> bool:
    """Whether something that was printed on stdout could not be written."""
    return _streams["stdout"].failure is not None


def is_whole() -> bool:
    """Whether all that was printed on stdout could be written, or its reader wanted no more."""
    stdout = _streams["stdout"]
    stdout.flush()
    return stdout.failure is None or stdout.has_lost_its_reader


def _finish() -> None:
    """Leaves nothing buffered, which Python would try again to write, and end with code 120."""
    for stream in _streams.values():
        stream.flush()
        if stream.failure is not None:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.inner.fileno())
                stream.inner.flush()
