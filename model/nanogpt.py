"""Weights from nanoGPT's ckpt.pt: a pickle of model (tensors by name), model_args, optimizer and config.

torch.load reads it with weights_only, which makes tensors and plain containers and runs no code of
the file. The names are ours with the prefix `transformer.`, and linear layers are (out, in) as here.
A model without biases is filled with zeros: adding zero changes nothing, so it computes the same.
nanoGPT's GELU was the tanh form at first, as GPT-2's and ours; newer versions have the exact one.
The file does not say which. The two differ by at most 0.00048, at inputs of +-2.7.
Source: model.py and train.py in github.com/karpathy/nanoGPT.
"""

import pickle
import re
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from model import files
from model.files import BadFile, few
from model.presets import GPT2Config, parameter_shapes
from model.pretrained import CAUSAL_MASK, DTYPES, HEAD, not_finite, plain_name

Model = TypeVar("Model", bound=nn.Module)
ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
GELU_NOTE = (
    "newer versions of nanoGPT train with the exact GELU, and here it is GPT-2's tanh form: activations differ by at "
    "most 0.0005"
)
BIAS_NOTE = "the model has no biases; they are filled with zeros, which computes the same"
ADVICE = "only a ckpt.pt of nanoGPT can be converted: its model is a GPT-2"


def load(kind: type[Model], path: str | Path) -> tuple[Model, list[str]]:
    """Loads a GPT2, on the CPU in float32, from a ckpt.pt. Returns it with notes for the user.

    kind: the class GPT2. Its vocabulary has all rows of the file, padding included. Raises
    ValueError if the file is not a checkpoint of nanoGPT, or holds numbers that are not finite.
    """
    checkpoint = _read(path)
    stored = _tensors(path, checkpoint["model"])
    config = _config(path, checkpoint["model_args"], stored)
    shapes = {name: torch.Size(shape) for name, shape in parameter_shapes(config).items()}
    shapes["wte.weight"] = torch.Size((config.vocab_size, config.n_embd))
    notes = [GELU_NOTE]
    if not any(name.endswith(".bias") for name in stored):
        notes.append(BIAS_NOTE)
        stored |= {name: torch.zeros(shape) for name, shape in shapes.items() if name.endswith(".bias")}
    _check(path, shapes, stored)
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        view = parameter.detach()
        view[len(stored[name]) :].zero_()  # the vocabulary's padding
        view[: len(stored[name])].copy_(stored[name])
    model.configure("torch", torch.float32)
    return model, notes


def _read(path: str | Path) -> dict:
    try:
        with files.open_file(path) as file:  # no pipe is waited for
            if file.read(4) != b"PK\x03\x04":
                raise BadFile("the old format of torch.save, or no file of it")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise ValueError(f"weights: {path} must exist, got no file") from error
    except BadFile as error:
        raise ValueError(f"weights: {path} must be a checkpoint, got {error}; {ADVICE}") from error
    except Exception as error:  # a damaged file can end in any exception of pickle, zipfile or PyTorch
        raise ValueError(
            f"weights: {path} must be a checkpoint of tensors and plain values, got {_reason(error)}; {ADVICE}"
        ) from error
    wanted = {"model": dict, "model_args": dict}
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(n), k) for n, k in wanted.items()):
        got = type(checkpoint).__name__
        if isinstance(checkpoint, dict):
            got = f"one with {few([str(key)[:40] for key in checkpoint], 3)}"
        raise ValueError(f"weights: {path} must be a checkpoint with model and model_args, got {got}; {ADVICE}")
    return checkpoint


def _reason(error: Exception) -> str:
    """What torch.load found, in a few words."""
    if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
        return f"one that makes {found[1]} objects, which could run code"
    if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
        return "one that does other things, which could run code"
    return f"a damaged file: {' '.join(str(error).split()).partition('. ')[0][:160] or type(error).__name__}"


def _tensors(path: str | Path, state: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors by our names, without the masks that older versions saved."""
    stored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = plain_name(str(key))
        if CAUSAL_MASK.fullmatch(name) and name.split(".")[-1] == "bias" and getattr(tensor, "ndim", 0) == 4:
            continue
        if name in stored or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"weights: {path} must hold {name[:80]} once, as a tensor; {ADVICE}")
        stored[name] = tensor
    return stored


def _config(path: str | Path, arguments: dict, stored: dict[str, Tensor]) -> GPT2Config:
    """The model's sizes. Those that tensors show are taken from them, so that none is beyond the file's own size."""
    wte, wpe = stored.get("wte.weight"), stored.get("wpe.weight")
    if wte is None or wpe is None or wte.ndim != 2 or wpe.ndim != 2:
        raise ValueError(f"weights: {path} must hold wte.weight and wpe.weight of two axes, got neither; {ADVICE}")
    shown = {
        "n_layer": sum(name.endswith(".ln_1.weight") for name in stored),
        "n_embd": wte.shape[1],
        "block_size": wpe.shape[0],
        "vocab_size": wte.shape[0],
    }
    wrong = [
        f"{name} must be {size}, as its tensors show, got {arguments[name]!r}"
        for name, size in shown.items()
        if arguments.get(name, size) not in (size, None)
    ]
    if type(arguments.get("n_head")) is not int:
        wrong.append(f"n_head must be an integer, got {arguments.get('n_head')!r}")
    others = [(str(name), str(value)) for name, value in arguments.items() if name not in ARGUMENTS and value]
    wrong += [f"{name[:40]} must be off, got {value[:40]}: it changes what is computed" for name, value in others]
    if wrong:
        raise ValueError(f"weights: {path}: in model_args, {few(wrong, between='; ')}; {ADVICE}")
    return GPT2Config(shown["n_layer"], arguments["n_head"], shown["n_embd"], shown["block_size"], shown["vocab_size"])


def _check(path: str | Path, shapes: dict[str, torch.Size], stored: dict[str, Tensor]) -> None:
    expected = shapes | {HEAD: shapes["wte.weight"]}
    wrong = [f"{name} is missing" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            wrong.append(f"{name[:80]} is unknown")
        elif tensor.shape != expected[name]:
            wrong.append(f"{name} must be {tuple(expected[name])}, got {tuple(tensor.shape)}")
        elif tensor.dtype not in DTYPES or not tensor.is_contiguous():
            wrong.append(f"{name} must be contiguous and float32, float16 or bfloat16, got {tensor.dtype}")
    if not wrong and (odd := not_finite(stored)):
        wrong = [f"numbers must be finite, got NaN or infinity: {odd}"]
    if not wrong and not torch.equal(stored.get(HEAD, stored["wte.weight"]), stored["wte.weight"]):
        wrong = [f"{HEAD} must equal wte.weight, got other values"]
    if wrong:
        raise ValueError(
            f"weights: {path} must hold the tensors of its model_args: {few(wrong, between='; ')}; {ADVICE}"
        )
