"""Data sets and their weights: what `--data` names, one directory or several such as a:0.7 b:0.3.

A config holds them as one text: the words of a command line, joined as a shell would quote them.
"""

import os
import re
import shlex
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import NamedTuple

from engine.errors import BadInput

MOST_PARTS = 1 << 31  # of all weights as integers: their products must fit into int64
WEIGHTED = re.compile(r"(.+):([+-]?(?:[0-9]{1,18}\.?[0-9]{0,18}|\.[0-9]{1,18}))", re.DOTALL)


class Source(NamedTuple):
    """One of the data sets."""

    directory: str
    parts: int = 1  # its weight: sequences of this set among as many as the parts of all sets together


def parse(data: str) -> list[Source]:
    """The data sets that a text names, with weights in lowest terms.

    A text or a word that is a path is that directory, whatever its name. One without a weight is a
    single set. Raises BadInput if weights are missing or wrong, or a name has a NUL character.
    """
    if "\0" in data:
        raise BadInput(f"data: a name must have no NUL character, got {data!r}; name another directory")
    found = [_split(word) for word in _words(data)]
    if len(found) == 1:
        return [Source(found[0][0])]
    if bare := [directory for directory, weight in found if weight is None]:
        raise BadInput(
            f"data: each of several sets must have a weight, got none for {', '.join(bare)}; write "
            f"{bare[0].rstrip(':')}:0.5 for half of the sequences"
        )
    if low := [f"{directory}:{weight}" for directory, weight in found if Fraction(weight) <= 0]:
        raise BadInput(f"data: the weight of a set must be above 0, got {', '.join(low)}; leave that set out")
    places = [os.path.realpath(directory) for directory, _ in found]
    if twice := [found[i][0] for i, place in enumerate(places) if place in places[:i]]:
        raise BadInput(f"data: a set must be named once, got {', '.join(twice)} twice; add up its weights")
    weights = [Fraction(weight) for _, weight in found]
    whole = [int(weight * lcm(*(weight.denominator for weight in weights))) for weight in weights]
    parts = [part // gcd(*whole) for part in whole]
    if sum(parts) > MOST_PARTS:
        raise BadInput(
            f"data: weights must be integer parts of at most {MOST_PARTS:,} in all, got {sum(parts):,}; round them to "
            "fewer digits"
        )
    return [Source(directory, part) for (directory, _), part in zip(found, parts, strict=True)]


def _words(data: str) -> list[str]:
    """The words of the text, or the text itself if it is no list of sets."""
    if os.path.lexists(data):
        return [data]
    try:
        words = shlex.split(data)
    except ValueError:  # a quotation mark in a name
        return [data]
    return words if len(words) > 1 and any(_split(word)[1] is not None for word in words) else [data]


def _split(word: str) -> tuple[str, str | None]:
    """(directory, weight), such as a:0.7."""
    match = None if os.path.lexists(word) else WEIGHTED.fullmatch(word)
    return (match[1], match[2]) if match is not None else (word, None)


def labels(sources: list[Source]) -> list[str]:
    """What each set is called in metrics: the last part of its path, or all of it if two end alike."""
    last = [Path(source.directory).absolute().name for source in sources]
    return last if len(set(last)) == len(last) else [source.directory for source in sources]
