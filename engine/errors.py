"""The one error that is the user's to mend, and the words that help to mend it."""

import difflib
from collections.abc import Iterable


class BadInput(Exception):
    """Bad input, said as "who: what must hold, got what came; what to do". Commands print it and exit with 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest known word, or the list of known words when none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; choose from {', '.join(known)}"
