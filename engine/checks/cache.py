"""Compiled code kept with a run: OUT/compile_cache/rankN_KEY.bin, so that a restart compiles nothing.

A file holds PyTorch's artifacts (torch.compiler.save_cache_artifacts: graphs of AOTAutograd and
Inductor, and the binaries of Inductor's Triton kernels) and, for a CPU, the libraries that Inductor
built. Our own Triton kernels lie in Triton's cache (TRITON_CACHE_DIR), which is not copied. KEY is a
digest of device, driver, versions, code and what of the config changes the graph. Each rank keeps
its own, since graphs name their device. What is loaded is run, so only what this user's processes
wrote is loaded: in front stands an HMAC with this user's secret key, which also finds damage.
"""

import contextlib
import hashlib
import hmac
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checks import facts
from model.files import BadFile, open_file

FOLDER = "compile_cache"
ARTIFACTS = "artifacts"  # name in the archive; all others are libraries, relative to Inductor's cache
DIGEST = 64  # bytes in front of the archive


class CompileCache:
    """The file of one rank. It is read before compiling and written after it, where the rank sees OUT."""

    def __init__(self, out: str | Path, about: dict, rank: int, warn: Callable[[str], None]):
        self.folder, self.rank, self.warn = Path(out) / FOLDER, rank, warn
        self.path = self.folder / f"rank{rank}_{facts.key(about)}.bin"

    def load(self) -> bool:
        """Gives what is kept to PyTorch's caches. False if nothing was, or if it cannot be used."""
        try:
            with open_file(self.path) as file:
                data = file.read()
        except FileNotFoundError:
            return False
        except (OSError, BadFile) as error:
            return self._ignore(getattr(error, "strerror", None) or str(error))
        digest, archive = data[:DIGEST], data[DIGEST:]
        try:
            if not hmac.compare_digest(_digest(archive), digest):
                return self._ignore("it is damaged, or another user's or machine's")
            with zipfile.ZipFile(io.BytesIO(archive)) as entries:
                for name in entries.namelist():
                    if name != ARTIFACTS:
                        _install(Path(_inductor_directory()) / name, entries.read(name))
                if torch.compiler.load_cache_artifacts(entries.read(ARTIFACTS)) is None:
                    return self._ignore("PyTorch cannot read it")
        except Exception as error:  # PyTorch unpickles, which may raise anything; compiling works without
            return self._ignore(f"{type(error).__name__}: {error}")
        return True

    def save(self) -> None:
        """Keeps what this process compiled, in place of what this rank kept before."""
        try:
            if not self.folder.parent.is_dir() or (saved := torch.compiler.save_cache_artifacts()) is None:
                return
            self.folder.mkdir(exist_ok=True)
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as entries:
                entries.writestr(ARTIFACTS, saved[0])
                for path in _loaded_libraries():
                    entries.write(path, path.relative_to(_inductor_directory()))
            data = archive.getvalue()
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_bytes(_digest(data) + data)
            temporary.replace(self.path)
            for old in self.folder.glob(f"rank{self.rank}_*.bin"):
                if old != self.path:
                    old.unlink(missing_ok=True)
        except Exception as error:  # PyTorch pickles, which may raise anything; the run goes on without
            why = getattr(error, "strerror", None) or repr(error)
            self.warn(f"train: compiled code is not kept in {self.folder}: {why}; a restart compiles again")

    def _ignore(self, why: str) -> bool:
        self.warn(f"train: compiled code in {self.path} is ignored, {why}; it is compiled again")
        return False


def _digest(archive: bytes) -> bytes:
    return hmac.new(facts.secret(), archive, hashlib.sha256).hexdigest().encode()


def _inductor_directory() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return os.path.realpath(cache_dir())


def _loaded_libraries() -> list[Path]:
    """Libraries of Inductor's cache that are in use by this process; none where the system does not tell."""
    inside = _inductor_directory() + os.sep
    with contextlib.suppress(OSError):
        mapped = {line.rpartition(" ")[2] for line in Path("/proc/self/maps").read_text().splitlines()}
        return sorted(Path(path) for path in mapped if path.startswith(inside) and path.endswith(".so"))
    return []


def _install(path: Path, content: bytes) -> None:
    """Writes a library unless it is there: another process may be using it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
