"""Weights in and out of runs: loading a run's model, importing released weights, and exporting for
transformers.

`transformers.AutoModelForCausalLM` and `AutoTokenizer` open an exported directory without a
network. vocab.json maps each token to its id; a token's bytes are written as GPT-2's printable
characters. merges.txt has one merge per line, in the order they were learned. The exported
tokenizer gives the same ids as ours with one exception: it turns a literal <|endoftext|> into the
end-of-text id, and here that is ordinary text. Source: encoder.py in github.com/openai/gpt-2
(characters and files).
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from engine import config, device, durable, lock, system
from engine.config import TrainConfig
from engine.errors import BadInput, warn
from engine.run import checkpoint as checkpoints
from engine.run import directory as directories
from engine.run import resume, settings, vocabulary
from engine.run.checkpoint import Checkpoint
from engine.run.vocabulary import byte_characters
from engine.tokens import foreign, mixture
from engine.tokens import tokenizer as tokenizers
from engine.tokens.tokenizer import END_OF_TEXT, Tokenizer
from model import nanogpt, pretrained
from model.gpt2 import GPT2


def load_model(
    run: str | Path, warn: Callable[[str], None] = warn, is_best: bool = False
) -> tuple[GPT2, Tokenizer, Checkpoint]:
    """(model, tokenizer, checkpoint) of a run's newest whole checkpoint, cropped to the positions
    that were trained.

    is_best: of the one with the lowest validation loss instead. The model is float32 and in eval
    mode. Raises BadInput if there is no such checkpoint.
    """
    checkpoint = find(run, warn, is_best)
    return *load(checkpoint), checkpoint


def load(checkpoint: Checkpoint) -> tuple[GPT2, Tokenizer]:
    """(model, tokenizer) of a checkpoint, as load_model gives them. It masks documents if its run did."""
    model, tokenizer = _load_whole(checkpoint)
    model.crop(trained_positions(checkpoint))
    if "config" in checkpoint.state and (train := settings.of_checkpoint(checkpoint)[0]).document_mask:
        model.mask_documents(tokenizer.end_of_text, train.document_positions)
    return model.eval(), tokenizer


def trained_positions(checkpoint: Checkpoint) -> int:
    """Positions that updates may have used: those of the longest context. The others are as they were drawn."""
    identity = checkpoint.state["identity"]  # older checkpoints do not say more than the last run's context
    return min(checkpoint.state.get("trained_positions", identity["sequence_length"]), identity["model"]["n_positions"])


def untrained_note(checkpoint: Checkpoint) -> str:
    """Text such as ": of the model's 64 positions 16 were trained", or "" if all were."""
    trained, present = trained_positions(checkpoint), checkpoint.state["identity"]["model"]["n_positions"]
    return f": of the model's {present} positions {trained} were trained" if trained < present else ""


def find(run: str | Path, warn: Callable[[str], None], is_best: bool) -> Checkpoint:
    """The checkpoint that load_model takes."""
    config.load(run)  # raises its own error message if the directory is not a run
    lowest = checkpoints.best(run) if is_best else None
    checkpoint = checkpoints.newest(run, warn) if lowest is None else checkpoints.read(lowest)
    if checkpoint is None:
        raise BadInput(f"run: {run} must hold a checkpoint, got none yet; wait for its first save")
    if is_best and lowest is None:
        raise BadInput(
            f"run: {run} must hold a checkpoint with a validation loss to have a best one, got none; leave out --best "
            f"to take the newest, of step {checkpoint.step}"
        )
    return checkpoint


def _load_whole(checkpoint: Checkpoint) -> tuple[GPT2, Tokenizer]:
    """(model, tokenizer) of a checkpoint, with all positions."""
    model_config = checkpoint.model_config()
    tokenizer = tokenizers.load(checkpoint.state["identity"]["tokenizer"])
    if tokenizer.vocab_size != model_config.vocab_size:
        raise BadInput(
            f"checkpoint: {checkpoint.path} must hold a model of the {tokenizer.vocab_size} tokens of its tokenizer "
            f"{tokenizer.name}, got {model_config.vocab_size}; use an older one"
        )
    model = GPT2(model_config)
    checkpoints.load_weights(checkpoint, model)
    model.to(device.current())  # its ops stay PyTorch's, which need no self-check
    return model, tokenizer


def initial_weights(train: TrainConfig) -> tuple[GPT2, int] | None:
    """(model, trained positions) of --init-from: a run directory, weights as import takes them, or a
    GPT-2 name. None without the flag.

    Raises BadInput if the source cannot be read or is a model of another shape.
    """
    if (source := train.init_from) is None:
        return None
    if (Path(source) / "checkpoints").is_dir() and not foreign.is_model(source):
        checkpoint = find(source, print, is_best=False)
        loaded, _ = _load_whole(checkpoint)
        positions = trained_positions(checkpoint)
    else:
        loaded, _ = released_weights("train: --init-from", source)
        positions = loaded.config.n_positions
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        ours, theirs = getattr(train.model, name), getattr(loaded.config, name)
        if ours != theirs:
            raise BadInput(f"train: --init-from must have this model's {name} {ours}, got {theirs} in {source}")
    return loaded, positions


def initial_note(train: TrainConfig) -> str:
    """A line of a new run's header: whose weights, and so whose sizes, the model has; "" without --init-from."""
    model = train.model
    return (
        f"\ninitial weights: {train.init_from}, with its {model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, {model.n_positions} positions and {model.vocab_size:,} tokens"
        if train.init_from is not None
        else ""
    )


def check_tokenizer(data_directory: str, expected: str) -> None:
    """Raises BadInput unless the shards of a directory were made with the tokenizer of the model."""
    if (name := mixture.tokenizer_name(data_directory)) != expected:
        raise BadInput(
            f"data: the shards must be made with the model's tokenizer {expected}, got {name} in {data_directory}; "
            f"prepare them with --tokenizer {expected}"
        )


def released_weights(who: str, source: str) -> tuple[GPT2, str]:
    """(model, name of its tokenizer) of weights in the Hugging Face layout, by directory or name, or of
    nanoGPT's ckpt.pt.

    who: first words of an error message. Padding of the vocabulary is left out: its rows are not
    tokens. Raises BadInput if the weights cannot be read, or are of another tokenizer than ours.
    """
    found = foreign.what(source)
    folder = Path(source).absolute().parent
    notes = []
    try:
        if found.kind == "pickle":
            model, notes = nanogpt.load(GPT2, source)
        else:
            folder = pretrained.locate(source)
            model = GPT2.from_pretrained(folder)
    except (OSError, ValueError) as error:  # OSError: a path in a directory that is not open to this user
        if _is_no_weights(source, found):
            raise BadInput(f"{who}: the source must be GPT-2 weights, got {source}{foreign.hint(source)}") from error
        refused = system.sentence(error, who) if isinstance(error, OSError) else None
        raise BadInput(refused or f"{who}: {error}") from error
    rows = model.config.vocab_size
    name = vocabulary.tokenizer_of(who, source, rows)
    notes.append(vocabulary.check(who, folder, name, rows))
    if rows > (present := tokenizers.TOKENIZERS[name].vocab_size):
        model.crop_vocabulary(present)
        notes.append(
            f"the last {rows - present} of {rows:,} token rows are padding after {name}'s {present:,}, left out"
        )
    for note in filter(None, notes):
        print(f"{who}: {note}", flush=True)
    return model, name


def _is_no_weights(source: str, found: foreign.Found) -> bool:
    """Whether what lies there says more than why it could not be read as weights, which it was not meant to be."""
    if found.kind == "missing":  # a path with a typo, not a name on the Hub
        is_name = source in pretrained.RELEASED or not Path(source).parent.is_dir()
        return bool(found.way) and not is_name
    return found.kind not in ("weights", "pickle") and not foreign.is_model(source)


def import_weights(source: str, out: str) -> Path:
    """Makes a run directory whose one checkpoint holds weights as released_weights reads them. Returns
    the checkpoint.

    Raises BadInput if it cannot, or if `out` is not new or empty.
    """
    _check_new("import", out)
    model, name = released_weights("import", source)
    train = TrainConfig(out=str(out), model=model.config)
    identity = resume.identity(train, name, "none")
    state = {"step": 0, "tokens": 0, "identity": identity, "config": config.to_dict(train)}
    state["trained_positions"] = train.model.n_positions
    with directories.open_out(train.out, train.resume, "import"), _filling("import", out):
        directories.write_config(train, name, {"imported_from": source})
        return checkpoints.save(out, state, model, optimizer=None, keep_last=1)


def export(run: str, out: str, is_best: bool = False) -> None:
    """Writes a run's newest checkpoint, or its best, and its tokenizer for transformers.

    Raises BadInput if `out` is taken or cannot be written.
    """
    _check_new("export", out)
    model, tokenizer, _ = load_model(run, is_best=is_best)
    with lock.acquire(out, "export"), _filling("export", out):
        model.save_pretrained(out)
        save_tokenizer(tokenizer, out, model_max_length=model.config.n_positions)


def _check_new(command: str, out: str) -> None:
    if Path(out).exists() and (not Path(out).is_dir() or lock.others(out)):
        raise BadInput(f"{command}: --out must be new or empty, got {out}, which is not; choose another --out")


@contextlib.contextmanager
def _filling(command: str, out: str) -> Iterator[None]:
    """Around writing into `out`, which must be new or empty: a failure leaves nothing there, so nothing
    blocks the next try.

    Call it with the lock of `out`. Raises BadInput if writing fails.
    """
    _check_new(command, out)
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # a disk that has become read-only, or no file can be opened
            for path in lock.others(out):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        refused = error.__cause__ if isinstance(error, ValueError) else error
        if isinstance(refused, OSError):
            raise BadInput(
                f"{command}: --out must be a directory that can be written, got {refused.filename or out}: "
                f"{system.reason(refused)}; {system.advice(refused, 'another --out')}"
            ) from error
        if isinstance(error, ValueError):  # of the weights, as a sentence
            raise BadInput(f"{command}: {error}") from error
        raise


# ---- Tokenizer files ----------------------------------------------------------------------------------------------


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, model_max_length: int) -> None:
    """Writes the tokenizer's files beside a model's; each appears whole or not at all.

    model_max_length: tokens, the model's n_positions. Raises BadInput if the directory cannot be
    written.
    """
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    characters = byte_characters()
    pairs = merges(vocabulary.ranks_of(tokenizer.name))
    lines = [f"{_to_characters(left, characters)} {_to_characters(right, characters)}" for left, right in pairs]
    contents = {
        "vocab.json": json.dumps(vocabulary.written(tokenizer.name)),
        "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),  # readers skip the first line
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            durable.write(folder / name, content)
    except OSError as error:
        raise BadInput(
            f"tokenizer: {folder} must be a directory that can be written, got {system.reason(error)} for "
            f"{error.filename}; {system.advice(error, 'another directory')}"
        ) from error


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes was merged from, in the order of the ranks.

    A token's pair is the two parts that remain of its bytes after all earlier merges are applied.
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


def _to_characters(token: bytes, characters: list[str]) -> str:
    return "".join(characters[byte] for byte in token)
