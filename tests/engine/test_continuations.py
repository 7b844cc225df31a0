"""Text of drawn tokens: characters of several tokens, end of text, stop strings."""

import pytest
import torch

from engine import evaluation
from engine.tokens import tokenizer as tokenizers

BYTES = tokenizers.load("bytes")
END = BYTES.end_of_text


def columns(*rows: list[int]):
    """Tokens as generate.stream yields them, and how many were taken so far."""
    taken = []
    return (taken.append(1) or torch.tensor(column)[:, None] for column in zip(*rows, strict=True)), taken


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        pytest.param("one two", [], ["o", "n", "e", " ", "t", "w", "o", ""], id="no string"),
        pytest.param("one two", ["tw"], ["o", "n", "e", " ", "", ""], id="held back, then left out"),
        pytest.param("one to", ["tw"], ["o", "n", "e", " ", "", "to", ""], id="held back, then not one"),
        pytest.param("one t", ["tw"], ["o", "n", "e", " ", "", "t"], id="held back to the end"),
        pytest.param("aab", ["aaa", "ab"], ["", "", "a"], id="two may have begun"),
        pytest.param("aab", ["b", "ab"], ["", "a", ""], id="the one that begins first"),
        pytest.param("é.", ["é"], ["", ""], id="a character of two tokens"),
    ],
)
def test_pieces_end_before_the_first_stop_string(text, stop, expected):
    drawn, _ = columns(list(text.encode()))
    assert list(evaluation.pieces(drawn, BYTES, stop)) == expected


def test_continuations_end_at_the_end_of_text_or_at_a_stop_string_each():
    one, two, three = list(b"ab#cdef" * 9), [*b"xyz", END] + [END] * 59, list(b"#" * 63)
    drawn, taken = columns(one, two, three)
    assert evaluation.continuations(drawn, BYTES, ["#"]) == ["ab", "xyz", ""]
    assert len(taken) == evaluation.STOP_EVERY
    drawn, taken = columns(one, two, list(b"-" * 63))
    assert evaluation.continuations(drawn, BYTES, ["#"]) == ["ab", "xyz", "-" * 63]
    assert len(taken) == 63
    assert evaluation.continuations(iter([]), BYTES) == []


def test_with_stop_strings_the_text_of_a_token_is_read_once(monkeypatch):
    read = []
    plain = type(BYTES).decode_bytes
    monkeypatch.setattr(type(BYTES), "decode_bytes", lambda self, ids: read.append(1) or plain(self, ids))
    drawn, _ = columns(list(b"ab#cdef" * 90), list(b"-" * 630))
    assert evaluation.continuations(drawn, BYTES, ["#"]) == ["ab", "-" * 630]
    assert len(read) == 3 + 630
