"""Progress of a preparation: the rate of the last while, a start that goes on, a total that is not known."""

import io

import pytest

from engine.tokens.preparation.progress import Progress

MB = 1_000_000


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def terminal(monkeypatch, term: str = "xterm", columns: int = 80) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", term)
    return stream


def advance(progress: Progress, clock: Clock, seconds: int, num_bytes: int) -> str:
    """The line after so many seconds, each with as many bytes."""
    for _ in range(seconds):
        clock.now += 1.0
        progress.advance(num_bytes, num_bytes // 4)
    return progress.line(clock.now)


def test_the_rate_is_that_of_the_last_half_minute():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(2000 * MB, stream=stream, clock=clock)
    assert advance(progress, clock, 100, 10 * MB) == "1,000 of 2,000 MB, 10.0 MB/s, 1:40 left, 250.0M tokens"
    assert "MB, 15.0 MB/s" in advance(progress, clock, 15, 20 * MB)
    assert "1,600 of 2,000 MB, 20.0 MB/s, 0:20 left" in advance(progress, clock, 15, 20 * MB)


def test_what_an_earlier_start_has_done_is_in_the_share_but_not_in_the_rate():
    clock = Clock()
    progress = Progress(1000 * MB, stream=io.StringIO(), clock=clock, done=900 * MB)
    assert advance(progress, clock, 5, 10 * MB) == "950 of 1,000 MB, 10.0 MB/s, 0:05 left, 12.5M tokens"


def test_an_unknown_total_has_no_share_and_no_time_left(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    progress = Progress(None, stream=stream, clock=clock)
    advance(progress, clock, 21, 10 * MB)
    assert stream.getvalue().splitlines() == [
        "prepare: 100 MB, 10.0 MB/s, 25.0M tokens",
        "prepare: 200 MB, 10.0 MB/s, 50.0M tokens",
    ]
    progress = Progress(None, stream=terminal(monkeypatch), clock=clock, name="data")
    advance(progress, clock, 3, 10 * MB)
    progress.close()
    assert "data" in progress.stream.getvalue()
    assert "30 MB, 10.0 MB/s, 7.5M tokens" in progress.stream.getvalue()


def test_nothing_that_comes_has_no_time_left():
    clock = Clock()
    progress = Progress(1000 * MB, stream=io.StringIO(), clock=clock)
    assert advance(progress, clock, 40, 0) == "0 of 1,000 MB, 0.0 MB/s, 0.0M tokens"


@pytest.mark.parametrize("columns", [30, 60])
def test_a_narrow_terminal_has_one_row_that_begins_with_the_share(columns, monkeypatch):
    clock, stream = Clock(), terminal(monkeypatch, columns=columns)
    progress = Progress(48_000 * MB, stream=stream, clock=clock)
    advance(progress, clock, 2, 10 * MB)
    progress.close()
    assert stream.getvalue().count("\x1b[1A") == 1  # the cursor goes up a row when the bar is removed, not before
    assert "0.0 of 48.0" in stream.getvalue()


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch):
    clock, stream = Clock(), terminal(monkeypatch, "dumb")
    advance(Progress(1000 * MB, stream=stream, clock=clock), clock, 11, 10 * MB)
    assert stream.getvalue() == "prepare: 100 of 1,000 MB, 10.0 MB/s, 1:30 left, 25.0M tokens\n"
