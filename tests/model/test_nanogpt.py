"""nanoGPT's ckpt.pt: the logits are those of its own forward; what is no checkpoint of it is refused and not run."""

import math
import os
import re

import pytest
import torch
import torch.nn.functional as F

from model import nanogpt
from model.gpt2 import GPT2

C, L, H, T, V = 16, 2, 2, 12, 320
LINEARS = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}


def state(bias: bool = True) -> dict[str, torch.Tensor]:
    """Random weights under nanoGPT's names. Linear layers are (out, in)."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"wte": (V, C), "wpe": (T, C), "ln_f": (C,)}
    shapes |= {f"h.{i}.{name}": shape for i in range(L) for name, shape in LINEARS.items()}
    shapes |= {f"h.{i}.{name}": (C,) for i in range(L) for name in ("ln_1", "ln_2")}
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"transformer.{name}.weight"] = 0.4 * torch.randn(shape, generator=generator)
        if bias and name not in ("wte", "wpe"):
            tensors[f"transformer.{name}.bias"] = 0.4 * torch.randn(shape[:1], generator=generator)
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def write(path, tensors: dict, prefix: str = "", **arguments):
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V, "dropout": 0.1}
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in tensors.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": {**sizes, "bias": True} | arguments,
        "iter_num": 9,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "openwebtext", "compile": True},
    }
    torch.save(checkpoint, path)
    return path


def forward(tensors: dict, tokens: torch.Tensor, gelu: str) -> torch.Tensor:
    """Logits of nanoGPT's model, written out in float64 with one loop per head."""
    at = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}

    def linear(x, name):
        return x @ at[f"{name}.weight"].t() + at.get(f"{name}.bias", 0.0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
        return x * at[f"{name}.weight"] + at.get(f"{name}.bias", 0.0)

    x = at["wte.weight"][tokens] + at["wpe.weight"][: tokens.shape[1]]
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    for i in range(L):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=2)
        heads = []
        for part in torch.arange(C).split(C // H):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(C // H)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, dim=2), f"h.{i}.attn.c_proj")
        h = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate=gelu)
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ at["lm_head.weight"].t()


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no-biases"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_logits_are_those_of_nanogpt_s_forward(bias, prefix, tmp_path):
    tensors = state(bias)
    model, notes = nanogpt.load(GPT2, write(tmp_path / "ckpt.pt", tensors, prefix, bias=bias))
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    ours, exact = model(tokens).double(), forward(tensors, tokens, "tanh")
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (forward(tensors, tokens, "none") - exact).abs().max() > 3e-5 * exact.abs().max()  # the other GELU shows
    assert [note.partition(" ")[0] for note in notes] == ["newer", "the"][: 1 if bias else 2]
    assert not model.wte.weight[V:].any()
    assert all(p.is_contiguous() and p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_the_two_forms_of_gelu_differ_by_what_the_note_says():
    x = torch.linspace(-8, 8, 1_000_001, dtype=torch.float64)
    difference = (F.gelu(x) - F.gelu(x, approximate="tanh")).abs()
    assert 0.00047 < difference.max() < 0.00048
    assert difference[x.abs() < 2].max() < 0.0004
    assert "0.0005" in nanogpt.GELU_NOTE


def test_masks_of_older_versions_and_sizes_that_are_not_given_are_no_obstacle(tmp_path):
    tensors = state() | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, T, T) for i in range(L)}
    model, _ = nanogpt.load(GPT2, write(tmp_path / "ckpt.pt", tensors, vocab_size=None))
    assert model.config.vocab_size == V


def altered(**changes) -> dict[str, torch.Tensor]:
    return state() | {f"transformer.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}


REFUSED = {
    "another architecture": (state(), {"use_rmsnorm": True}, "use_rmsnorm must be off, got True: it changes what is"),
    "other sizes": (state(), {"n_layer": 10**7}, "n_layer must be 2, as its tensors show, got 10000000"),
    "heads that are no number": (state(), {"n_head": "2"}, "n_head must be an integer, got '2'"),
    "heads that do not divide": (state(), {"n_head": 3}, "n_embd must be a multiple of n_head"),
    "a shape": (altered(ln_f__bias=torch.zeros(3)), {}, "ln_f.bias must be (16,), got (3,)"),
    "an unknown tensor": (altered(h__0__moe=torch.zeros(3)), {}, "h.0.moe is unknown"),
    "no finite numbers": (altered(ln_f__bias=torch.full((C,), math.nan)), {}, "NaN or infinity: 16 in ln_f.bias"),
    "a head of its own": (state() | {"lm_head.weight": torch.ones(V, C)}, {}, "lm_head.weight must equal wte.weight"),
    "half of the biases": ({k: v for k, v in state().items() if "ln_1.bias" not in k}, {}, "h.0.ln_1.bias is missing"),
    "a huge view": (altered(ln_f__bias=torch.zeros(1).expand(C)), {}, "ln_f.bias must be contiguous"),
    "integers": (
        altered(ln_f__bias=torch.zeros(C, dtype=torch.int32)),
        {},
        "float32, float16 or bfloat16, got torch.int",
    ),
    "no tensors": ({"transformer.wte.weight": 3}, {}, "must hold wte.weight once, as a tensor"),
    "another model's names": ({"layers.0.weight": torch.ones(2)}, {}, "must hold wte.weight and wpe.weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_off_is_refused_by_name(what, tmp_path):
    tensors, arguments, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        nanogpt.load(GPT2, write(tmp_path / "ckpt.pt", tensors, **arguments))
    assert len(str(raised.value)) < 800


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_in_a_sentence_and_does_not_run(zipped, tmp_path):
    path, mark = tmp_path / "ckpt.pt", tmp_path / "it ran"
    torch.save({"model": Bomb(mark), "model_args": {}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="which could run code" if zipped else "the old format of torch.save, or no"):
        nanogpt.load(GPT2, path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_damaged_file_a_pipe_and_nothing_end_in_a_sentence(tmp_path):
    path = write(tmp_path / "ckpt.pt", state())
    whole = path.read_bytes()
    for kept in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"weights: .* must be a checkpoint"):
            nanogpt.load(GPT2, path)
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("pipe.pt", "none.pt"):
        with pytest.raises(ValueError, match=r"weights: .* must (be|exist)"):
            nanogpt.load(GPT2, tmp_path / name)
    torch.save([1], path)
    with pytest.raises(ValueError, match="with model and model_args, got list"):
        nanogpt.load(GPT2, path)
