"""Files that others wrote: whatever lies there is read whole or refused in words, at once."""

import os
import re
import stat
import threading
from dataclasses import dataclass, field
from typing import Literal

import pytest

from model.files import BadFile, kind_of, make, open_file, read, read_json


@pytest.fixture(autouse=True)
def at_once():
    """Ends the process if a test waits for a file."""
    timer = threading.Timer(10.0, os._exit, (9,))
    timer.start()
    yield
    timer.cancel()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkdir, "a directory"),
        (os.mkfifo, "a named pipe"),
        (lambda path: os.symlink("nothing", path), "a link to nothing, which does not exist"),
        (lambda path: os.symlink(path, path), "Too many levels of symbolic links"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
    ],
    ids=["directory", "pipe", "dangling link", "circle", "device"],
)
def test_what_is_no_file_is_named(tmp_path, make, words):
    make(path := tmp_path / "file")
    with pytest.raises(BadFile, match=f"^{words}$"):
        open_file(path)
    if os.path.exists(path):
        assert kind_of(os.stat(path).st_mode) == words
    assert kind_of(stat.S_IFREG) == "a file"


def test_a_path_that_is_too_long_or_holds_a_null_byte_is_refused(tmp_path):
    for name in ("x" * 300, "\0"):
        with pytest.raises(BadFile):
            open_file(tmp_path / name)


def test_a_link_to_a_file_is_read_and_a_missing_file_is_told_apart(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read(tmp_path / "link") == b"text"
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "other")


def test_a_file_is_read_up_to_its_bound(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8))
    assert len(read(tmp_path / "file", most=8)) == 8
    with pytest.raises(BadFile, match="more than 7 bytes"):
        read(tmp_path / "file", most=7)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"n":' * 100_000, "nested too deep"),
        (b'{"n": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"n": 1\xff}', "not UTF-8 at byte 7"),
        (b"", "no JSON"),
        (b"[1]", "a list instead of an object"),
        (b"null", "null instead of an object"),
        (b"{}", "no field n"),
        (b'{"n": "1"}', "text in field n, which must be a number"),
        (b'{"n": true}', "true or false in field n"),
        (b'{"n": NaN}', "nan in field n"),
        (b'{"n": 1e999}', "inf in field n"),
        (b'{"n": ' + b"9" * 400 + b"}", "an integer of more than 64 bits in field n"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_json_that_is_not_what_was_asked_for_is_refused_in_words(tmp_path, content, words):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BadFile, match=words):
        read_json(tmp_path / "file", {"n": float})


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Outer:
    name: Literal["one", "two"]
    inner: Inner
    rate: float = 0.5
    most: int | None = None
    named: dict[str, int] = field(default_factory=dict)


def test_a_dataclass_is_made_of_json_by_the_types_of_its_fields():
    found = {"name": "one", "inner": {"size": 3, "other": 0}, "rate": 1, "most": None, "named": {"x": 1}, "more": []}
    assert make(Outer, found) == Outer("one", Inner(3), 1.0, None, {"x": 1})
    for change, words in (
        ({"name": "three"}, "text in field name, which must be one of one, two"),
        ({"name": ["one"]}, "a list in field name"),
        ({"inner": 1}, "an integer in field inner, which must be an object"),
        ({"inner": {"size": True}}, "true or false in field size, which must be an integer"),
        ({"rate": float("nan")}, "nan in field rate, which must be a number"),
        ({"most": 1.0}, "a number in field most, which must be an integer or null"),
        ({"most": 2**63}, "an integer of more than 64 bits in field most"),
        ({"named": {"x": "1"}}, "an object in field named, which must be an object of values that are each an integer"),
    ):
        with pytest.raises(BadFile, match=re.escape(words)):
            make(Outer, found | change)
    with pytest.raises(BadFile, match="no field inner"):
        make(Outer, {"name": "one"})


def test_json_is_returned_as_it_is(tmp_path):
    (tmp_path / "file").write_text('{"n": 1, "none": null, "more": [{}]}')
    assert read_json(tmp_path / "file", {"n": float, "none": (int, type(None))}) == {"n": 1, "none": None, "more": [{}]}
