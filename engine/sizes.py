"""Model sizes that weights have, read from the JSON beside them. Reads no weights, and imports no PyTorch."""

from pathlib import Path

from model import files
from model.presets import PRESETS

CONFIG_FILE = "config.json"
NAMES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")  # fields of GPT2Config that shape weights


def of_weights(source: str) -> dict[str, int] | None:
    """Sizes of a run, a directory in the Hugging Face layout, or a GPT-2 name; None if nothing there says them."""
    path, name = Path(source), source.removeprefix("openai-community/")
    fields = _read(path)
    if fields is not None:
        return _sizes(fields.get("model") if (path / "checkpoints").is_dir() else fields)
    if not path.exists() and name.startswith("gpt2") and name in PRESETS:  # released ones
        return _sizes(vars(PRESETS[name]))
    return None


def of_run(out: str, init_from: str) -> dict[str, int] | None:
    """Sizes of the run in OUT if it began with the weights of init_from, else None."""
    fields = _read(Path(out))
    return _sizes(fields.get("model")) if fields is not None and fields.get("init_from") == init_from else None


def _read(directory: Path) -> dict | None:
    try:
        return files.read_json(directory / CONFIG_FILE)
    except (files.BadFile, FileNotFoundError):  # whoever reads the weights says what is wrong
        return None


def _sizes(fields: object) -> dict[str, int] | None:
    try:
        found = files.check_fields(fields, dict.fromkeys(NAMES, int))
    except files.BadFile:
        return None
    return {name: found[name] for name in NAMES}
