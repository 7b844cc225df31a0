"""The default micro-batch on a GPU: an estimate held against saved tensors, and a choice that all ranks share."""

import dataclasses
import json
import types

import pytest
import torch

from engine import device, optim, start
from engine.config import PRESETS, batch_shape, parse
from engine.distributed import Ranks
from engine.health.timing import Clock
from engine.parts import Data, Past
from engine.planning import memory
from engine.planning.memory import Place
from engine.step import Guard, Step
from engine.tokens.batches import Batches
from engine.tuning import choices
from model.gpt2 import GPT2, GPT2Config
from model.presets import parameter_shapes

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
    ("dtype", "recompute"),
    [
        pytest.param(torch.float32, "none", id="fp32"),
        pytest.param(torch.float32, "attention", id="attention recomputed"),
        pytest.param(torch.float32, "block", id="block recomputed"),
        pytest.param(torch.float16, "none", id="fp16"),
    ],
)
def test_the_estimate_is_within_two_percent_of_what_the_forward_pass_saves(backend, dtype, recompute):
    config = dataclasses.replace(PRESETS["gpt2"], model=SHAPE, tokens_per_step=TOKENS, recompute=recompute)
    precision = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    dweight = SHAPE.padded_vocab_size * SHAPE.n_embd * torch.float32.itemsize
    shapes = parameter_shapes(SHAPE)
    casts = sum(rows * cols[0] for name, (rows, *cols) in shapes.items() if name.startswith("h.") and cols)
    expected = memory.peaks(config, 2, precision, Place(device_type="cpu"))["head"]["activations"] + dweight
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


def chosen(monkeypatch, out, other: int = 64, free_gib: float = 78.5, ranks=None, **changes) -> int:
    monkeypatch.setattr(device, "wants_compile", lambda asked, gpu: (asked is not False, ""))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda gpu: (free_gib * GIB, 80 * GIB))
    config = dataclasses.replace(PRESETS["gpt2"], out=str(out), **changes)
    ranks = ranks or TwoGPUs(0, 0, 2, torch.device("cuda", 0), other=other)
    return choices.largest_micro_batch(config, "bf16", ranks)


def test_all_ranks_take_the_least_that_fits_on_any(monkeypatch, tmp_path):
    assert chosen(monkeypatch, tmp_path) == 64
    assert chosen(monkeypatch, tmp_path, other=8) == 8
    assert chosen(monkeypatch, tmp_path, free_gib=23) == 32
    assert chosen(monkeypatch, tmp_path, free_gib=23, compile=False) == 32


def test_an_uncompiled_step_takes_what_fits_uncompiled(monkeypatch, tmp_path):
    config = dataclasses.replace(PRESETS["gpt2-xl"], recompute="block", out=str(tmp_path))
    both = [memory.step_bytes(config, 8, "bf16", Place(is_compiled=which)) for which in (False, True)]
    alone = Ranks(0, 0, 1, torch.device("cuda", 0))
    between = sum(both) / 2 / (1 - memory.MARGIN) / GIB
    changes = {"model": config.model, "recompute": "block", "tokens_per_step": config.tokens_per_step}
    assert chosen(monkeypatch, tmp_path, free_gib=between, ranks=alone, compile=False, **changes) == 8
    assert chosen(monkeypatch, tmp_path, free_gib=between, ranks=alone, **changes) < 8


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


# ---- The trial before the first update ----------------------------------------------------------------------------


class Narrow(torch.nn.Module):
    """A model that has memory for so many sequences."""

    def __init__(self, most: int):
        super().__init__()
        torch.manual_seed(0)
        self.raw_model, self.most, self.seen = GPT2(SHAPE), most, []

    def forward(self, tokens, targets):
        self.seen.append(len(tokens))
        if len(tokens) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.raw_model(tokens, targets)


def step_of(model, ranks) -> Step:
    optimizer = optim.build(model.raw_model, PRESETS["gpt2"].optim)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Step(model, optimizer, scaler, Guard(ranks.device), 1, 1.0, ranks, Clock(ranks.device))


def data_of(config, world_size: int) -> Data:
    shape = batch_shape(config, world_size, 8)
    stream = types.SimpleNamespace(num_windows=lambda context: 1000)
    batches = Batches(
        stream, context=32, tokens_per_step=config.tokens_per_step, micro_batch_size=shape[0], world_size=world_size
    )
    return Data(None, stream, stream, None, *shape, batches)


@dataclasses.dataclass(frozen=True)
class TwoRanks(TwoGPUs):
    """Rank 0 of two; the other one says what is given."""

    other: bool = True


@pytest.mark.parametrize(
    ("ranks", "most", "size"),
    [
        pytest.param(Ranks(0, 0, 1, torch.device("cpu")), 8, 8, id="fits"),
        pytest.param(Ranks(0, 0, 1, torch.device("cpu")), 4, 4, id="halved"),
        pytest.param(Ranks(0, 0, 1, torch.device("cpu")), 1, 4, id="halved once only"),
        pytest.param(TwoRanks(0, 0, 2, torch.device("cpu"), other=False), 8, 4, id="another rank has less"),
    ],
)
def test_micro_batches_that_do_not_fit_are_halved_once_on_all_ranks_together(monkeypatch, capsys, ranks, most, size):
    if ranks.world_size == 2:
        monkeypatch.setattr(TwoRanks, "gather", lambda self, value: [value, self.other])
    config = dataclasses.replace(PRESETS["gpt2"], model=SHAPE, tokens_per_step=16 * 32 * ranks.world_size)
    model, data, past = Narrow(most), data_of(config, ranks.world_size), Past({"micro_batch_size": 8}, None, 0, 0)
    made = start.fitted(config, data, past, step_of(model, ranks))
    assert (made.micro_batch_size, made.accumulation) == (size, 16 // size)
    assert (made.batches.micro_batch_size, made.batches.accumulation) == (size, 16 // size)
    assert made.batches.sequences == data.batches.sequences
    assert past.identity["micro_batch_size"] == size
    assert set(model.seen) == {8}  # the smaller size is not tried: the first update says what it needs
    assert all(parameter.grad is None for parameter in model.parameters())
    said = capsys.readouterr().out
    takes = f"this run takes {16 // size} of {size} in place of 2, and the tokens of a step stay the same"
    assert said == ("" if size == 8 else f"memory: micro-batches of 8 sequences do not fit; {takes}\n")


@pytest.mark.parametrize("most", [pytest.param(8, id="fits"), pytest.param(1, id="out of memory")])
def test_an_update_after_the_trial_has_the_same_bits(most):
    tokens = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(0))
    weights = []
    for is_tried in (False, True):
        model = Narrow(most)
        step = step_of(model, Ranks(0, 0, 1, torch.device("cpu")))
        if is_tried:
            assert step.fits(2, 32, 2) == (most >= 2)
        step(0, [(tokens, tokens)] * 2, 1e-3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_an_error_that_is_not_of_memory_is_raised():
    model = Narrow(8)
    model.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step_of(model, Ranks(0, 0, 1, torch.device("cpu"))).fits(2, 32, 2)


def test_only_a_new_run_that_chose_its_size_on_a_gpu_is_tried():
    gpu, cpu = (Ranks(0, 0, 1, torch.device(name)) for name in ("cuda", "cpu"))
    config = PRESETS["gpt2"]
    assert choices.is_tried(config, True, gpu)
    assert not choices.is_tried(config, True, cpu)
    assert not choices.is_tried(config, False, gpu)  # goes on
    assert not choices.is_tried(dataclasses.replace(config, micro_batch_size=8), True, gpu)
    assert not choices.is_tried(dataclasses.replace(config, parallel="fsdp"), True, gpu)


def test_auto_is_the_size_that_config_json_calls_null():
    for words in (["--micro-batch-size", "auto"], ["--micro-batch-size=auto"], ["--micro_batch_size", "auto"], []):
        assert parse(["gpt2", *words, "--seed", "2"], "gpt2 train").micro_batch_size is None
    assert parse(["gpt2", "--micro-batch-size", "4"], "gpt2 train").micro_batch_size == 4
