"""Directories outside --out that PyTorch writes even to train uncompiled: a temporary one, and the
caches of Inductor and Triton. One that cannot be written is replaced by one in OUT/scratch.
"""

import getpass
import os
import re
import tempfile
from pathlib import Path

from engine.device import HAS_STREAMS
from engine.distributed import Ranks
from engine.errors import warn

FOLDER = "scratch"
ROOM = 2**16  # bytes written to learn whether a disk is full


def prepare(out: str | Path, ranks: Ranks) -> None:
    """Sets TMPDIR, TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR of this process where they must change.

    Rank 0 prints what it replaced. Call it once OUT is there, and before an optimizer is built,
    which imports the compiler. Does nothing on a host that does not see OUT.
    """
    room = Path(out).absolute() / FOLDER
    if not room.parent.is_dir():
        return
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        tempfile.tempdir = _replace("TMPDIR", room, error, ranks)
    folders = {"TORCHINDUCTOR_CACHE_DIR": inductor_folder()}
    if ranks.device.type in HAS_STREAMS:
        folders["TRITON_CACHE_DIR"] = os.path.expanduser("~/.triton/cache")
    for variable, default in folders.items():
        folder = Path(os.environ.get(variable) or default)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(ROOM))
        except OSError as error:
            _replace(variable, room, error, ranks)


def _replace(variable: str, room: Path, error: OSError, ranks: Ranks) -> str:
    folder = room / variable.lower()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[variable] = str(folder)
    if ranks.is_first:
        warn(f"train: {variable} must be a directory that can be written, got {error}; {folder} is used")
    return str(folder)


def inductor_folder() -> str:
    """Where PyTorch keeps compiled code by default."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name, which torch 2.11 cannot bear
        user = f"uid_{os.getuid()}"
        os.environ.setdefault("USER", user)
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
