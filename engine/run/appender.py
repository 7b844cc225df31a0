"""Appends to a file of the record. A disk that fails costs no run, and for a while nothing else."""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

MOST_WAITING = 32 << 20  # bytes that wait in memory, about 100,000 rows; beyond it the oldest are lost


class Appender:
    """Writes pieces, such as rows, to the end of a file, each in whole or not at all.

    What cannot be written waits in memory and is tried again with the next piece. No method raises
    OSError. What happens is said in a line, once when it begins and once when it is over.
    """

    def __init__(self, path: Path, unit: str, say: Callable[[str], None]):
        self._path, self._unit, self._say = path, unit, say
        self._file: BinaryIO | None = None
        self._end: int | None = None  # bytes of whole pieces in the file, once it was open
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._lost = 0
        self._is_behind, self._reason = False, ""  # of the last failure
        self._is_unsynced = False

    @property
    def waiting(self) -> int:
        """Number of pieces that could not be written yet."""
        return len(self._waiting)

    def append(self, piece: bytes) -> None:
        """Writes a piece after those that wait. It ends with a line end."""
        self._waiting.append(piece)
        self._waiting_bytes += len(piece)
        while self._waiting_bytes > MOST_WAITING:
            self._waiting_bytes -= len(self._waiting.popleft())
            self._lost += 1
        self.write()

    def write(self) -> None:
        """Writes what waits."""
        late = self.waiting
        try:
            if self._file is None:
                self._open()
            while self._waiting:
                self._write_whole(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            if not self._is_behind:
                self._say(
                    f"{self._path.name}: must be written, got: {error.strerror or error}; training goes on, each "
                    f"{self._unit} waits in memory and is tried again with the next"
                )
            self._is_behind, self._reason = True, error.strerror or str(error)
            self._leave()
            return
        if self._is_behind:
            self._is_behind = False
            self._say(f"{self._path.name}: can be written again, and holds the {self._counted(late)} that waited")

    def sync(self) -> None:
        """Writes what waits, and waits until the disk has it."""
        self.write()
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
            self._is_unsynced = False
        except OSError as error:
            if not self._is_unsynced:
                self._say(f"{self._path.name}: must reach the disk, got: {error.strerror or error}; training goes on")
            self._is_unsynced = True

    def close(self) -> None:
        """Writes what waits, and closes the file."""
        if self._waiting:
            self.write()
        if lost := self._lost + self.waiting:
            self._say(f"{self._path.name}: must be written, got: {self._reason}; {self._counted(lost)} missing")
        self._leave()

    def _counted(self, count: int) -> str:
        return f"{count:,} {self._unit}{'s' if count > 1 else ''}"

    def _open(self) -> None:
        self._file = file = self._path.open("a+b", buffering=0)
        size = file.seek(0, os.SEEK_END)
        if self._end is not None and size > self._end:
            size = file.truncate(self._end)  # part of a piece
        elif size > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line has lost its end
                size += file.write(b"\n")
        self._end = size

    def _write_whole(self, piece: bytes) -> None:
        left = memoryview(piece)
        while left:
            left = left[self._file.write(left) :]
        self._end += len(piece)

    def _leave(self) -> None:
        """Cuts off a part of a piece, and closes the file."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            if self._end is not None and file.seek(0, os.SEEK_END) > self._end:
                file.truncate(self._end)
        with contextlib.suppress(OSError):
            file.close()
