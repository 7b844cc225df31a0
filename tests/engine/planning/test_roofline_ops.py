"""The roofline's counts of FLOPs and bytes against the calls that a step really makes.

Steps run on fake tensors, which have shapes and no numbers: so every call of this engine's GPU path, at GPT-2's own
sizes, can be counted on a CPU in a second.
"""

import functools
import sys
from collections import Counter

import pytest
import torch
import torch.utils._pytree as pytree
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench.reference import ReferenceGPT2
from engine import distributed
from engine.chips import Chip
from engine.planning.communication import ITEMSIZE
from engine.planning.roofline_ops import HEAD, Op, StepShape, step_ops
from kernels import cross_entropy
from model import tied
from model.gpt2 import GPT2
from model.presets import PRESETS, GPT2Config, flops_per_token, num_parameters, parameter_shapes

SMALL = GPT2Config(n_layer=3, n_head=2, n_embd=48, n_positions=20, vocab_size=200)
PRODUCTS = ("aten::addmm", "aten::mm", "aten::mm.out", "aten::addmm_")
CASTS = ("aten::_to_copy", "aten::to.dtype")
NORMS = ("layer_norm", "add_layer_norm", "add_layer_norm, ln_f")
BIASES = ("c_attn dbias", "attn.c_proj dbias", "mlp.c_proj dbias")
SUMS = ("sum of wte's gradients", "gradient of the first sum")


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Calls(TorchDispatchMode):
    """Counts the calls and bytes of each op, and the FLOPs and bytes of each matrix product; sees into the head."""

    def __init__(self, config: GPT2Config, B: int, T: int):
        super().__init__()
        self.stats = [(B, T), (B, config.n_head, T)]  # mean, rstd and lse are the kernels' own
        self.parameters = [p for shape in parameter_shapes(config).values() for p in (shape, shape[::-1])]
        self.table, self.stream = (config.padded_vocab_size, config.n_embd), (B, T, config.n_embd)
        self.found: dict[str, Counter] = {}
        self.products: Counter[tuple[int, int]] = Counter()
        self.softmax_rows = 0
        self.is_backward = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name() == "gpt2::linear_cross_entropy":
            outputs = cross_entropy._allocate(*args)
            with self:
                cross_entropy._fill_triton(outputs, *args)
            return outputs
        out = op(*args, **(kwargs or {}))
        if op.namespace in ("aten", "gpt2"):
            read, written = (
                [t for t in pytree.tree_leaves(ts) if isinstance(t, torch.Tensor)] for ts in (list(args), out)
            )
            self.see(op.name(), read, written)
        return out

    def see(self, name: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        if name in PRODUCTS:
            self.see_product(read, written)
        kept = [t for t in [*read, *written] if tuple(t.shape) not in self.stats]
        shapes = [tuple(t.shape) for t in kept]
        if name.startswith("gpt2::"):
            self.add(name.removeprefix("gpt2::"), kept)
        elif name == "aten::sum.dim_IntList" and len(shapes[0]) == 2:
            self.add("dbias", kept)
        elif name in CASTS and shapes[0] in self.parameters and kept[0].dtype != kept[1].dtype:
            down = "head weight cast" if shapes[0] == self.table else "weight casts"
            self.add("gradient casts" if kept[1].dtype == torch.float32 else down, kept)
        elif name == "aten::add.Tensor" and shapes in ([self.table] * 3, [self.stream] * 3):
            self.add(SUMS[shapes[0] == self.stream], kept)
        elif name == "aten::add_.Tensor" and len(shapes) == 3 and shapes[0] in self.parameters:
            self.add("gradient accumulation", kept)

    def see_product(self, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        (N, K), (_, M) = read[-2].shape, read[-1].shape
        flops, number = 2 * N * K * M, nbytes([*read, *written])
        place = {M: "head logits", K: "head dhidden", N: "head dweight"}.get(self.table[0])
        if place is None:
            self.products[flops, number] += 1
        else:
            self.found.setdefault(place, Counter()).update(calls=1, bytes=number, flops=flops)

    def add(self, kind: str, tensors: list[torch.Tensor]) -> None:
        again = " again" if self.is_backward and kind in ("attention", "bias_gelu", "weight casts", *NORMS) else ""
        self.found.setdefault(kind + again, Counter()).update(calls=1, bytes=nbytes(tensors))


@functools.cache
def counted(config, B, T, precision, recompute, micro_batches) -> Calls:
    """Forward and backward passes of our model with Triton's ops, on tensors without content."""
    calls = Calls(config, B, T)

    def start(name, width, device, launch):
        calls.softmax_rows += 1

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(cross_entropy, "with_config", start)
        patch.setattr(tied, "split", lambda weight: (None, weight))  # as on a GPU
        model = GPT2(config)
        model.configure("triton", {2: torch.float16, 4: torch.float32}[ITEMSIZE[precision]], recompute)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        with calls:
            for _ in range(micro_batches):
                calls.is_backward = False
                loss = model(tokens, tokens)
                calls.is_backward = True
                loss.backward()
    return calls


def total(ops, *names: str, phase: str | None = None) -> Counter:
    some = [op for op in ops if op.name in names and phase in (None, op.phase)]
    return Counter(calls=sum(op.calls for op in some), bytes=sum(op.bytes for op in some))


WIDE = GPT2Config(2, 12, 768)  # GPT-2's sizes, in two layers
STEPS = pytest.mark.parametrize(
    "step",
    [
        pytest.param((WIDE, 64, 1024, "bf16", "none", 1), id="gpt2"),
        pytest.param((WIDE, 9, 1000, "fp32", "none", 1), id="uneven-chunks"),
        pytest.param((SMALL, 2, 17, "fp32", "none", 3), id="micro-batches"),
        pytest.param((SMALL, 5, 20, "fp16", "attention", 2), id="attention-again"),
        pytest.param((SMALL, 3, 19, "bf16", "block", 1), id="block-again"),
    ],
)


@STEPS
def test_every_op_has_the_calls_and_bytes_that_a_step_really_makes(step):
    found, ops = counted(*step).found, step_ops(StepShape(*step))
    for suffix, phase in (("", "forward"), (" again", "backward"), ("_backward", "backward")):
        kinds = ("layer_norm",) if suffix == "_backward" else ("layer_norm", "add_layer_norm")
        norms = sum((found.get(kind + suffix, Counter()) for kind in kinds), Counter())
        names = [name + suffix.replace("_backward", "") for name in NORMS]
        assert norms == +total(ops, *names, phase=phase), f"LayerNorm{suffix}"
        for op in ("attention", "bias_gelu"):
            name = op + suffix.replace("_backward", "")
            assert found.get(op + suffix, Counter()) == +total(ops, name, phase=phase), op + suffix
    assert found["dbias"] == total(ops, *BIASES)
    for name in (*SUMS, "head weight cast", "weight casts", "weight casts again", "gradient casts"):
        assert found.get(name, {"bytes": 0})["bytes"] == total(ops, name)["bytes"], name
    accumulated = found.get("gradient accumulation", {"bytes": 0})["bytes"]
    assert accumulated == total(ops, "gradient accumulation")["bytes"]


@STEPS
def test_every_matrix_product_has_the_flops_and_bytes_that_a_step_really_makes(step):
    calls, ops = counted(*step), step_ops(StepShape(*step))
    products: Counter[tuple[int, int]] = Counter()
    for op in ops:
        if op.flops and op.group not in ("attention", HEAD):
            products[op.flops // op.calls, op.bytes // op.calls] += op.calls
    assert calls.products == products
    for op in (op for op in ops if op.group == HEAD and op.flops):
        seen = calls.found[op.name]
        assert (seen["calls"], seen["flops"]) == (op.calls, op.flops), op.name
        if op.name != "head dweight" or step[3] == "fp32":  # only a GPU adds 16-bit products to a float32 sum
            assert seen["bytes"] == op.bytes, op.name
    assert calls.softmax_rows == next(op.calls for op in ops if op.name == "head softmax")


def test_the_whole_update_passes_over_every_parameter_as_often_as_counted():
    model = GPT2(SMALL)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    seen: dict[str, int] = {}

    class Updates(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            for given, declared in zip(args, op._schema.arguments, strict=False):
                lists = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor) and t.ndim]
                changed = declared.alias_info is not None and declared.alias_info.is_write and declared.name != "grads"
                seen[op.name()] = seen.get(op.name(), 0) + (1 + changed) * nbytes(lists)
            return op(*args, **(kwargs or {}))

    with Updates():
        distributed.clip(model, 1.0)
        optimizer.step()
    ops = step_ops(StepShape(SMALL, 1, 8, "fp32"))
    assert sum(p.numel() for p in parameters) == num_parameters(SMALL)
    assert seen["aten::_fused_adamw_"] == total(ops, "AdamW")["bytes"]
    assert seen["aten::_foreach_mul_.Tensor"] == total(ops, "scaling of the gradient")["bytes"]
    assert seen["aten::_foreach_norm.Scalar"] == total(ops, "norm of the gradient")["bytes"]


@pytest.mark.parametrize(
    ("kind", "recompute"), [("reference", "none"), ("ours", "none"), ("ours", "attention"), ("ours", "block")]
)
def test_flops_are_those_that_pytorch_counts_in_a_real_step(monkeypatch, kind, recompute):
    config = GPT2Config(n_layer=2, n_head=2, n_embd=48, n_positions=24, vocab_size=256)  # no padding
    model = ReferenceGPT2(config) if kind == "reference" else GPT2(config)
    if kind == "ours":
        model.configure("torch", torch.float32, recompute)
        monkeypatch.setattr(cross_entropy, "_torch_op", SeenInside.apply)
    tokens = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    aten = torch.ops.aten
    on_cpu = {  # PyTorch's own formulas, which it applies to the GPU's ops only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, q, k, v, *_, **__: (
            sdpa_backward_flop_count(dout, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        model(tokens, tokens).backward()
    ops = step_ops(StepShape(config, 3, 24, "fp32", recompute))
    # PyTorch counts every pair of positions, and five products in the backward pass as the roofline does.
    want = sum(op.flops * (2 if op.name.startswith("attention") else 1) for op in ops)
    assert counter.get_total_flops() == want


class SeenInside(torch.autograd.Function):
    """The head as a function whose products a counter sees, where the registered op hides them."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = cross_entropy._allocate(*inputs)
        cross_entropy._fill_torch(outputs, *inputs)
        ctx.save_for_backward(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, dtotal, *_):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dtotal, dweight * dtotal, None, None, None, None


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "gpt3-6.7b"])
@pytest.mark.parametrize("T", [256, 1024])
def test_products_sum_to_the_convention_of_mfu_less_what_it_adds(name, T):
    config, B = PRESETS[name], 3
    L, C = config.n_layer, config.n_embd
    flops = sum(op.flops for op in step_ops(StepShape(config, B, T)))
    # The convention multiplies biases and LayerNorms like matrices, and counts attention whole: 12 L C T. Half of it
    # is causal, 6 L C T, and flash attention works out the scores again in the backward pass, which adds L C T.
    added = 6 * (L * 13 * C + 2 * C) + 12 * L * C * T - 7 * L * C * T
    assert flops == B * T * (flops_per_token(config, T) - added)


def test_a_bound_is_the_larger_of_two_times_and_says_which():
    chip = Chip("c", "", {"bf16": 1e12}, 1e9)
    product, copy = Op("a", "a", "forward", 1, 3 * 10**12, 10**9), Op("b", "b", "forward", 1, 10**9, 2 * 10**9)
    assert (product.bound_ms(chip, "bf16"), product.bound_by(chip, "bf16")) == (3000, "compute")
    assert (copy.bound_ms(chip, "bf16"), copy.bound_by(chip, "bf16")) == (2000, "memory")
