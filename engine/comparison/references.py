"""Reference curves: validation losses that others published or logged, to draw beside a run.

A loss on another validation set, or with another tokenizer, is not comparable; each label names
its set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.comparison.records import Record
from engine.errors import BadInput, nearest

FIRST_RUN = Path(__file__).parent / "assets" / "first_run.csv"
NOTE = "losses on different validation sets are not comparable"


@dataclass(frozen=True)
class Reference:
    """A published curve. points: (tokens, steps, loss); one whose tokens are None holds everywhere.

    None has hours: no source has training time as records.py counts it.
    """

    name: str
    label: str
    source: str
    validation_set: str
    points: tuple[tuple[float | None, float | None, float], ...]

    def over(self, x: str) -> list[tuple[float, float]]:
        """(x, loss) over an axis of records.AXES; [] if it is a level or has no such axis."""
        if x == "hours" or self.level is not None:
            return []
        return [(tokens if x == "tokens" else steps, loss) for tokens, steps, loss in self.points]

    @property
    def level(self) -> float | None:
        """The loss, if it is that of finished weights."""
        return self.points[0][2] if self.points[0][0] is None else None


# Tokens -> loss of llm.c's GPT-2 124M, 524,288 tokens per step.
_LLM_C = ((0.52e9, 4.317), (1.05e9, 3.859), (2.10e9, 3.618), (5.24e9, 3.392), (9.04e9, 3.2785), (10.26e9, 3.2722))
NAMES = ("gpt2-124m", "llm.c", "first-run")


def load(name: str, command: str) -> Reference:
    """The reference of that name. Raises BadInput if there is none."""
    if name == "gpt2-124m":
        text = "OpenAI's GPT-2 124M weights"
        return Reference(name, text, "build-nanogpt, play.ipynb", "FineWeb-Edu", ((None, None, 3.292),))
    if name == "llm.c":
        points = tuple((tokens, tokens / 524_288, loss) for tokens, loss in _LLM_C)
        return Reference(name, "llm.c, GPT-2 124M", "its log, six points of it", "FineWeb", points)
    if name == "first-run":
        lines = [line for line in FIRST_RUN.read_text().splitlines() if not line.startswith("#")]
        rows = [[float(value) for value in line.split(",")] for line in lines[1:]]
        points = tuple((tokens, steps, loss) for steps, tokens, loss in rows)
        return Reference(name, "the recipe we started from, 124M", "its log", "FineWeb-Edu, its own split", points)
    raise BadInput(f"{command}: --reference must be a curve that exists, got {name!r}{nearest(name, NAMES)}")


def load_all(names: Sequence[str], records: Sequence[Record], x: str, command: str) -> list[Reference]:
    """The references of these names. Raises BadInput if one fits no axis of the picture."""
    found = [load(name, command) for name in dict.fromkeys(names)]
    if found and (other := [record for record in records if record.tokenizer != "gpt2"]):
        raise BadInput(
            f"{command}: --reference must go with runs of GPT-2's tokens, got {other[0].run} of {other[0].unit}s; "
            "nats per token of another tokenizer are not comparable"
        )
    for reference in found:
        if reference.level is None and not reference.over(x):
            raise BadInput(
                f"{command}: --x must be tokens or steps with --reference {reference.name}, got {x}; its source has no "
                "training times"
            )
    return found
