"""Exceptions that end a command with an error message, and the exit codes."""

import difflib
import sys
from collections.abc import Iterable

DONE, DAMAGED, BAD_INPUT, DIVERGED, LOST, STOPPED, INTERRUPTED = 0, 1, 2, 3, 4, 75, 130  # 75: EX_TEMPFAIL, try again


class BadInput(Exception):
    """Input that the user must correct, as "who: what must hold, got what; what to do".

    Exit code 2.
    """


class Diverged(Exception):
    """Weights, losses or gradients that must not be trained on or saved. Exit code 3."""


class Lost(Exception):
    """Loss of another process of the run: it died, hangs or cannot be reached. Exit code 4."""


class PeerFailed(Exception):
    """Error of another rank, which alone prints it. It ends this rank with the same exit code."""

    def __init__(self, rank: int, code: int, sentence: str):
        super().__init__(f"rank {rank}: {sentence}")
        self.code = code


def exit_code(error: BaseException) -> int:
    """Exit code of a command that ends with this error."""
    codes = {BadInput: BAD_INPUT, Diverged: DIVERGED, Lost: LOST, KeyboardInterrupt: INTERRUPTED}
    if isinstance(error, PeerFailed | SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, ModuleNotFoundError) and missing_package(error, "") is not None:
        return BAD_INPUT
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


# Packages that the code imports, as in setup.py.
PACKAGES = ("torch", "numpy", "tiktoken", "tyro", "rich", "safetensors", "matplotlib")


def missing_package(error: ModuleNotFoundError, command: str) -> str | None:
    """An error message if the missing module is a package that a command needs, else None."""
    package = (error.name or "").partition(".")[0]
    if package not in PACKAGES:
        return None
    return (
        f"{command}: the package {package} must be installed, got no module of that name; install it with: pip install "
        f"{package}"
    )


def warn(line: str) -> None:
    """Prints on this process's stderr."""
    print(line, file=sys.stderr, flush=True)


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggestion: '; did you mean "x"?', or a list of all known words if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; choose from {', '.join(known)}"
