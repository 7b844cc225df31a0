"""Loss on a text file: every token is predicted once.

As in token shards, each document is an end-of-text token and its text. The first of them is context
alone; those between documents are predicted, as in a validation loss.
"""

from pathlib import Path

import numpy as np

from engine.errors import BadInput
from engine.tasks.scoring import Request
from engine.tokens.reading.documents import parse, raw_documents
from engine.tokens.reading.parts import UNITS, NotText, ReadOptions
from engine.tokens.tokenizer import Tokenizer

TEXT_FIELD = "text"  # field of records, column of tables
EMPTY = ("empty", "null")  # reasons of documents without text


def load(path: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of a file, (n,) uint16: of all its records or rows if it is one of JSON or a table, else of one document.

    Empty documents are left out, as by `gpt2 prepare`. Raises BadInput if nothing else is there, or
    if the file cannot be read or is not text.
    """
    pieces = []
    for kind, raw, _, place, _, _, is_first, *_ in raw_documents([Path(path)], ReadOptions(TEXT_FIELD)):
        try:
            text, _ = parse(kind, raw, TEXT_FIELD)
        except NotText as error:
            if error.reason in EMPTY:
                continue
            where = f"{UNITS.get(kind, 'row')} {place:,}: " if place else ""
            raise BadInput(f"{path}: must hold text in UTF-8, got {where}{error}") from error
        pieces += [[tokenizer.end_of_text]] * is_first + [tokenizer.encode(text)]
    if not pieces:
        raise BadInput(f"{path}: must hold text, got no document that is not empty")
    return np.concatenate(pieces).astype(np.uint16)


def requests(tokens: np.ndarray, most: int, stride: int) -> list[Request]:
    """Windows of `most` inputs that predict every token but the first once.

    The first window predicts all of its tokens, each other one its last `stride`.
    """
    windows, begin = [], 1
    while begin < len(tokens):
        end = min(len(tokens), begin + (most if begin == 1 else stride))
        windows.append(Request(tokens[max(0, end - most - 1) : end], end - begin))
        begin = end
    return windows
