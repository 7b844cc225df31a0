"""Error messages for what the operating system refuses: room, permissions, limits, memory, threads.

Callers that know which file it was about write their own sentence, with `reason` and `advice`. For
what nobody has turned into one, `sentence` makes it from the error alone.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import missing_package

MUST, DO = 0, 1
ROOM = "must lie on a disk with room", "make room there, in bytes and in files (df -h, df -i)"
OPEN = "must be open to this user", "change its permissions (ls -ld)"
BROKEN = "must lie on a disk that works", "look for its errors (dmesg)"
FILES = "must be opened", "raise the limit on open files (ulimit -n)"
PROCESSES = "needs memory and processes", "free memory, raise the limits on them (ulimit -v, -u)"
READ_ONLY = "must lie on a disk that can be written", "mount it for writing"
PLACES = {kind[MUST] for kind in (ROOM, OPEN, BROKEN, READ_ONLY)}  # which another place mends
MISPLACED = {
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
}  # which another place mends too, for a file that is to be written
# By number: what must hold of the file, and what to do.
KINDS = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EROFS: READ_ONLY,
    errno.EACCES: OPEN,
    errno.EPERM: OPEN,
    errno.EFBIG: ("must be allowed to become so large", "raise the limit on the size of a file (ulimit -f)"),
    errno.ENAMETOOLONG: ("must have a name that its disk can hold", "choose a shorter name"),
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.EIO: BROKEN,
    errno.ESTALE: BROKEN,
    errno.ENOENT: ("must be there", "run the command again if it was removed meanwhile"),
    errno.EEXIST: ("must not be in the way", "move it away"),
    errno.ENOTEMPTY: ("must be empty", "move away what is in it"),
    errno.ENOTDIR: ("must lie in a directory", "move away what is in its place"),
    errno.EISDIR: ("must be a file", "move away what is in its place"),
    errno.ELOOP: ("must be no circle of links", "remove the link"),
    errno.EBUSY: ("must not be in use", "wait for what uses it"),
    errno.EAGAIN: PROCESSES,
    errno.ENOMEM: PROCESSES,
}
# Errors that have no type of their own: Python's threads, PyTorch's and safetensors' maps of files,
# and the loader of shared libraries.
NO_THREAD = re.compile(r"can't (start|allocate)( new)? (thread|lock)|[Rr]esource temporarily unavailable")
NO_MEMORY = re.compile(
    r"[Cc]annot allocate memory|[Nn]ot enough memory|failed to map segment|bad[_ ]alloc|bad allocation"
)
FILE_OF_PYTORCH = re.compile(r"unable to .*?<(.+)>.*: (.+) \((\d+)\)$")
NO_TEMPORARY = "No usable temporary directory"


def reason(error: BaseException) -> str:
    """What came: the system's words, such as "No space left on device"."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def advice(error: OSError, choice: str | None = None) -> str:
    """What to do about it, such as "make room there (df -h, df -i), or choose another --out".

    choice: what may be chosen instead of a file that was to be written. None: another place.
    """
    must, do = KINDS.get(error.errno, BROKEN)
    helps = must in PLACES or (choice is not None and error.errno in MISPLACED)
    return do + (f", or choose {choice or 'another place'}" if helps else "")


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names the file in an OSError that names none, as one of a write does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sentence(error: BaseException, command: str) -> str | None:
    """Error message for an exception that nobody has turned into one. None: a bug of ours, which keeps its traceback.

    command: its name, such as "gpt2 prepare".
    """
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error, command)
    if isinstance(error, RuntimeError) and (found := FILE_OF_PYTORCH.match(str(error))):
        error = OSError(int(found[3]), found[2], found[1])
    lines = [line.strip() for line in str(error).splitlines() if NO_MEMORY.search(line)]  # NumPy adds a page of advice
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | ImportError) and lines):
        return (
            f"{command}: its work must fit into memory, got {lines[0] if lines else 'out of memory'}; free memory, "
            "raise this process's limit (ulimit -v, or the container's), or use a machine with more"
        )
    if isinstance(error, RuntimeError) and NO_THREAD.search(str(error)):
        return (
            f"{command}: it must be able to start threads, got {error}; raise the limits on processes and memory "
            "(ulimit -u, ulimit -v, or the container's)"
        )
    if not isinstance(error, OSError) or error.errno not in KINDS:
        return None
    if NO_TEMPORARY in str(error):
        return (
            f"{command}: a temporary directory must be one that can be written, got {reason(error)}; make room there, "
            "or set TMPDIR to another"
        )
    what = error.filename if error.filename is not None else "a file or process that it needs"
    name = what.decode(errors="replace") if isinstance(what, bytes) else what
    return f"{command}: {name} {KINDS[error.errno][MUST]}, got {reason(error)}; {advice(error)}"
