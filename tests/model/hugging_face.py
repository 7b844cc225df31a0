"""Helpers that build, randomize, rewrite and compare transformers' own GPT-2."""

import json

import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from model.gpt2 import GPT2, GPT2Config

SMALL = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=6, vocab_size=11)


def hf_config(config: GPT2Config, **changes) -> transformers.GPT2Config:
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    end = config.vocab_size - 1
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=end, eos_token_id=end, **changes)


def randomized(model):
    """Draws every parameter anew, biases and LayerNorms too, so that one left out shows. Returns the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if isinstance(model, GPT2):
            model.wte.weight[model.config.vocab_size :] = 0.0
    return model


def hf_model(config: GPT2Config, **changes) -> transformers.GPT2LMHeadModel:
    return randomized(transformers.GPT2LMHeadModel(hf_config(config, **changes))).eval()


def in_our_layout(hf: transformers.GPT2LMHeadModel) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(parameter, gradient) by our name, transposed where transformers' module is a Conv1D."""
    transposed = {f"{name}.weight" for name, module in hf.named_modules() if isinstance(module, Conv1D)}
    return {
        name.removeprefix("transformer."): tuple(
            tensor.detach().t() if tensor is not None and name in transposed else tensor
            for tensor in (parameter, parameter.grad)
        )
        for name, parameter in hf.named_parameters()
    }


def rewrite_weights(directory, change) -> None:
    """Reads model.safetensors, lets `change` alter the dictionary, writes it back."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(directory, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same_weights(model: GPT2, hf: transformers.GPT2LMHeadModel) -> None:
    ours, theirs = dict(model.named_parameters()), in_our_layout(hf)
    assert ours.keys() == theirs.keys()
    for name, (expected, _) in theirs.items():
        assert torch.equal(ours[name][: len(expected)], expected.float()), name
