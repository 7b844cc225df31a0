"""GPT-2 weights in and out, in the Hugging Face layout: a directory with config.json and model.safetensors.

The layout has our parameter names, behind `transformer.` or not, with two differences: the matrices of the linear
layers are stored (in, out), and the token embedding has V rows and not Vp. `released_views` states both, for reading
and for writing alike. Weights are float32 here and in what is written; float16 and bfloat16 are read as well.
Only safetensors are read: a pickle (pytorch_model.bin) can run code.
Source: the released files, https://huggingface.co/openai-community/gpt2; safetensors' format is in its README.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.gpt2 import GPT2, GPT2Config

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name on the Hub
DOWNLOADED = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]

PREFIX = "transformer."  # on every key but the head's in a GPT2LMHeadModel; the released files lack it
HEAD = "lm_head.weight"  # the tied head, which a file may repeat
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants that older versions saved with the weights

SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Fields of config.json that change what is computed, and the values that mean GPT-2; the first is the one to write
# and the one that an absent field stands for.
MEANS_GPT2 = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def released_views(model: GPT2) -> dict[str, Tensor]:
    """Views of the model's parameters, by name, in the shapes that the files have: the whole difference in layout."""
    views = {}
    for name, parameter in model.named_parameters():
        view = parameter.detach()
        if name == "wte.weight":
            view = view[: model.config.vocab_size]
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            view = view.t()  # (out, in) -> (in, out)
        views[name] = view
    return views


def load(dir_or_name: str | Path, *, dropout: float = 0.0) -> GPT2:
    """The model, on the CPU in float32, of a directory or, if there is none of that name, of a repository on the Hub.

    Names: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or owner/name. The dropout in config.json is how the weights were
    trained, not part of what they compute; it is not taken over. PyTorch's random state is neither read nor changed.
    Raises ValueError, naming everything that is off, if what is there is not a GPT-2.
    """
    folder = _locate(str(dir_or_name))
    config = _read_config(folder, dropout)
    stored = _open_weights(folder)
    with torch.device("meta"):  # shapes alone: nothing is drawn or allocated before the files have been checked
        model = GPT2(config)
    if HEAD in stored:
        stored.setdefault("wte.weight", stored[HEAD])  # tools that drop one of two equal tensors may keep the head
    _check(folder, {name: view.shape for name, view in released_views(model).items()}, stored)
    if HEAD in stored and not torch.equal(stored[HEAD].float(), stored["wte.weight"].float()):
        raise ValueError(
            f"weights: in {folder}, {HEAD} must equal wte.weight, got other values; "
            "a model with a head of its own is not GPT-2"
        )
    model.to_empty(device="cpu")
    model.wte.weight.detach()[config.vocab_size :].zero_()
    for name, view in released_views(model).items():
        view.copy_(stored[name])
    model.configure("torch", torch.float32)
    return model


def save(model: GPT2, directory: str | Path) -> None:
    """Writes config.json and model.safetensors, float32; each file appears whole or not at all.

    `transformers` opens the directory as a GPT2LMHeadModel. Raises ValueError if it cannot be written.
    """
    config, folder = model.config, Path(directory)
    fields = {
        "architectures": ["GPT2LMHeadModel"],
        **{field: values[0] for field, values in MEANS_GPT2.items()},
        **{field: getattr(config, field) for field in SIZES},
        "n_ctx": config.n_positions,
        "n_inner": None,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "dtype": "float32",
    }
    tensors = {
        PREFIX + name: view.cpu().float().clone(memory_format=torch.contiguous_format)
        for name, view in released_views(model).items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / "model.safetensors") as weights, _replacing(folder / "config.json") as description:
            save_file(tensors, weights, metadata={"format": "pt"})
            description.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            weights.chmod(description.stat().st_mode)  # save_file's own choice is readable by the owner alone
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"weights: {folder} must be a directory that can be written, got {error}; choose another or make room"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; the file written there reaches the disk and then takes the name `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _locate(dir_or_name: str) -> Path:
    """The directory of that name, or one with the download of the repository of that name."""
    if Path(dir_or_name).is_dir():
        return Path(dir_or_name)
    is_released = dir_or_name in RELEASED
    if Path(dir_or_name).exists() or not (is_released or REPOSITORY.fullmatch(dir_or_name)):
        raise ValueError(
            f"weights: the source must be a directory that exists, {', '.join(RELEASED)} or owner/name, "
            f"got {dir_or_name!r}; give the directory that holds config.json and model.safetensors"
        )
    repository = f"openai-community/{dir_or_name}" if is_released else dir_or_name
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, allow_patterns=DOWNLOADED))
    except Exception as error:  # the Hub's client, its HTTP library and the file system each raise their own
        raise ValueError(
            f"weights: {dir_or_name!r} is no directory here; to fetch it, huggingface_hub must be installed and "
            f"{repository} on the Hub and within reach, got {type(error).__name__}: {' '.join(str(error).split())}; "
            "mend that, or download config.json and model.safetensors by other means and give their directory"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"weights: {path} must hold a JSON object, got {error}; download it again") from error
    return content


def _read_config(folder: Path, dropout: float) -> GPT2Config:
    """The model's shape by config.json. Raises ValueError if a field says that it is another model."""
    fields = _read_json(folder / "config.json")
    sizes = {field: fields.get(field) for field in SIZES}
    wrong = [f"{name} must be an integer, got {json.dumps(n)}" for name, n in sizes.items() if type(n) is not int]
    inner = {} if wrong else {"n_inner": (None, 4 * sizes["n_embd"])}
    for field, values in {**MEANS_GPT2, **inner}.items():
        if fields.get(field, values[0]) not in values:
            wanted = " or ".join(map(json.dumps, values))
            wrong.append(f"{field} must be {wanted}, got {json.dumps(fields[field])}")
    if wrong:
        raise ValueError(f"weights: {folder / 'config.json'}: {'; '.join(wrong)}; only a GPT-2 can be loaded")
    return GPT2Config(**sizes, dropout=dropout)


def _open_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the directory's safetensors, by its name without the prefix, mapped and not yet read."""
    stored: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (file is no dict)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"weights: {path} must be a complete safetensors file, got {error}; download or export it again"
            ) from error
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            if name in stored:
                raise ValueError(f"weights: {folder} must hold {name} once, got it twice; remove one of the two")
            if not CAUSAL_MASK.fullmatch(name):
                stored[name] = tensor
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that model.safetensors.index.json names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(file, str) and file == Path(file).name for file in files):
            raise ValueError(f"weights: weight_map in {index} must give file names, got another; download it again")
        return [folder / file for file in sorted(set(files))]
    if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"weights: {folder} must hold model.safetensors, got {', '.join(pickles)}, which is a pickle and could run "
            "code when opened; if you trust it, convert it with transformers' from_pretrained and save_pretrained"
        )
    raise ValueError(
        f"weights: {folder} must hold model.safetensors or model.safetensors.index.json, got neither; "
        "download or export it again (a repository with only pytorch_model.bin has to be converted first)"
    )


def _check(folder: Path, shapes: dict[str, torch.Size], stored: dict[str, Tensor]) -> None:
    """Raises ValueError naming every tensor that is missing, unknown or of another shape or dtype than GPT-2's."""
    expected = shapes | {HEAD: shapes["wte.weight"]}
    wrong = [f"{name} is missing" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            wrong.append(f"{name} is unknown")
        elif tensor.shape != expected[name]:
            wrong.append(f"{name} must be {tuple(expected[name])}, got {tuple(tensor.shape)}")
        elif tensor.dtype not in DTYPES:
            wrong.append(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if wrong:
        raise ValueError(
            f"weights: {folder} must hold the tensors of the GPT-2 in its config.json: {'; '.join(wrong)}; "
            "give the two files of one model"
        )
