"""Import and export of GPT-2 weights in the Hugging Face layout: config.json and model.safetensors.

The stored names are the model's, with or without the prefix `transformer.`, and those that
torch.compile and DDP add. Two things differ: a
linear layer's weight is stored as (in, out), and the token embedding has V rows instead of Vp.
`released_views` converts between the two, for reading and for writing. Weights are float32 in
memory and in written files; float16 and bfloat16 files can be read. Only safetensors are read,
because a pickle (pytorch_model.bin) can run code.
Source: the released files, https://huggingface.co/openai-community/gpt2; safetensors' format is in
its README.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.files import few, open_file, read_json, shown
from model.presets import GPT2Config

Model = TypeVar("Model", bound=nn.Module)
RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name on the Hub
DOWNLOADED = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
DOWNLOADED += ["tokenizer.json", "vocab.json", "tokenizer_config.json"]  # to compare with the tokenizer here

PREFIX = "transformer."  # before every name but the head's in a GPT2LMHeadModel; not in the released files
WRAPPERS = re.compile(r"(?:(?:_orig_mod|module)\.)*(?:transformer\.)?")  # torch.compile's and DDP's, before PREFIX
HEAD = "lm_head.weight"  # the tied head, which some files store too
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants that older versions saved with the weights

SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Fields of config.json that change what is computed, with the values that GPT-2 may have. The first
# value is the one written, and the default of an absent field.
MEANS_GPT2 = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def released_views(model: nn.Module) -> dict[str, Tensor]:
    """Views of the model's parameters, by name, in the shapes of the stored tensors."""
    views = {}
    for name, parameter in model.named_parameters():
        view = parameter.detach()
        if name == "wte.weight":
            view = view[: model.config.vocab_size]
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            view = view.t()  # (out, in) -> (in, out)
        views[name] = view
    return views


def plain_name(key: str) -> str:
    """A stored tensor's name without what the library or a wrapper of the model put before it."""
    return WRAPPERS.sub("", key, count=1)


def not_finite(tensors: dict[str, Tensor]) -> str:
    """Names tensors with NaN or infinite numbers, and how many: "1 in ln_f.bias"; "" if there are none."""
    odd = {name: ~tensor.isfinite() for name, tensor in tensors.items() if not tensor.isfinite().all()}
    return few([f"{int(mask.sum())} in {name}" for name, mask in odd.items()])


def load(kind: type[Model], dir_or_name: str | Path, *, dropout: float = 0.0) -> Model:
    """Loads a GPT2, on the CPU in float32, from a directory or else from a repository on the Hub.

    kind: the class GPT2, which imports this file and so is not imported here.

    A repository is gpt2, gpt2-medium, gpt2-large, gpt2-xl or owner/name. The dropout in config.json
    is ignored: it says how the weights were trained, not what they compute. PyTorch's random state
    is neither read nor changed. Raises ValueError, naming everything that is wrong, if the files
    are not those of a GPT-2, or hold numbers that are not finite.
    """
    folder = locate(str(dir_or_name))
    config = _read_config(folder, dropout)
    stored = _open_weights(folder)
    _check_sizes(folder, config, stored)
    with torch.device("meta"):  # shapes only: no weights are allocated before the files are checked
        model = kind(config)
    if HEAD in stored:
        stored.setdefault("wte.weight", stored[HEAD])  # tools that drop one of two equal tensors may keep the head
    _check(folder, {name: view.shape for name, view in released_views(model).items()}, stored)
    if odd := not_finite(stored):
        raise ValueError(
            f"weights: {folder} must hold finite numbers, got NaN or infinity: {odd}; "
            "download it again, or export an earlier checkpoint"
        )
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


def save(model: nn.Module, directory: str | Path) -> None:
    """Writes config.json and model.safetensors, in float32. Each file is replaced atomically.

    `transformers` loads the directory as a GPT2LMHeadModel. Raises ValueError if a weight is not
    finite, or if writing fails.
    """
    config, folder = model.config, Path(directory)
    if odd := not_finite(released_views(model)):
        raise ValueError(f"weights: a model must have finite weights to be saved, got NaN or infinity: {odd}")
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
        with (
            _replacing(folder / "model.safetensors") as weights_path,
            _replacing(folder / "config.json") as config_path,
        ):
            save_file(tensors, weights_path, metadata={"format": "pt"})
            config_path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            weights_path.chmod(config_path.stat().st_mode)  # save_file makes a file that only its owner can read
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"weights: {folder} must be a directory that can be written, got "
            f"{getattr(error, 'strerror', None) or error}; choose another or make room"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`.

    On success the file written there is synced to the disk and then renamed to `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def locate(dir_or_name: str) -> Path:
    """Path of the directory of that name, or of the download of the repository of that name."""
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
    except Exception as error:  # the Hub's client, its HTTP library and the file system raise many types
        raise ValueError(
            f"weights: {dir_or_name!r} is not a directory; to download it, huggingface_hub must be installed and "
            f"{repository} must be reachable on the Hub, got {type(error).__name__}: {' '.join(str(error).split())}; "
            "fix that, or download config.json and model.safetensors by other means and give their directory"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"weights: {path} must hold a JSON object, got {got}; download it again") from error


def _read_config(folder: Path, dropout: float) -> GPT2Config:
    """Reads the model's sizes from config.json. Raises ValueError if it describes another model."""
    fields = _read_json(folder / "config.json")
    sizes = {field: fields.get(field) for field in SIZES}
    wrong = [f"{name} must be an integer, got {shown(v)}" for name, v in sizes.items() if type(v) is not int]
    inner = {} if wrong else {"n_inner": (None, 4 * sizes["n_embd"])}
    for field, values in {**MEANS_GPT2, **inner}.items():
        if fields.get(field, values[0]) not in values:
            wanted = " or ".join(map(json.dumps, values))
            wrong.append(f"{field} must be {wanted}, got {shown(fields[field])}")
    if wrong:
        raise ValueError(f"weights: {folder / 'config.json'}: {'; '.join(wrong)}; only a GPT-2 can be loaded")
    return GPT2Config(**sizes, dropout=dropout)


def _check_sizes(folder: Path, config: GPT2Config, stored: dict[str, Tensor]) -> None:
    """Raises ValueError if the sizes ask for much more than the files hold: such a model is not even listed."""
    C, L = config.n_embd, config.n_layer
    needed = L * C * (12 * C + 13) + C * (config.vocab_size + config.n_positions + 2)  # as model.presets counts
    present = sum(tensor.numel() for tensor in stored.values())
    if L > len(stored) or needed > 2 * present + 2**16:
        sizes = ", ".join(f"{name} {getattr(config, name):,}" for name in SIZES)
        raise ValueError(
            f"weights: {folder} must hold the tensors of the GPT-2 in its config.json, got {len(stored):,} tensors of "
            f"{present:,} numbers for {sizes}; use config.json and model.safetensors of the same model"
        )


def open_tensors(path: Path) -> safe_open:
    """Opens a safetensors file. safetensors takes names in UTF-8 only, so another goes by its number.

    Raises BadFile if it is no file that can be read: safetensors would wait for a pipe.
    """
    with open_file(path) as file:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            return safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt")
        return safe_open(path, framework="pt")


def _open_weights(folder: Path) -> dict[str, Tensor]:
    """Maps every tensor of the directory's safetensors into memory, by name without the prefix."""
    stored: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with open_tensors(path) as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (file is no dict)
        except Exception as error:  # safetensors raises many types for a header that is damaged
            got = "none" if isinstance(error, FileNotFoundError) else error
            raise ValueError(
                f"weights: {path} must be a complete safetensors file, got {got}; download or export it again"
            ) from error
        for key, tensor in tensors.items():
            name = plain_name(key)
            if name in stored:
                raise ValueError(f"weights: {folder} must hold {name} once, got it twice; remove one of the two")
            if not CAUSAL_MASK.fullmatch(name):
                stored[name] = tensor
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """Paths of model.safetensors, or of the files that model.safetensors.index.json names."""
    if os.path.lexists(folder / "model.safetensors"):
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        weight_map = _read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(file, str) and file == Path(file).name for file in files):
            raise ValueError(
                f"weights: weight_map in {index} must give file names, got another value; download it again"
            )
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
    """Raises ValueError, naming each tensor that is missing, unknown or of wrong shape or dtype."""
    expected = shapes | {HEAD: shapes["wte.weight"]}
    if not shapes.keys() & stored.keys() and (ends := [n for n in stored if n.endswith("wte.weight")]):
        raise ValueError(
            f"weights: {folder} must hold tensors of GPT-2's names, such as wte.weight, got {ends[0][:80]}; write them "
            f"without what stands before, {ends[0].removesuffix('wte.weight')[:80]!r}"
        )
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
            f"weights: {folder} must hold the tensors of the GPT-2 in its config.json: {few(wrong, between='; ')}; "
            "use config.json and model.safetensors of the same model"
        )
