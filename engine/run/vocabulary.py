"""Vocabularies as GPT-2's files write them, and whether the tokenizer beside released weights is ours.

A file's vocabulary maps each token to its id; a token's bytes are written as GPT-2's printable
characters. Weights only make sense with the ids that they were trained on, so every id is compared.
Source: encoder.py in github.com/openai/gpt-2 (characters).
"""

from pathlib import Path

from engine.errors import BadInput
from engine.tokens.tokenizer import END_OF_TEXT, TOKENIZERS, gpt2_ranks
from model import files
from model.files import BadFile

PADDED = {-(-50257 // multiple) * multiple: "gpt2" for multiple in (64, 256, 512, 1024)}  # rows: tokenizer
SAMPLES = ("Ġthe", "the", "a", "!")  # tokens that a message shows, the first that differs
OURS = ("GPT2Tokenizer", "GPT2TokenizerFast")
ANY_CLASS = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")  # says nothing of the vocabulary
FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def byte_characters() -> list[str]:
    """GPT-2's printable character of each byte: itself where it has one, else the next from U+0100 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def ranks_of(name: str) -> dict[bytes, int]:
    """Ids of a tokenizer's byte strings, without the end of text."""
    return gpt2_ranks() if name == "gpt2" else {bytes([byte]): byte for byte in range(256)}


def written(name: str) -> dict[str, int]:
    """A tokenizer's vocabulary as vocab.json holds it."""
    characters = byte_characters()
    vocabulary = {"".join(characters[byte] for byte in token): rank for token, rank in ranks_of(name).items()}
    return vocabulary | {END_OF_TEXT: TOKENIZERS[name].end_of_text}


def tokenizer_of(who: str, source: str, rows: int) -> str:
    """Name of the tokenizer whose vocabulary has so many ids, or is padded to so many.

    Raises BadInput if there is none.
    """
    sizes = {kind.vocab_size: name for name, kind in TOKENIZERS.items()} | PADDED
    if rows not in sizes:
        known = " or ".join(f"the {kind.vocab_size:,} tokens of {name}" for name, kind in TOKENIZERS.items())
        padded = ", ".join(f"{size:,}" for size in sorted(PADDED))
        raise BadInput(
            f"{who}: the vocabulary must be {known} (gpt2's may be padded to {padded}), got {rows:,} in {source}; "
            "weights of another tokenizer cannot be used here"
        )
    return sizes[rows]


def check(who: str, folder: Path, name: str, rows: int) -> str | None:
    """Compares the tokenizer's files beside weights with ours, id by id.

    rows: ids that the weights know; a file may name more. Returns a note if there is no such file, or
    if one names tokens of its own among the padding. Raises BadInput if an id below the padding differs.
    """
    ours = written(name)
    found, extra = False, {}
    for file in FILES[:2]:
        try:
            theirs = _read(folder / file)
        except FileNotFoundError:
            continue
        except BadFile as error:
            raise BadInput(f"{who}: {folder / file} must be a tokenizer's vocabulary, got {error}") from error
        found = True
        if {token: i for token, i in theirs.items() if i < len(ours)} != ours:
            raise BadInput(
                f"{who}: the weights in {folder} must be of the tokenizer {name}, got another's in {file}: "
                f"{_difference(ours, theirs)}; with other ids they would read and write nonsense"
            )
        extra |= {token[:40]: i for token, i in theirs.items() if len(ours) <= i < rows}
    if found:
        return f"tokens of its own among the padding are left out: {files.few(extra)}" if extra else None
    kind = _class(folder / FILES[2])
    if (folder / "tokenizer.model").exists() or kind not in (None, *OURS, *ANY_CLASS):
        got = kind or "tokenizer.model"
        raise BadInput(
            f"{who}: the weights in {folder} must be of the tokenizer {name}, got another's, {got}; "
            "with other ids they would read and write nonsense"
        )
    return f"no tokenizer lies beside the weights in {folder}: their tokens are taken to be those of {name}"


def _read(path: Path) -> dict[str, int]:
    """Ids of all tokens of a tokenizer.json or vocab.json. Raises BadFile or FileNotFoundError."""
    if path.name == "vocab.json":
        vocabulary = files.read_json(path)
    else:
        fields = files.read_json(path, {"model": dict})
        vocabulary = files.check_fields(fields["model"], {"vocab": (dict, list)})["vocab"]
        if isinstance(vocabulary, list):
            raise BadFile("a vocabulary of another kind than GPT-2's")
        added = fields.get("added_tokens") or []
        if not isinstance(added, list):
            raise BadFile("added_tokens that is no list")
        vocabulary |= {
            token["content"]: token["id"]
            for token in (files.check_fields(entry, {"content": str, "id": int}) for entry in added)
        }
    if not all(type(i) is int for i in vocabulary.values()):
        raise BadFile("an id that is no integer")
    return vocabulary


def _class(path: Path) -> str | None:
    try:
        kind = files.read_json(path).get("tokenizer_class")
    except (FileNotFoundError, BadFile):
        return None
    return kind if isinstance(kind, str) else None


def _difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Ids in both of the first sample that differs, else of any token."""
    differing = (token for token in (*SAMPLES, *ours) if token in ours and theirs.get(token) != ours[token])
    if (token := next(differing, None)) is None:
        extra, i = next((token, i) for token, i in theirs.items() if i < len(ours) and token not in ours)
        return f"{extra!r} is {i} there and no token here"
    there = theirs.get(token, "no token")
    return f"{token.replace('Ġ', ' ')!r} is {ours[token]} here and {there} there"
