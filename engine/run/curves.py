"""Curves of a run in bounded memory: what a picture can show of any number of rows."""

import os
from pathlib import Path
from typing import Any

from engine.errors import BadInput
from engine.run import rows

SCORES = ("hellaswag_acc_norm", "hellaswag_acc")  # fractions, in rows of runs that are scored while they train
MOST_POINTS = {"loss": 4096, "lr": 4096, "val_loss": 2048} | dict.fromkeys(SCORES, 2048)  # even numbers


class Curve:
    """At most `most` points (tokens, value), each the mean of as many neighbours.

    When they are full, neighbours are merged. The first, the lowest and the last value are kept as
    they are.
    """

    def __init__(self, most: int):
        self._most = most
        self._points: list[tuple[float, float]] = []
        self._stride = 1  # values in a point
        self._count, self._sums = 0, (0.0, 0.0)  # of the point that is not full yet
        self._kept: tuple[tuple[float, float], ...] = ()  # first, lowest, last

    def add(self, tokens: float, value: float) -> None:
        """Adds a value."""
        first, lowest = self._kept[:2] or ((tokens, value),) * 2
        self._kept = first, lowest if lowest[1] <= value else (tokens, value), (tokens, value)
        self._count, self._sums = self._count + 1, (self._sums[0] + tokens, self._sums[1] + value)
        if self._count == self._stride:
            self._points.append(self._mean())
            self._count, self._sums = 0, (0.0, 0.0)
        if len(self._points) == self._most:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [((x + to_x) / 2, (y + to_y) / 2) for (x, y), (to_x, to_y) in pairs]
            self._stride *= 2

    def points(self) -> list[tuple[float, float]]:
        """All points, by tokens."""
        return sorted({*self._points, *([self._mean()] if self._count else []), *self._kept})

    def _mean(self) -> tuple[float, float]:
        return self._sums[0] / self._count, self._sums[1] / self._count


class Curves:
    """Training loss, learning rate, validation loss and HellaSwag over tokens."""

    def __init__(self) -> None:
        self._curves = {name: Curve(most) for name, most in MOST_POINTS.items()}

    def add(self, row: dict[str, Any]) -> None:
        """Adds what a row of metrics.jsonl has of them. Passes over what is no finite number."""
        if (tokens := rows.number(row.get("tokens"))) is None:
            return
        for name, curve in self._curves.items():
            if (value := rows.number(row.get(name))) is not None:
                curve.add(tokens, value)

    def rows(self) -> list[dict[str, float]]:
        """The points as rows for `plots.draw`: tokens, and one value each."""
        return [{"tokens": x, name: y} for name, curve in self._curves.items() for x, y in curve.points()]


def read(run: str | Path) -> list[dict[str, float]]:
    """Rows for `plots.draw` of a run directory.

    Raises BadInput if its metrics.jsonl cannot be read.
    """
    path, curves = Path(run) / rows.METRICS_FILE, Curves()
    try:
        for _, row in rows.read(path) if os.path.lexists(path) else ():
            if row is not None:
                curves.add(row)
    except OSError as error:
        raise BadInput(f"plot: {path} must be a file of rows that can be read, got: {error.strerror}") from error
    return curves.rows()
