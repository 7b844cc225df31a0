"""What lies at a path that was given for something else: its name, and the way in.

A user may give a run where data is wanted, another program's files, or a name with a typo. `hint`
recognises what is there by names and first bytes. Nothing is unpickled, and no pipe is waited for.
Sources: github.com/karpathy/nanoGPT (train.bin, ckpt.pt), github.com/karpathy/llm.c (magic numbers).
"""

import difflib
import os
import shlex
import struct
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from engine.output import program
from engine.tokens import names
from model import files
from model.files import BadFile, few

MOST_ENTRIES = 10_000  # of a directory that are looked at
MOST_CHILDREN = 200  # directories inside a directory that are looked into
TEXT = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet", ".csv", ".gz", ".zst")
PICKLES = (".pt", ".pth", ".ckpt")
PRINTABLE = bytes([9, 10, 13, *range(32, 127)])
HEADERLESS = ("train.bin", "val.bin")  # nanoGPT's two files
RUN_FILES = ("metrics.jsonl", "samples.txt", "config.json", "latest")
SHARD_MAGIC, LLMC_WEIGHTS, LLMC_EVALUATION = 20240520, 20240326, 20240522
LLAMA_MAGIC = 20240801  # of llm.c's shards of Llama 3's tokens, uint32


class Found(NamedTuple):
    """What lies at a path."""

    kind: str  # data, nanogpt, run, checkpoint, weights, pickle, pickles (a directory of them), text, missing or other
    words: str  # such as "a run", or "does not exist"
    way: str = ""  # what to do with it; "" if there is no known way


def hint(path: str | Path, otherwise: str = "") -> str:
    """What follows a path in an error message, such as ", which is a run; give it as --run".

    otherwise: what to do where no way in is known.
    """
    found = what(path)
    verb = "" if found.kind == "missing" else "is "
    way = found.way or otherwise
    return f", which {verb}{found.words}" + (f"; {way}" if way else "")


def what(path: str | Path) -> Found:
    """Recognises what lies at a path. Never raises."""
    path = Path(path)
    try:
        if path.is_dir():
            return _directory(path, _entries(path))
        return _file(path)
    except FileNotFoundError:
        return Found("missing", "does not exist", f"did you mean {other}?" if (other := near(path)) else "")
    except BadFile as error:
        return Found("other", str(error))
    except (OSError, ValueError) as error:
        return Found("other", f"not readable ({getattr(error, 'strerror', None) or error})")


def near(path: str | Path) -> Path | None:
    """The path with its first part that does not exist replaced by its nearest sibling; None if none is near."""
    known = Path(path)
    missing: list[str] = []
    try:
        while not known.exists() and known != known.parent:
            missing.insert(0, known.name)
            known = known.parent
        siblings = _entries(known)
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(missing[0], siblings, n=1, cutoff=0.6) if missing else []
    if not close:
        return None
    whole = Path(known, close[0], *missing[1:])
    return whole if whole.exists() else Path(known, close[0])


# ---- Directories --------------------------------------------------------------------------------------------------


def _entries(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in islice(entries, MOST_ENTRIES))


def _directory(path: Path, entries: list[str]) -> Found:
    if not entries:
        return Found("other", "an empty directory")
    found = _recognise(path, entries)
    if found is None or found.kind == "text":  # a text beside runs or data is a README
        found = _inside(path, entries, ("data", "run")) or found or _inside(path, entries, ("weights", "text"))
    return found or Found("other", f"a directory with {few(entries, 3)} in it")


def _recognise(path: Path, entries: list[str]) -> Found | None:
    kinds = (recognise(path, entries) for recognise in (_data, _run, _weights, _text))
    return next((found for found in kinds if found is not None), None)


def _inside(path: Path, entries: list[str], wanted: tuple[str, ...]) -> Found | None:
    """Of a directory whose own directories are of a wanted kind: which ones."""
    kinds: dict[str, list[str]] = {}
    for child in islice((path / name for name in entries), MOST_CHILDREN):
        if child.is_dir() and os.access(child, os.R_OK | os.X_OK) and (found := _recognise(child, _entries(child))):
            kinds.setdefault(found.kind, []).append(str(child))
    for kind in wanted:
        if kind in kinds:
            words = {"data": "token shards", "run": "runs"}.get(kind, kind)
            way = _prepare(path, path) if kind == "text" else f"give one of them: {few(kinds[kind], 3)}"
            return Found("other", f"a directory with {words} in its own directories", way)
    return None


def _data(path: Path, entries: list[str]) -> Found | None:
    has_manifest = "manifest.json" in entries and not {"state.json", "model.safetensors"} & {*entries}
    if has_manifest or any(names.SHARD.fullmatch(name) for name in entries):
        return Found("data", "a directory of token shards", "give it as --data")
    if "meta.pkl" in entries and {*HEADERLESS} <= {*entries}:
        return Found(
            "nanogpt",
            "nanoGPT's data with a vocabulary of its own (meta.pkl)",
            f"make token shards of its text with {program()} prepare",
        )
    if is_nanogpt(path) or any(names.UNNUMBERED.fullmatch(name) for name in entries):
        return Found("data", "a directory of tokens, a .bin for each split", "give it as --data")
    if ".building" in entries:
        return Found("data", "a preparation that was stopped", f"run {program()} prepare again")
    return None


def _run(path: Path, entries: list[str]) -> Found | None:
    if "state.json" in entries and "manifest.json" in entries:
        run = path.parent.parent if path.parent.name == "checkpoints" else None
        way = f"give the run, {run}" if run else "give the run that it was saved in"
        return Found("checkpoint", "a checkpoint of a run", way)
    if path.name == "checkpoints" and any(name.startswith("step_") for name in entries):
        return Found("checkpoint", "the checkpoints of a run", f"give the run, {path.parent}")
    config = _config(path) if "config.json" in entries else {}
    if "tokens_per_step" in config or "metrics.jsonl" in entries or "checkpoints" in entries:
        way, data = "give it as --run, or as --init-from to train from it", config.get("data")
        if isinstance(data, str) and os.path.isdir(data):
            way += f"; its data is {data}"
        return Found("run", "a run", way)
    return None


def _weights(path: Path, entries: list[str]) -> Found | None:
    kind = _config(path).get("model_type") if "config.json" in entries else None
    if kind is not None or any(n.endswith(".safetensors") or n.startswith("pytorch_model") for n in entries):
        words = "weights in the Hugging Face layout"
        if isinstance(kind, str) and kind != "gpt2":
            return Found("weights", f"{words}, of a {kind[:40]}", "only a GPT-2 can be used here")
        return Found(
            "weights", words, f"make a run of it: {program()} import {_quoted(path)} --out {_out('runs', path)}"
        )
    if pickles := [name for name in entries if name.endswith(PICKLES)]:
        one = path / ("ckpt.pt" if "ckpt.pt" in pickles else pickles[-1])
        return Found("pickles", f"a directory with {few(pickles)}", _import(one, path))
    return None


def _text(path: Path, entries: list[str]) -> Found | None:
    if "dataset_info.json" in entries or any(name.endswith(".arrow") for name in entries):
        return Found(
            "other",
            "a dataset of the datasets library",
            f"write it with its to_json or to_parquet, and make token shards of that with {program()} prepare",
        )
    notes = (".", "readme", "license")  # say nothing of the rest
    texts = [name for name in entries if name.endswith(TEXT) and not name.lower().startswith(notes)]
    counts = Counter(name[name.rfind(".") :] for name in texts)
    if not counts:
        return None
    return Found(
        "text", f"text ({', '.join(f'{n:,} {suffix}' for suffix, n in counts.most_common(3))})", _prepare(path, path)
    )


# ---- Files --------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Found:
    with files.open_file(path) as file:
        head = file.read(1024)
    parent = path.absolute().parent
    magic = struct.unpack("<i", head[:4])[0] if len(head) >= 4 else None
    if path.suffix in PICKLES:
        return Found("pickle", "a checkpoint of PyTorch", _import(path, path.with_suffix("")))
    directory = f"give its directory, {path.parent}"
    if path.suffix == ".npy" or magic == SHARD_MAGIC or is_headerless(path):
        return Found("other", "a file of tokens", directory)
    if magic == LLMC_WEIGHTS:
        way = f"llm.c's dev/eval/export_hf.py makes what {program()} import reads"
        return Found("other", "weights in llm.c's format", way)
    if magic == LLAMA_MAGIC:
        return Found("other", "llm.c's tokens of Llama 3", f"make token shards of the text with {program()} prepare")
    if magic == LLMC_EVALUATION:
        return Found("other", "llm.c's file of questions to evaluate a model on", "nothing here reads it")
    if path.name in RUN_FILES and what(parent).kind == "run":
        return Found("other", "a file of a run", f"give the run, {path.parent}")
    if path.suffix == ".safetensors" or path.name.startswith("pytorch_model") or path.name == "config.json":
        return Found("other", "one file of weights", directory)
    if path.name.endswith(TEXT):
        return Found("text", "a file of text", _prepare(path, path.with_suffix("")))
    return Found("other", "an empty file" if not head else "a file")


def is_nanogpt(directory: Path) -> bool:
    """Whether a directory holds nanoGPT's tokens: train.bin and val.bin, uint16 without a header.

    Not with a meta.pkl beside, which is a vocabulary of its own, nor if the files hold ASCII text.
    """
    try:
        if (directory / "meta.pkl").exists():
            return False
        for name in HEADERLESS:
            with files.open_file(directory / name) as file:
                head, size = file.read(4096), os.fstat(file.fileno()).st_size
            has_header = len(head) >= 1024 and struct.unpack("<i", head[:4])[0] // 10_000 == 2024
            if size == 0 or size % 2 or has_header or not head.translate(None, PRINTABLE):
                return False
    except (OSError, ValueError):
        return False
    return True


def is_headerless(path: Path) -> bool:
    """Whether a file is one of nanoGPT's two."""
    return path.name in HEADERLESS and is_nanogpt(path.parent)


def is_model(directory: str | Path) -> bool:
    """Whether a directory's config.json is a model's in the Hugging Face layout, whatever lies beside it."""
    return "model_type" in _config(Path(directory))


def _config(path: Path) -> dict:
    """Fields of a config.json; {} if it cannot be read."""
    try:
        return files.read_json(path / "config.json")
    except (OSError, ValueError):
        return {}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _out(folder: str, path: Path) -> str:
    return shlex.quote(f"{folder}/{path.absolute().name or 'mine'}")


def _import(path: Path, named: Path) -> str:
    return f"make a run of it: {program()} import {_quoted(path)} --out {_out('runs', named)}"


def _prepare(path: Path, named: Path) -> str:
    return f"make token shards of it: {program()} prepare {_quoted(path)} --out {_out('data', named)}"
