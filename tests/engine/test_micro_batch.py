"""The default micro-batch on a GPU: an estimate held against saved tensors, and a choice that all ranks share."""

import dataclasses
import json

import pytest
import torch

from engine import device
from engine.config import PRESETS, batch_shape
from engine.distributed import Ranks
from engine.planning import memory
from engine.planning.memory import Place
from engine.tuning import choices
from model.gpt2 import GPT2, GPT2Config
from model.presets import activation_bytes, parameter_shapes

GIB = 2**30
SHAPE = GPT2Config(n_layer=3, n_head=4, n_embd=128, n_positions=32, vocab_size=257)
TOKENS = 64  # two sequences


def saved_bytes(backend: str, dtype: torch.dtype, recompute: str) -> int:
    """Bytes that a forward pass stores for backward, each storage once, without parameters."""
    model = GPT2(SHAPE)
    try:
        model.configure(backend, dtype, recompute)
    except ValueError as error:
        pytest.skip(str(error))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 257, (2, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in found.items() if address not in own)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "recompute", "recomputed"),
    [
        pytest.param(torch.float32, "none", 0, id="fp32"),
        pytest.param(torch.float32, "attention", 4, id="attention recomputed"),
        pytest.param(torch.float32, "block", 14 + 1, id="block recomputed"),  # the first block has one input only
        pytest.param(torch.float16, "none", 0, id="fp16"),
    ],
)
def test_the_estimate_is_within_two_percent_of_what_the_forward_pass_saves(backend, dtype, recompute, recomputed):
    width = TOKENS * SHAPE.n_embd * dtype.itemsize  # `recomputed` of them exist in backward only
    dweight = SHAPE.padded_vocab_size * SHAPE.n_embd * torch.float32.itemsize
    shapes = parameter_shapes(SHAPE)
    casts = sum(rows * cols[0] for name, (rows, *cols) in shapes.items() if name.startswith("h.") and cols)
    expected = activation_bytes(SHAPE, TOKENS, dtype.itemsize, recompute) - recomputed * width + dweight
    expected += casts * dtype.itemsize if dtype != torch.float32 else 0
    assert saved_bytes(backend, dtype, recompute) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "free_gib", "place", "changes", "largest"),
    [
        pytest.param("gpt2", 78.5, Place(), {}, 64, id="H100"),
        pytest.param("gpt2", 23, Place(), {}, 32, id="24 GB"),
        pytest.param("gpt2-xl", 78.5, Place(), {}, 16, id="a large model"),
        pytest.param("gpt2-xl", 78.5, Place(8), {"parallel": "fsdp"}, 16, id="sharded"),
        pytest.param("gpt3-175b", 78.5, Place(), {}, 1, id="nothing fits"),
    ],
)
def test_the_largest_micro_batch_that_fits_is_taken(preset, free_gib, place, changes, largest):
    config = dataclasses.replace(PRESETS[preset], **changes)
    assert memory.largest_micro_batch(config, "bf16", free_gib * GIB, place) == largest
    if largest > 1:
        assert memory.step_bytes(config, largest, "bf16", place) < 0.9 * free_gib * GIB
    assert memory.step_bytes(config, 2 * largest, "bf16", place) > 0.9 * free_gib * GIB or largest == 64


@pytest.mark.parametrize(("per_rank", "most", "size"), [(512, 64, 64), (512, 8, 8), (96, 64, 48), (7, 64, 7)])
def test_the_micro_batch_still_divides_the_step(per_rank, most, size):
    config = dataclasses.replace(PRESETS["gpt2"], tokens_per_step=2 * per_rank * 1024)
    assert batch_shape(config, 2, most) == (size, per_rank // size)
    asked = dataclasses.replace(config, micro_batch_size=1)
    assert batch_shape(asked, 2, most) == (1, per_rank)


# ---- The choice of a run ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TwoGPUs(Ranks):
    """Rank 0 of two; the other one has room for `other` sequences."""

    other: int = 64

    def gather(self, value):
        return [value, self.other if isinstance(value, int) else value]  # sequences; whether it compiles

    def broadcast_object(self, value):
        return value


def chosen(monkeypatch, out, other: int = 64, free_gib: float = 78.5, **changes) -> int:
    monkeypatch.setattr(device, "wants_compile", lambda asked, gpu: (asked is not False, ""))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free_gib * GIB, 80 * GIB))
    config = dataclasses.replace(PRESETS["gpt2"], out=str(out), **changes)
    return choices.largest_micro_batch(config, "bf16", TwoGPUs(0, 0, 2, torch.device("cuda", 0), other=other))


def test_all_ranks_take_the_least_that_fits_on_any(monkeypatch, tmp_path):
    assert chosen(monkeypatch, tmp_path) == 64
    assert chosen(monkeypatch, tmp_path, other=8) == 8
    assert chosen(monkeypatch, tmp_path, free_gib=23) == 32
    assert chosen(monkeypatch, tmp_path, compile=False) == 16  # the estimate is of a compiled step


def test_a_run_that_goes_on_keeps_its_number_where_that_fits(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"resolved": {"precision": "bf16", "micro_batch_size": 16}}))
    assert chosen(monkeypatch, tmp_path) == 64  # without a checkpoint it begins anew
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert chosen(monkeypatch, tmp_path) == 16
    assert chosen(monkeypatch, tmp_path, resume="never") == 64
    assert chosen(monkeypatch, tmp_path, other=8) == 8
    (tmp_path / "config.json").write_text("{")
    assert chosen(monkeypatch, tmp_path) == 64


def test_a_cpu_takes_at_most_16(tmp_path):
    config = dataclasses.replace(PRESETS["gpt2"], out=str(tmp_path))
    assert choices.largest_micro_batch(config, "fp32", Ranks(0, 0, 1, torch.device("cpu"))) == 16
