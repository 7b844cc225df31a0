"""Standard input: whatever it is, its documents or a sentence."""

import fcntl
import json
import os
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from corpora import config, texts

from engine.errors import BadInput
from engine.tokens import prepare
from engine.tokens.reading import cuts, sources

LINES = [json.dumps({"text": f"line {i}"}) for i in range(40)]


@pytest.fixture
def give():
    """Puts a pipe in the place of standard input, and writes to it."""
    before, written = os.dup(0), []

    def to_pipe(content: bytes, is_nonblocking: bool = False) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, not is_nonblocking)
        os.dup2(reader, 0)
        os.close(reader)
        written.append(threading.Timer(0.05, lambda: (os.write(writer, content), os.close(writer))))
        written[-1].start()

    yield to_pipe
    os.dup2(before, 0)
    os.close(before)
    for one in written:
        one.join()


def run(out: Path, **changes) -> list[str]:
    prepare.prepare(["-"], config(out, **changes))
    return texts(out, "train") + texts(out, "val")


def test_a_pipe_without_content_yet_is_waited_for(tmp_path, give):
    give("\n".join(LINES).encode(), is_nonblocking=True)
    assert len(run(tmp_path / "out")) == 40
    assert not fcntl.fcntl(0, fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize("between", [", ", ",\n"])
def test_a_json_array_is_read(tmp_path, give, between):
    give(f"[{between.join(LINES)}]\n".encode())
    assert len(run(tmp_path / "out")) == 40


def test_a_closed_one_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python sets it
    with pytest.raises(BadInput, match="standard input must be a pipe or a file, got none: it is closed; for example"):
        sources.find(["-"])


def test_a_long_text_is_cut_in_parts_or_needs_room_in_a_sentence(tmp_path, give, monkeypatch):
    for name, value in (("LONG", 24), ("PART", 8), ("BLOCK", 5)):
        monkeypatch.setattr(cuts, name, value)
    long = "many words of a text " * 9
    documents = [*(f"short {i}" for i in range(9)), *(f"{long}{i}" for i in range(9))]
    give("<|>\n".join(documents).encode())
    assert sorted(run(tmp_path / "out", format="txt", split_on="<|>")) == sorted(documents)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    give(long.encode())
    with pytest.raises(BadInput, match=r"needs a temporary file, got No space left .*; set TMPDIR to a directory"):
        run(tmp_path / "other", format="txt")
