"""Text to token ids and back: GPT-2's byte-pair encoding, and plain bytes. No network is used.

gpt2: 50,257 tokens, built by tiktoken from the vocabulary in engine/tokens/assets.
bytes: 257 tokens, the 256 bytes and end of text. A small model on a CPU would spend most of its
time in a head of 50,304 columns.
encode never returns the end-of-text id, not even for a literal <|endoftext|>. Only `prepare` writes
that id.
Source: Radford et al. 2019, section 2.2. Vocabulary and splitting pattern: OpenAI (MIT licence).
"""

import base64
import hashlib
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.errors import BadInput, nearest
from model.files import read

VOCABULARY = Path(__file__).parent / "assets" / "r50k_base.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"

# Contractions; words, numbers and other signs, each with the space before it;
# trailing and other white space.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# \s+(?!\S) backtracks by one character, and the regex engine stacks a state for every character it
# has matched. 1,000,000 characters of white space before a word overflow that stack and kill the
# process. So a long run of white space is cut before its last character, which leaves the tokens
# the same.
LONG = 100_000
SPACES = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_SPACE = re.compile(f"{SPACES}{{{LONG},}}+")
STRIDE = 100  # a long run has LONG / STRIDE of every STRIDE-th characters: no other text needs the whole search
LONG_SAMPLE = re.compile(f"{SPACES}{{{LONG // STRIDE}}}")


@lru_cache(maxsize=1)
def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's vocabulary: 50,256 byte strings to ids.

    Raises BadInput if the packaged file is not the released one.
    """
    try:
        content = read(VOCABULARY)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"tokenizer: {VOCABULARY} must be GPT-2's vocabulary, got {error}; install the package again"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != VOCABULARY_SHA256:
        raise BadInput(
            f"tokenizer: {VOCABULARY.name} must have sha256 {VOCABULARY_SHA256[:12]}..., got {digest[:12]}...; "
            "install the package again"
        )
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding."""

    name = "gpt2"
    unit = "token"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=gpt2_ranks(),
            special_tokens={END_OF_TEXT: self.end_of_text},
        )
        # An array without a Python integer per token takes a tenth less time. Some versions of tiktoken lack it, and
        # some make a literal <|endoftext|> the end of a text there.
        to_numpy = getattr(self._encoding, "encode_to_numpy", None)
        is_usable = to_numpy is not None and self.end_of_text not in to_numpy(END_OF_TEXT, disallowed_special=())
        self._to_numpy = to_numpy if is_usable else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, (n,) uint16. A lone surrogate becomes U+FFFD."""
        has_long = len(text) > LONG and LONG_SAMPLE.search(text[::STRIDE])
        runs = LONG_SPACE.finditer(text) if has_long else ()
        cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
        ids = [self._encode(text[start:end]) for start, end in pairwise(cuts)]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def _encode(self, text: str) -> np.ndarray:
        if self._to_numpy is not None:
            try:
                return self._to_numpy(text, disallowed_special=()).astype(np.uint16)
            except UnicodeEncodeError:  # a lone surrogate, which the next line replaces
                pass
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode_bytes(self, ids) -> bytes:
        """Bytes of the ids. A token may be part of a character."""
        return self._encoding.decode_bytes([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token in front of the end of text, (end_of_text,) uint8."""
        lengths = np.zeros(self.end_of_text, dtype=np.uint8)
        for token, rank in gpt2_ranks().items():
            lengths[rank] = len(token)
        return lengths

    def decode(self, ids) -> str:
        """Text of the ids. Bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer:
    """One token per byte of UTF-8: ids 0 to 255; 256 is end of text."""

    name = "bytes"
    unit = "byte"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, (n,) uint16. A lone surrogate becomes U+FFFD."""
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return np.frombuffer(whole.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, ids) -> bytes:
        """Bytes of the ids."""
        return b"".join(END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in map(int, ids))

    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token in front of the end of text, (end_of_text,) uint8."""
        return np.ones(self.end_of_text, dtype=np.uint8)

    def decode(self, ids) -> str:
        """Text of the ids. Bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


Tokenizer = GPT2Tokenizer | ByteTokenizer
TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}


def load(name: str) -> Tokenizer:
    """The tokenizer of that name. Raises BadInput if there is none."""
    if name not in TOKENIZERS:
        raise BadInput(f"tokenizer: the name must be one that exists, got {name!r}{nearest(name, TOKENIZERS)}")
    return TOKENIZERS[name]()
