"""Our tokenizers as files that `transformers.AutoTokenizer.from_pretrained` opens without a network.

vocab.json maps each token, its bytes written as GPT-2's printable characters, to its id; merges.txt has one merge a
line, first learned first. The ids are then ours for any text, but for one: a literal <|endoftext|> in the text
becomes the end-of-text id there and is ordinary text here.
Source: encoder.py in github.com/openai/gpt-2 (characters and files).
"""

import json
import os
from itertools import pairwise
from pathlib import Path

from engine.errors import BadInput
from engine.tokenizer import END_OF_TEXT, Tokenizer, gpt2_ranks


def save_pretrained(tokenizer: Tokenizer, directory: str | Path, model_max_length: int) -> None:
    """Writes the tokenizer's files beside a model's; each appears whole or not at all.

    model_max_length: tokens, the model's n_positions. Raises BadInput if the directory cannot be written.
    """
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    ranks = gpt2_ranks() if tokenizer.name == "gpt2" else {bytes([byte]): byte for byte in range(256)}
    characters = byte_characters()
    vocabulary = {_written(token, characters): rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT] = tokenizer.end_of_text
    lines = [f"{_written(left, characters)} {_written(right, characters)}" for left, right in merges(ranks)]
    contents = {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),  # readers skip the first line
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_text(content, encoding="utf-8", newline="\n")
            os.replace(temporary, folder / name)
    except OSError as error:
        raise BadInput(
            f"tokenizer: {folder} must be a directory that can be written, got {error}; choose another or make room"
        ) from error


def byte_characters() -> list[str]:
    """GPT-2's printable character of each byte: itself where it has one, else the next from U+0100 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes was merged from, in the order of the ranks.

    A token's pair is what its bytes come to when every merge learned before it has been applied.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def _written(token: bytes, characters: list[str]) -> str:
    return "".join(characters[byte] for byte in token)
