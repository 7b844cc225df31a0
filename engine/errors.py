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
