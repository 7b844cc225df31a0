"""The ops of one training step as this engine runs them: how often, how many FLOPs, how many bytes.

A multiply and an add are two FLOPs; only matrix products count, and the causal half of attention once. Bytes count each
input of an op read once and each output written once, as bench.cases does: no version of that op moves less, except
through a cache that still holds the input. What a kernel keeps for itself (a row's mean, logsumexp) does not count.
An op ends where its result is a tensor in memory: a compiler that fuses two of them moves less than the sum.

B sequences of T positions, N = B T rows, width C, L layers, Vp padded vocabulary. Attention, LayerNorm, GELU and
the head are those of kernels/ on a GPU; dropout is off. Verified in tests/bench/test_roofline_ops.py against counted calls.
"""

from dataclasses import dataclass, replace
from typing import Literal

from bench.cases import Sizes, work
from bench.chips import Chip
from bench.communication import ITEMSIZE
from model.presets import GPT2Config, num_parameters

HEAD = "head"  # the group that is measured as one op
RECOMPUTE = ("none", "attention", "block")
Phase = Literal["forward", "backward", "optimizer"]
GPU_HEAD_ROWS = 8192  # rows of logits that the head's Triton version holds at once
CPU_HEAD_ELEMENTS = 21_000_000  # logits that it holds at once on a CPU


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


def head_rows(config: GPT2Config, on_gpu: bool) -> int:
    """Rows per chunk of the head, at most."""
    return GPU_HEAD_ROWS if on_gpu else max(1, CPU_HEAD_ELEMENTS // config.padded_vocab_size)


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
    rows_per_chunk: int = GPU_HEAD_ROWS  # of the head


def step_ops(shape: StepShape) -> list[Op]:
    """Every op of a step: forward, backward, optimizer. Those that have nothing to do here are left out."""
    config, B, T, precision, recompute = shape.config, shape.B, shape.T, shape.precision, shape.recompute
    if recompute not in RECOMPUTE:
        raise ValueError(f"roofline: recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    size = config, B, T, precision
    found = [
        *_embedding(*size),
        *_norms(*size),
        *(times(op, config.n_layer) for op in _block_forward(*size)),
        *_head(config, B * T, precision, shape.rows_per_chunk),
        *_again(*size, recompute),
        *(times(op, config.n_layer) for op in _block_backward(*size)),
        *_casts(config, precision),
    ]
    found = [times(op, shape.micro_batches) for op in found]
    found += _update(config, precision, shape.micro_batches, shape.world_size)
    order = {"forward": 0, "backward": 1, "optimizer": 2}
    return sorted((op for op in found if op.calls and op.bytes), key=lambda op: order[op.phase])


def linear_layers(config: GPT2Config) -> dict[str, tuple[int, int, bool]]:
    """(inputs, outputs, whether it adds its bias itself) of a block's four linear layers."""
    C = config.n_embd
    return {
        "c_attn": (C, 3 * C, True),
        "attn.c_proj": (C, C, True),
        "c_fc": (C, 4 * C, False),  # the GELU adds it
        "mlp.c_proj": (4 * C, C, True),
    }


def _linear_forward(name: str, N: int, size: tuple[int, int, bool], e: int) -> Op:
    K, M, has_bias = size
    return Op(name, name, "forward", 1, 2 * N * K * M, e * (N * K + K * M + N * M + has_bias * M))


def _linear_backward(name: str, N: int, size: tuple[int, int, bool], e: int) -> list[Op]:
    K, M, has_bias = size
    product = 2 * N * K * M, e * (N * M + K * M + N * K)
    found = [Op(f"{name} {what}", name, "backward", 1, *product) for what in ("dinput", "dweight")]
    return found + [Op(f"{name} dbias", name, "backward", 1, 0, e * (N * M + M))] * has_bias


def _of_kernels(op: str, phase: Phase, config: GPT2Config, B: int, T: int, e: int) -> Op:
    """A kernel's op by the table of bench.cases; weights and biases are float32."""
    done = work(op, Sizes.of(config, B, T), e, 4)[phase]
    return Op(op, "layer_norm" if op.endswith("layer_norm") else op, phase, 1, done.flops, done.bytes)


def _block_forward(config: GPT2Config, B: int, T: int, precision: str) -> list[Op]:
    """One block without its LayerNorms."""
    N, e = B * T, ITEMSIZE[precision]
    linear = {name: _linear_forward(name, N, size, e) for name, size in linear_layers(config).items()}
    attention, gelu = (_of_kernels(op, "forward", config, B, T, e) for op in ("attention", "bias_gelu"))
    return [linear["c_attn"], attention, linear["attn.c_proj"], linear["c_fc"], gelu, linear["mlp.c_proj"]]


def _block_backward(config: GPT2Config, B: int, T: int, precision: str) -> list[Op]:
    """The same, in the order of the backward pass."""
    N, e = B * T, ITEMSIZE[precision]
    linear = {name: _linear_backward(name, N, size, e) for name, size in linear_layers(config).items()}
    attention, gelu = (_of_kernels(op, "backward", config, B, T, e) for op in ("attention", "bias_gelu"))
    return [*linear["mlp.c_proj"], gelu, *linear["c_fc"], *linear["attn.c_proj"], attention, *linear["c_attn"]]


def _norms(config: GPT2Config, B: int, T: int, precision: str) -> list[Op]:
    """The first block's ln_1, all others with the residual add in front, and ln_f, whose sum nobody differentiates."""
    e, inner = ITEMSIZE[precision], 2 * config.n_layer - 1
    kernels = ("layer_norm", "add_layer_norm")
    (first, add), (first_back, add_back) = (
        [_of_kernels(op, phase, config, B, T, e) for op in kernels] for phase in ("forward", "backward")
    )
    return [
        first,
        times(add, inner),
        replace(add, name="add_layer_norm, ln_f"),
        replace(first_back, name="add_layer_norm, ln_f"),
        times(add_back, inner),
        first_back,
        Op("gradient of the first sum", "layer_norm", "backward", 1, 0, 3 * e * B * T * config.n_embd),
    ]


def times(op: Op, calls: int) -> Op:
    """The op so many times as often."""
    return replace(op, calls=calls * op.calls, flops=calls * op.flops, bytes=calls * op.bytes)


def _embedding(config: GPT2Config, B: int, T: int, precision: str) -> list[Op]:
    """wte[tokens] + wpe in the compute dtype: no row of wte is read more than once. Its gradient is dense."""
    N, C, e = B * T, config.n_embd, ITEMSIZE[precision]
    table, positions = config.padded_vocab_size * C, config.n_positions * C
    read = 8 * N + 4 * (min(N, config.vocab_size) * C + T * C)
    return [
        Op("embedding", "embedding", "forward", 1, 0, read + e * N * C),
        Op("embedding", "embedding", "backward", 1, 0, 8 * N + e * N * C + 4 * (table + positions)),
        Op("sum of wte's gradients", "embedding", "backward", 1, 0, 4 * 3 * table),  # of its two uses
    ]


def _head(config: GPT2Config, N: int, precision: str, rows: int) -> list[Op]:
    """The head and its loss, in chunks of rows; its gradients are worked out in the forward pass, then scaled.

    Every chunk reads the whole weight, and adds to the whole of dweight in float32.
    """
    C, Vp, e, chunks = config.n_embd, config.padded_vocab_size, ITEMSIZE[precision], -(-N // rows)
    flops, hidden, weight, logits = 2 * N * C * Vp, e * N * C, e * Vp * C, e * N * Vp
    # In float32 the first product is written; in a narrower dtype the sum is cleared, then added to.
    dweight = 4 * Vp * C * (2 * chunks - 1 if e == 4 else 2 * chunks)
    cleared = 0 if e == 4 else 4 * Vp * C
    return [
        Op("head logits", "head", "forward", chunks, flops, hidden + chunks * weight + logits),
        Op("head softmax", "head", "forward", chunks, 0, 2 * logits + (8 + 4) * N),
        Op("head dhidden", "head", "forward", chunks, flops, logits + chunks * weight + hidden),
        Op("head dweight", "head", "forward", chunks, flops, logits + hidden + dweight),
        Op("head clearing", "head", "forward", 1, 0, cleared),
        Op("head scaling", "head", "backward", 1, 0, 2 * hidden + 2 * 4 * Vp * C),
    ]


def _again(config: GPT2Config, B: int, T: int, precision: str, recompute: str) -> list[Op]:
    """What the backward pass computes a second time: all but the last product, whose inputs are what was missing."""
    inner = _block_forward(config, B, T, precision)
    first, add, *_ = _norms(config, B, T, precision)
    names = {"none": (), "attention": ("c_attn", "attention")}.get(recompute, tuple(op.name for op in inner[:-1]))
    found = [times(op, config.n_layer) for op in inner if op.name in names]
    found += [first, add] if recompute == "block" else []
    if found and (e := ITEMSIZE[precision]) < 4:
        layers = tuple(linear_layers(config)) if recompute == "block" else ("c_attn", "attn.c_proj")
        found.append(Op("weight casts", "casts", "backward", 1, 0, (4 + e) * cast_elements(config, layers)))
    return [replace(op, name=f"{op.name} again", phase="backward") for op in found]


def cast_elements(config: GPT2Config, layers: tuple[str, ...] | None = None) -> int:
    """Elements of the weights and biases of the blocks' linear layers that are cast to the compute dtype."""
    sizes = {name: K * M + has_bias * M for name, (K, M, has_bias) in linear_layers(config).items()}
    return config.n_layer * sum(size for name, size in sizes.items() if layers is None or name in layers)


def _casts(config: GPT2Config, precision: str) -> list[Op]:
    """float32 weights to the compute dtype, and their gradients back. The head's gradient is float32 already."""
    e = ITEMSIZE[precision]
    if e == 4:
        return []
    blocks, head = cast_elements(config), config.padded_vocab_size * config.n_embd
    return [
        Op("weight casts", "casts", "forward", 1, 0, (4 + e) * blocks),
        Op("head weight cast", "casts", "forward", 1, 0, (4 + e) * head),
        Op("gradient casts", "casts", "backward", 1, 0, (4 + e) * blocks),
    ]


def _update(config: GPT2Config, precision: str, micro_batches: int, world_size: int) -> list[Op]:
    """What touches every parameter once: sums over micro-batches, DDP's buckets, the norm, AdamW."""
    P = num_parameters(config)
    return [
        Op("gradient accumulation", "accumulation", "backward", micro_batches - 1, 0, 12 * P * (micro_batches - 1)),
        Op("copy into buckets", "buckets", "backward", 1 if world_size > 1 else 0, 0, 8 * P),
        Op("unscaling of the gradient", "clip", "optimizer", int(precision == "fp16"), 0, 8 * P),
        Op("norm of the gradient", "clip", "optimizer", 1, 0, 4 * P),
        Op("scaling of the gradient", "clip", "optimizer", 1, 0, 8 * P),
        Op("AdamW", "AdamW", "optimizer", 1, 0, 28 * P),  # reads p, g, m, v; writes p, m, v
    ]
