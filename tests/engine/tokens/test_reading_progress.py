"""Progress of a preparation: the rate of the last while, a start that goes on, a total that is not known."""

import io
import os
import threading
import time

import pytest
from corpora import run

from engine.tokens.preparation import progress as module
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


def wait_for(stream: io.StringIO, words: str) -> None:
    latest = time.monotonic() + 10
    while words not in stream.getvalue():
        assert time.monotonic() < latest, stream.getvalue()
        time.sleep(0.005)


@pytest.mark.parametrize("is_terminal", [False, True], ids=["lines", "a bar"])
def test_a_long_wait_is_shown_with_what_is_waited_for(monkeypatch, is_terminal):
    monkeypatch.setattr(module, "TICK", 0.005)
    clock, stream = Clock(), terminal(monkeypatch, columns=120) if is_terminal else io.StringIO()
    progress = Progress(1000 * MB, stream=stream, clock=clock)
    progress.doing("downloads a.parquet")
    advance(progress, clock, 1, 10 * MB)
    assert "downloads" not in progress.line(clock.now)
    clock.now = 20.0
    wait_for(stream, "10 of 1,000 MB")
    wait_for(stream, "downloads a.parquet")
    assert "downloads" not in advance(progress, clock, 1, 10 * MB)
    progress.doing("reads a.parquet")
    clock.now = 40.0
    wait_for(stream, "reads a.parquet")
    progress.close()
    after, clock.now = stream.getvalue(), 80.0
    time.sleep(0.03)
    assert stream.getvalue() == after


def test_a_preparation_says_which_file_it_downloads_and_reads(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Progress, "doing", lambda self, what: said.append(what))
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 100)
    run(tmp_path / "texts", tmp_path / "out", val_fraction=0.5)
    assert said == ["downloads a.txt", "reads a.txt", "downloads b.txt", "reads b.txt"]


def test_a_worker_is_not_forked_while_something_is_shown():
    began, shown = threading.Event(), threading.Event()

    def show() -> None:
        with module._showing:
            began.set()
            shown.wait(0.2)

    thread = threading.Thread(target=show)
    thread.start()
    began.wait()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if module._showing.acquire(blocking=False) else 1)
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
