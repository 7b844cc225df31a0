"""Lock of a directory: one process at a time writes a run or a data set.

DIRECTORY/.lock is a line of JSON that names the holder. A holder removes it at its end; one that
was killed leaves it. It is hidden because it is no part of a run or data set: `others` is what a
directory holds besides. A new holder needs the consent of two rules:

    the kernel's    The holder has a POSIX record lock on the file, which ends with its process.
                    Forked workers do not inherit it. Any close of the file in the holder's process
                    ends it too, so nothing else there may open the file. Some file systems have no
                    such locks, or none that other hosts see.
    the file's      A holder on this kernel is alive if a process has its number and start time. One
                    that cannot be seen (another host, another boot, another container) is alive if
                    its counter, raised every BEAT seconds, changes within STALE seconds.

The lock of a dead holder is taken over. If that holder was only suspended, it finds another's name
in the file and exits at once with code 4. An exception would still write while it closes the run.
"""

import contextlib
import errno
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from engine import system
from engine.errors import LOST, BadInput, warn

try:
    import fcntl
except ImportError:  # not Unix: the file's rule decides alone
    fcntl = None

NAME = ".lock"
BEAT = 5.0  # seconds between two values of a holder's counter
STALE = 20.0  # seconds without a new one after which an invisible holder counts as dead
SETTLE = 1.0  # seconds in which two processes without a kernel's lock may overwrite each other's line
PAUSE, ATTEMPTS = 0.1, 100  # seconds between attempts, and their number, while a killed process still dies
COUNTER = len('{"beat": "')  # position of the counter in the file
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}

_acquiring = threading.Lock()  # one attempt at a time in this process
_live: dict[str, "Lock"] = {}  # locks of this process, by nonce


class Lock:
    """A directory that this process alone may write. Made by `acquire`."""

    def __init__(self, path: Path, file: int, holder: dict, command: str, made: bool):
        self.path, self.command, self.nonce, self.inode = path, command, holder["nonce"], _inode(os.fstat(file))
        self._file: int | None = file
        self._made, self._pid, self._mutex, self._ended = made, os.getpid(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        _live[self.nonce] = self

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Ends this process with exit code 4 if the directory is no longer its own."""
        with self._mutex:
            problem = None
            if self._file is not None:
                with contextlib.suppress(OSError):  # a file system that does not answer says nothing about holders
                    problem = self._problem()
        if problem is not None:
            print(
                f"{self.command}: --out {self.path.parent} must have one writer, {problem}; this process "
                "writes nothing more there and ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)

    def rename(self, target: Path) -> None:
        """Renames the directory, and holds it under its new name."""
        with self._mutex:
            self.path.parent.rename(target)
            self.path = target / NAME

    def release(self) -> None:
        """Unlocks the directory, unless another has taken it over. Removes it if `acquire` made it and it is empty."""
        with self._mutex:
            if self._file is None or os.getpid() != self._pid:
                return
            self._ended.set()
            with contextlib.suppress(OSError):
                if self._problem() is None:
                    self.path.unlink()
                    if self._made:
                        self.path.parent.rmdir()
            os.close(self._file)
            self._file = None
            _live.pop(self.nonce, None)
        self._thread.join(BEAT)  # outside the mutex, which it may wait for; a disk may not answer it

    def _problem(self) -> str | None:
        """Why the directory is no longer this process's, or None."""
        holder = _read_again(self.path, self._file)
        if holder is None:
            return f"but it was moved, or its {NAME} was deleted"
        if holder.get("nonce") != self.nonce:
            return f"but {_name(holder)} took it over when this process gave no sign of life for {STALE:g} s"
        return None

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT):
            self.check()
            beats += 1
            with self._mutex, contextlib.suppress(OSError):
                if self._file is not None:
                    # Only the counter: were the file another's by now, its name must stay.
                    os.pwrite(self._file, b"%010d" % beats, COUNTER)
                    os.fsync(self._file)


def check_all() -> None:
    """Ends this process with exit code 4 if a directory that it has locked is no longer its own."""
    for lock in list(_live.values()):
        if lock._pid == os.getpid():
            lock.check()


def others(directory: str | Path) -> list[Path]:
    """What a directory holds besides its lock."""
    return [path for path in Path(directory).iterdir() if path.name != NAME]


def acquire(directory: str | Path, command: str) -> Lock:
    """Makes the directory if it is missing, and locks it. Takes over the lock of a holder that is dead.

    command: of gpt2, for the error message. May take a little over STALE seconds. Raises BadInput
    if another process holds the lock, or the directory cannot be written.
    """
    with _acquiring:
        was_there = os.path.isdir(directory)
        try:
            return _acquire(Path(directory), command)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            with contextlib.suppress(OSError):
                if not was_there:
                    os.rmdir(directory)
            if isinstance(error, RuntimeError):
                raise
            raise BadInput(
                f"{command}: --out must be a directory that can be written, got {directory}: {error.strerror}; "
                f"{system.advice(error, 'another --out')}"
            ) from error


def _acquire(directory: Path, command: str) -> Lock:
    path, silent, made, holder = directory / NAME, None, False, {}
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        made = made or not directory.is_dir()
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_own(path, command)  # before the file is opened: closing it would end the kernel's lock
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever made the directory has removed it
            continue
        lock = None
        try:
            locked, holder = _lock(file), _read(file)
            if not _is_at(path, file):  # its holder has removed it
                continue
            alive = _is_alive(holder, path, file, locked)
            if alive is None and holder == silent:
                alive = False
            if alive or (alive is None and locked is False and holder.get("boot") == _boot()):
                raise _refusal(path, command, holder)
            if alive is False and locked is False:  # the process still dies, or another takes over from it
                if holder == silent:  # its host is gone, and the server of the file system has not noticed
                    path.unlink(missing_ok=True)
                continue
            if alive is False:
                before, is_sure = holder or silent or {}, bool(locked) and silent is None
                try:
                    lock = Lock(path, file, _take(path, file, command, before, is_sure, locked is True), command, made)
                except (OSError, RuntimeError):  # a full disk, or no thread can be started
                    if locked:
                        path.unlink(missing_ok=True)
                    raise
                return lock
        finally:
            if lock is None:
                os.close(file)
        if _changes(path, command, holder):
            raise _refusal(path, command, holder)
        silent = holder
    raise _refusal(path, command, holder)


def _take(path: Path, file: int, command: str, before: dict, is_sure: bool, locked: bool) -> dict:
    """Writes this process's name into the file, and returns it.

    before: the dead holder. locked: whether this process has the kernel's lock. is_sure: whether
    no other process can do the same meanwhile. If one can, the last to write has the lock.
    """
    holder = {"beat": f"{0:010d}", "nonce": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    holder |= {"start": (_stat(os.getpid()) or ("", ""))[1], "boot": _boot(), "namespace": _namespace()}
    holder |= {"begun": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command, "file": _place(path, file)}
    holder["kernel"] = os.fstat(file).st_dev if locked else None  # device on which it has the kernel's lock
    line = json.dumps(holder).encode() + b"\n"
    os.pwrite(file, line, 0)
    os.ftruncate(file, len(line))
    os.fsync(file)
    if not is_sure:
        time.sleep(SETTLE)
        now = _read_again(path, file)
        if now is None or now.get("nonce") != holder["nonce"]:
            raise _refusal(path, command, now or {})
    if before:
        warn(f"{command}: --out {path.parent}: taken over from {_name(before)}, which is gone")
    return holder


def _refusal(path: Path, command: str, holder: dict) -> BadInput:
    return BadInput(
        f"{command}: --out {path.parent} must have one writer, got {_name(holder)} there; wait for it, stop it or "
        "choose another --out"
    )


def _refuse_own(path: Path, command: str) -> None:
    """Raises BadInput if this process has locked the directory already."""
    with contextlib.suppress(FileNotFoundError):
        inode = _inode(path.stat())
        for lock in list(_live.values()):
            if lock.inode == inode and lock._pid == os.getpid():
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": lock.command}
                raise _refusal(path, command, holder)


def _name(holder: dict) -> str:
    if "pid" not in holder:
        return "another process"
    begun = f", since {holder['begun']}" if "begun" in holder else ""
    return f"process {holder['pid']} of host {holder['host']} (gpt2 {holder['command']}{begun})"


# ---- Is the holder alive? -----------------------------------------------------------------------------------------


def _is_alive(holder: dict, path: Path, file: int, locked: bool | None) -> bool | None:
    """Whether the holder that the file names is alive; None if that cannot be seen from here.

    locked: as from `_lock`.
    """
    if not holder:  # a new file
        return False
    if not _boot() or holder.get("boot") != _boot():
        return None
    if holder.get("namespace") != _namespace():
        # Of another container, or a restart of this one: dead, as the kernel has ended its lock. But through
        # mounts of their own (FUSE), which are other devices, each process would get a lock.
        return False if locked and holder.get("kernel") == os.fstat(file).st_dev else None
    # A copy of a directory has its holder's name too, but another path and inode.
    if locked and all(was != now for was, now in zip(holder["file"], _place(path, file), strict=True)):
        return False
    if holder["pid"] == os.getpid():
        return holder["nonce"] in _live  # this process replaced itself by exec, or a release could not remove the file
    if (stat := _stat(holder["pid"])) is not None:
        return stat[1] == holder["start"] and stat[0] not in ("Z", "X")
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return None  # another user's, hidden by the options that /proc is mounted with


def _changes(path: Path, command: str, holder: dict) -> bool:
    """Waits STALE seconds. Whether the holder raised its counter meanwhile.

    Counts polls, not time: were this process and the holder suspended together, neither could act.
    Opens the file anew each time: only then NFS asks the server.
    """
    warn(
        f"{command}: --out {path.parent} was locked by {_name(holder)}, which cannot be seen from here; waiting up to "
        f"{STALE:g} s for a sign of life"
    )
    polls = 20
    for _ in range(polls):
        time.sleep(STALE / polls)
        now = _read_at(path)
        if now != holder:
            return now is not None and now.get("nonce") == holder.get("nonce")
    return False


def _stat(pid: int) -> tuple[str, str] | None:
    """State of a process, and its start in clock ticks after boot; None if /proc does not show it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]  # fields 3 and 22 of proc(5)
    except (OSError, IndexError):
        return None


@functools.cache
def _boot() -> str:
    """A name for this kernel since it booted; "" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    """The namespace in which this process's number counts; "" where there is none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


# ---- The file -----------------------------------------------------------------------------------------------------


def _lock(file: int) -> bool | None:
    """Takes the kernel's lock. False: another process has it. None: this file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _read(file: int) -> dict:
    """The holder that the file names, {} if it is empty, {"text": ...} if it cannot be read as one."""
    text = os.pread(file, 1 << 16, 0)
    if not text:
        return {}
    try:
        holder = json.loads(text.partition(b"\n")[0])
        kinds = {"nonce": str, "host": str, "pid": int, "start": str, "begun": str, "command": str, "file": list}
        if all(isinstance(holder[name], kind) for name, kind in kinds.items()) and len(holder["file"]) == 2:
            return holder
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return {"text": text}


def _read_at(path: Path) -> dict | None:
    """The holder that the file at the path names, None if there is no file.

    Ends a kernel's lock that this process has on it.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _read(file)
    finally:
        os.close(file)


def _read_again(path: Path, file: int) -> dict | None:
    """The holder that this process's file names by now; None if the file is gone from its path."""
    # NFS asks its server when a file is opened or a lock is taken, and this is held already if it can be.
    holder = _read_at(path) if _lock(file) is None else _read(file)
    return holder if _is_at(path, file) else None


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return _inode(path.stat()) == _inode(os.fstat(file))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            return False
        raise


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _place(path: Path, file: int) -> list:
    return [os.fstat(file).st_ino, str(path.resolve())]
