"""How a command ends: the one error that is the user's to mend, the ways a run stops, and their exit codes."""

import difflib
from collections.abc import Iterable

DONE, DAMAGED, BAD_INPUT, DIVERGED, LOST, STOPPED, INTERRUPTED = 0, 1, 2, 3, 4, 75, 130  # 75 is EX_TEMPFAIL: try again


class BadInput(Exception):
    """Bad input, said as "who: what must hold, got what came; what to do". Commands print it and exit with 2."""


class Diverged(Exception):
    """Numbers that must not be trained on or saved: exit code 3."""


class Lost(Exception):
    """Another process of the run that died, hangs or cannot be reached: exit code 4."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest known word, or the list of known words when none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; choose from {', '.join(known)}"
