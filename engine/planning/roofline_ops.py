"""The ops of one training step as this engine runs them on a GPU: how often, how many FLOPs, how many bytes.

Only matrix products count FLOPs, and the causal half of attention once. Bytes count each input of an op read once and
each output written once (kernels.work). tests/engine/planning/test_roofline_ops.py holds it against counted calls.
"""

from dataclasses import dataclass, replace
from typing import Literal

from engine.chips import Chip
from engine.planning.communication import ITEMSIZE
from kernels.work import TRITON_HEAD_ROWS, Sizes, work
from model.presets import GPT2Config, num_parameters

ACCUMULATION = "gradient accumulation"
HEAD = "head + loss, forward + backward"  # the group that is measured as one op
RECOMPUTE = ("none", "attention", "block")
Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Op:
    """All calls of one op in one phase of a step, on one device. FLOPs and bytes are those of all calls together."""

    name: str  # "c_attn dweight"
    group: str  # "c_attn": what a picture draws as one bar
    phase: Phase
    calls: int
    flops: int
    bytes: int

    def bound_ms(self, chip: Chip, precision: str) -> float:
        """The least time that the chip's ceilings allow."""
        return 1e3 * max(self.flops / chip.flops_per_s[precision], self.bytes / chip.bytes_per_s)

    def bound_by(self, chip: Chip, precision: str) -> Literal["compute", "memory"]:
        """Which ceiling that is."""
        by_compute = self.flops / chip.flops_per_s[precision] > self.bytes / chip.bytes_per_s
        return "compute" if by_compute else "memory"


@dataclass(frozen=True)
class StepShape:
    """One step on one of `world_size` devices: micro-batches of B sequences of T tokens."""

    config: GPT2Config
    B: int
    T: int
    precision: str = "bf16"
    recompute: str = "none"
    micro_batches: int = 1
    world_size: int = 1
    rows_per_chunk: int = TRITON_HEAD_ROWS  # of the head


def step_ops(shape: StepShape) -> list[Op]:
    """Every op of a step: forward, backward, optimizer. Those that have nothing to do here are left out."""
    if shape.recompute not in RECOMPUTE:
        raise ValueError(f"roofline: recompute must be one of {', '.join(RECOMPUTE)}, got {shape.recompute!r}")
    found = [*_embedding(shape), *_blocks(shape), *_head(shape), *_again(shape), *_casts(shape)]
    found = [times(op, shape.micro_batches) for op in found] + _update(shape)
    order = {"forward": 0, "backward": 1, "optimizer": 2}
    return sorted((op for op in found if op.calls and op.bytes), key=lambda op: order[op.phase])


def times(op: Op, calls: int) -> Op:
    """The op so many times as often."""
    return replace(op, calls=calls * op.calls, flops=calls * op.flops, bytes=calls * op.bytes)


def linear_layers(config: GPT2Config) -> dict[str, tuple[int, int, bool]]:
    """(inputs, outputs, whether it adds its bias itself) of a block's four linear layers."""
    C = config.n_embd  # the GELU adds c_fc's bias
    return {
        "c_attn": (C, 3 * C, True),
        "attn.c_proj": (C, C, True),
        "c_fc": (C, 4 * C, False),
        "mlp.c_proj": (4 * C, C, True),
    }


def _blocks(shape: StepShape) -> list[Op]:
    """Blocks and LayerNorms: the first block's ln_1 alone, all others with the residual add in front, and ln_f."""
    L, N, e, found = shape.config.n_layer, shape.B * shape.T, ITEMSIZE[shape.precision], []
    for name, (K, M, has_bias) in linear_layers(shape.config).items():
        product = L, L * 2 * N * K * M, L * e * (N * K + K * M + N * M)
        found.append(Op(name, name, "forward", *product[:2], product[2] + L * e * has_bias * M))
        found += [Op(f"{name} {what}", name, "backward", *product) for what in ("dinput", "dweight")]
        found.append(Op(f"{name} dbias", name, "backward", L * has_bias, 0, L * e * has_bias * (N * M + M)))
    for phase in ("forward", "backward"):
        kernels = {}
        for name in ("attention", "bias_gelu", "layer_norm", "add_layer_norm"):  # weights and biases are float32
            flops, num_bytes = work(name, Sizes.of(shape.config, shape.B, shape.T), e, 4)[phase]
            group = "LayerNorm + residual add" if name.endswith("layer_norm") else name
            kernels[name] = Op(name, group, phase, 1, flops, num_bytes)
        found += [times(kernels["attention"], L), times(kernels["bias_gelu"], L), kernels["layer_norm"]]
        found.append(times(kernels["add_layer_norm"], 2 * L - 1))
        last = "add_layer_norm" if phase == "forward" else "layer_norm"  # nobody differentiates the last sum
        found.append(replace(kernels[last], name="add_layer_norm, ln_f"))
    first_sum = 3 * e * N * shape.config.n_embd
    return [*found, Op("gradient of the first sum", "LayerNorm + residual add", "backward", 1, 0, first_sum)]


def _embedding(shape: StepShape) -> list[Op]:
    """wte[tokens] + wpe in the compute dtype: no row of wte is read more than once. Its gradient is dense."""
    config, N, C, e = shape.config, shape.B * shape.T, shape.config.n_embd, ITEMSIZE[shape.precision]
    table, positions = config.padded_vocab_size * C, config.n_positions * C
    read = 8 * N + 4 * (min(N, config.vocab_size) * C + shape.T * C)
    return [
        Op("embedding", "embedding", "forward", 1, 0, read + e * N * C),
        Op("embedding", "embedding", "backward", 1, 0, 8 * N + e * N * C + 4 * (table + positions)),
        Op("sum of wte's gradients", "embedding", "backward", 1, 0, 4 * 3 * table),  # of its two uses
    ]


def _head(shape: StepShape) -> list[Op]:
    """The head and its loss, in chunks of rows; its gradients are worked out in the forward pass, then scaled.

    Every chunk reads the whole weight, and adds to the whole of dweight in float32.
    """
    N, C, Vp = shape.B * shape.T, shape.config.n_embd, shape.config.padded_vocab_size
    e, chunks = ITEMSIZE[shape.precision], -(-N // shape.rows_per_chunk)
    flops, hidden, weight, logits = 2 * N * C * Vp, e * N * C, e * Vp * C, e * N * Vp
    # In float32 the first product is written; in a narrower dtype the sum is cleared, then added to.
    dweight = 4 * Vp * C * (2 * chunks - 1 if e == 4 else 2 * chunks)
    return [
        Op("head logits", HEAD, "forward", chunks, flops, hidden + chunks * weight + logits),
        Op("head softmax", HEAD, "forward", chunks, 0, 2 * logits + (8 + 4) * N),
        Op("head dhidden", HEAD, "forward", chunks, flops, logits + chunks * weight + hidden),
        Op("head dweight", HEAD, "forward", chunks, flops, logits + hidden + dweight),
        Op("head clearing", HEAD, "forward", 1, 0, 0 if e == 4 else 4 * Vp * C),
        Op("head scaling", HEAD, "backward", 1, 0, 2 * hidden + 2 * 4 * Vp * C),
    ]


def _again(shape: StepShape) -> list[Op]:
    """What the backward pass computes a second time: all but the last product, whose inputs are what was missing."""
    layers = {"none": (), "attention": ("c_attn", "attn.c_proj")}.get(
        shape.recompute, tuple(linear_layers(shape.config))
    )
    names = {"none": (), "attention": ("c_attn", "attention")}.get(
        shape.recompute, (*layers[:3], "attention", "bias_gelu", "layer_norm", "add_layer_norm")
    )
    found = [op for op in _blocks(shape) if op.phase == "forward" and op.name in names]
    if found and (e := ITEMSIZE[shape.precision]) < 4:
        found.append(
            Op("weight casts", "casts of the weights", "backward", 1, 0, (4 + e) * cast_elements(shape.config, layers))
        )
    return [replace(op, name=f"{op.name} again", phase="backward") for op in found]


def cast_elements(config: GPT2Config, layers: tuple[str, ...]) -> int:
    """Elements of the weights and biases of the blocks' linear layers that are cast to the compute dtype."""
    sizes = {name: K * M + has_bias * M for name, (K, M, has_bias) in linear_layers(config).items()}
    return config.n_layer * sum(sizes[name] for name in layers)


def _casts(shape: StepShape) -> list[Op]:
    """float32 weights to the compute dtype, and their gradients back. The head's gradient is float32 already."""
    e, config = ITEMSIZE[shape.precision], shape.config
    if e == 4:
        return []
    blocks, head = cast_elements(config, tuple(linear_layers(config))), config.padded_vocab_size * config.n_embd
    casts = (
        ("weight casts", "forward", blocks),
        ("head weight cast", "forward", head),
        ("gradient casts", "backward", blocks),
    )
    return [Op(name, "casts of the weights", phase, 1, 0, (4 + e) * elements) for name, phase, elements in casts]


def _update(shape: StepShape) -> list[Op]:
    """What touches every parameter once: sums over micro-batches, DDP's buckets, the norm, AdamW."""
    P, more = num_parameters(shape.config), shape.micro_batches - 1
    return [
        Op("gradient accumulation", ACCUMULATION, "backward", more, 0, 12 * P * more),
        Op("copy into buckets", "copy into DDP's buckets", "backward", int(shape.world_size > 1), 0, 8 * P),
        Op("unscaling of the gradient", "norm and clip", "optimizer", int(shape.precision == "fp16"), 0, 8 * P),
        Op("norm of the gradient", "norm and clip", "optimizer", 1, 0, 4 * P),
        Op("scaling of the gradient", "norm and clip", "optimizer", 1, 0, 8 * P),
        Op("AdamW", "AdamW", "optimizer", 1, 0, 28 * P),  # reads p, g, m, v; writes p, m, v
    ]
