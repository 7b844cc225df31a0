"""Cases of the emulator: each runs an op forward and backward, and compares it as tolerances.py says.

A case is a name and a function that returns a Comparison. Inputs are drawn with fixed seeds.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from tolerances import randn, values_and_gradients, widened
from torch import Tensor

from kernels import attention, cross_entropy, gelu, layer_norm, tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
DOCUMENTS = (63, 2, 1, 61, 130, 43)  # of 300 tokens: begins at 63, 65, 66, 127 and 257, around blocks of 64 and 128


class Comparison(NamedTuple):
    """Arguments of tolerances.assert_accurate."""

    got: Sequence[Tensor]
    pytorch: Sequence[Tensor]
    exact: Sequence[Tensor]
    dtype: torch.dtype
    names: str


def compare(ops: Sequence[Callable], inputs: Sequence[Tensor], douts: Sequence[Tensor], names: str) -> Comparison:
    """Compares ops: on Triton, on PyTorch, and the definition, which computes in float64."""
    ours, theirs, definition = ops
    exact = values_and_gradients(definition, widened(inputs), widened(douts))
    runs = (values_and_gradients(op, inputs, douts) for op in (ours, theirs))
    return Comparison(*runs, exact, inputs[0].dtype, names)


def attention_case(
    B: int,
    T: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    is_causal: bool = True,
    scale: float = 1.0,
    strided: bool = False,
    lengths: Sequence[int] | None = None,
) -> Comparison:
    """Attention. `scale` multiplies the inputs; if strided, qkv is a view into a tensor of NaN.

    lengths: of the documents in each sequence.
    """
    qkv, dout = (scale * randn(B, T, 3, H, D, seed=0)).to(dtype), randn(B, T, H, D, seed=1, dtype=dtype)
    if strided:
        around = torch.full((B, T + 3, 3, H + 1, D + 8), math.nan, dtype=dtype)
        qkv = around[:, 2 : 2 + T, :, :H, :D].copy_(qkv)
    ops = (attention.attention_triton, attention.attention_torch, attention.attention_reference)
    starts = None if lengths is None else document_starts(lengths).expand(B, T).contiguous()
    ops = [functools.partial(op, is_causal=is_causal, starts=starts) for op in ops]
    return compare(ops, [qkv], [dout], "out dqkv")


def document_starts(lengths: Sequence[int]) -> Tensor:
    """The row where the document of each row begins, (T,) int32."""
    begins = torch.tensor([0, *lengths[:-1]]).cumsum(0).int()
    return begins.repeat_interleave(torch.tensor(lengths))


def variant_case(T: int, D: int, lengths: Sequence[int] | None = None, **options: int) -> Comparison:
    """Attention whose kernels have these of kernels.tiles.VARIANTS on, those of them that each has."""
    table = tiles.lookup

    def lookup(name: str, arch: str, size: int) -> dict[str, int]:
        known = tiles.VARIANTS.get(name, {})
        return table(name, arch, size) | {option: value for option, value in options.items() if option in known}

    with mock.patch.object(tiles, "lookup", lookup):
        tiles.use({})
        try:
            return attention_case(1, T, 2, D, BF16, lengths=lengths)
        finally:
            tiles.use({})


def tf32_case(T: int, D: int) -> Comparison:
    """Attention with TF32 products: held to the bound of bf16, whose mantissa is shorter still."""
    torch.set_float32_matmul_precision("high")
    try:
        comparison = attention_case(1, T, 2, D, FP32)
    finally:
        torch.set_float32_matmul_precision("highest")
    return comparison._replace(dtype=BF16)


def philox(seed: int, counters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10. Source: Salmon et al. 2011, table 2 and figure 1."""
    c0, c1, c2, c3 = counters
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF

    def product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = constant * (x & 0xFFFF), constant * (x >> 16)  # so that no product exceeds 63 bits
        high += low >> 16
        return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF

    for _ in range(10):
        (high0, low0), (high2, low2) = product(0xD2511F53, c0), product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_mask(seed: int, B: int, T: int, H: int, p: float) -> Tensor:
    """The weights that the kernels keep, (B, H, T, T)."""
    head, row, four = torch.meshgrid(torch.arange(B * H), torch.arange(T), torch.arange(-(-T // 4)), indexing="ij")
    a, b, c, d = philox(seed, (four, row, head, torch.zeros_like(head)))
    words = torch.stack((a, c, b, d), dim=-1).flatten(-2)[..., :T]  # a call draws for four columns, in this order
    return (words >= int(p * 2**32)).view(B, H, T, T)


def dropout_case(T: int, D: int, dtype: torch.dtype, p: float, is_causal: bool = True) -> Comparison:
    """Attention with dropout, whose mask is computed here anew."""
    B, H, seed = 1, 2, 0x123456789ABCDEF
    qkv, dout = randn(B, T, 3, H, D, seed=0, dtype=dtype), randn(B, T, H, D, seed=1, dtype=dtype)
    kept = dropout_mask(seed, B, T, H, p)

    def ours(qkv: Tensor) -> Tensor:
        return torch.ops.gpt2.attention(qkv, torch.tensor([seed]), is_causal, p, D**-0.5)[0]

    def definition(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * D**-0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        return (scores.softmax(-1) * kept / (1 - p) @ v).to(qkv.dtype).transpose(1, 2).contiguous()

    return compare((ours, definition, definition), [qkv], [dout], "out dqkv")


def layer_norm_case(rows: int, C: int, dtype: torch.dtype, mean: float = 0.0, narrow: bool = False) -> Comparison:
    """LayerNorm. `narrow`: the parameters have x's dtype."""
    x = (randn(rows, C, seed=0) + mean).to(dtype)
    weight, bias = (randn(C, seed=seed, dtype=dtype if narrow else FP32) for seed in (1, 2))
    ops = (layer_norm.layer_norm_triton, layer_norm.layer_norm_torch, layer_norm.layer_norm_reference)
    return compare(ops, [x, weight, bias], [randn(rows, C, seed=3, dtype=dtype)], "y dx dweight dbias")


def add_layer_norm_case(rows: int, C: int, dtype: torch.dtype) -> Comparison:
    """Residual add and LayerNorm. The definition normalises the sum as it was rounded, as the kernels do."""
    x, residual = (randn(rows, C, seed=seed, dtype=dtype) for seed in (0, 1))
    weight, bias = (randn(C, seed=seed) for seed in (2, 3))
    rounded = (x + residual).double()

    def definition(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        exact = x + residual
        summed = exact + (rounded - exact).detach()
        return layer_norm.layer_norm_reference(summed, weight, bias), summed

    ops = (layer_norm.add_layer_norm_triton, layer_norm.add_layer_norm_torch, definition)
    douts = [randn(rows, C, seed=seed, dtype=dtype) for seed in (4, 5)]
    return compare(ops, [x, residual, weight, bias], douts, "y summed dx dresidual dweight dbias")


def gelu_case(rows: int, C: int, dtype: torch.dtype, bias: bool = False, scale: float = 3.0) -> Comparison:
    """GELU or, with a bias, bias_gelu."""
    x, dy = (scale * randn(rows, C, seed=0)).to(dtype), randn(rows, C, seed=1, dtype=dtype)
    if not bias:
        return compare((gelu.gelu_triton, gelu.gelu_torch, gelu.gelu_reference), [x], [dy], "y dx")
    ops = (gelu.bias_gelu_triton, gelu.bias_gelu_torch, gelu.bias_gelu_reference)
    return compare(ops, [x, randn(C, seed=2)], [dy], "y dx dbias")


def cross_entropy_case(N: int, V: int, Vp: int, dtype: torch.dtype, grad: bool = True) -> Comparison:
    """Head and cross-entropy of N tokens, one in three ignored; gradients are of N * loss."""
    C = 32
    hidden, weight = randn(N, C, seed=0, dtype=dtype), (randn(Vp, C, seed=1) / math.sqrt(C)).to(dtype)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    targets[0] = V - 1
    targets[1::3] = -100

    def theirs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight)[:, :V].float(), targets)

    ours, definition = (
        functools.partial(op, vocab_size=V)
        for op in (cross_entropy.linear_cross_entropy_triton, cross_entropy.linear_cross_entropy_reference)
    )
    tensors = [hidden, weight, targets]
    if grad:
        return compare((ours, theirs, definition), tensors, [torch.tensor(float(N))], "loss dhidden dweight")
    with torch.no_grad():
        return Comparison([ours(*tensors)], [theirs(*tensors)], [definition(*widened(tensors))], dtype, "loss")


def _named() -> dict[str, Callable[[], Comparison]]:
    cases: dict[str, Callable[[], Comparison]] = {}

    def add(name: str, function: Callable, *sizes, **options) -> None:
        cases[name] = functools.partial(function, *sizes, **options)

    for kind, dtype in DTYPES.items():
        for T in (1, 20, 100, 129, 256, 300):
            add(f"attention T={T} D=64 {kind}", attention_case, 2 if T == 129 else 1, T, 2, 64, dtype)
        for T in (20, 257):
            add(f"attention T={T} D=64 {kind} full", attention_case, 1, T, 2, 64, dtype, is_causal=False)
        for D in (16, 32, 50, 80, 96, 128, 256):
            add(f"attention T=100 D={D} {kind}", attention_case, 1, 100, 2, D, dtype)
        if dtype != FP32:  # whose bound is that of scores near 1; PyTorch's own error is above it too
            add(f"attention T=130 D=64 {kind} large", attention_case, 1, 130, 2, 64, dtype, scale=8.0)
        add(f"attention T=100 D=64 {kind} strided", attention_case, 1, 100, 2, 64, dtype, strided=True)
        add(f"attention T=100 D=64 {kind} dropout", dropout_case, 100, 64, dtype, 0.2)
        add(f"attention T=300 D=64 {kind} documents", attention_case, 1, 300, 2, 64, dtype, lengths=DOCUMENTS)
        add(f"attention T=300 D=64 {kind} one document", attention_case, 1, 300, 2, 64, dtype, lengths=[300])
        add(f"attention T=70 D=64 {kind} tokens alone", attention_case, 1, 70, 2, 64, dtype, lengths=[1] * 70)
        add(f"attention T=70 D=64 {kind} full dropout", dropout_case, 70, 64, dtype, 0.5, is_causal=False)
        for rows, C in ((4, 1), (9, 33), (3, 100), (6, 768), (5, 1600), (3, 5000), (5, 12288)):
            add(f"layer_norm {rows}x{C} {kind}", layer_norm_case, rows, C, dtype)
            add(f"add_layer_norm {rows}x{C} {kind}", add_layer_norm_case, rows, C, dtype)
        add(f"layer_norm 4x768 {kind} mean 100", layer_norm_case, 4, 768, dtype, mean=100.0)
        add(f"layer_norm 4x768 {kind} narrow", layer_norm_case, 4, 768, dtype, narrow=True)
        for rows, C in ((1, 1), (5, 77), (7, 3072)):
            add(f"gelu {rows}x{C} {kind}", gelu_case, rows, C, dtype)
            add(f"bias_gelu {rows}x{C} {kind}", gelu_case, rows, C, dtype, bias=True)
        add(f"gelu 2x300 {kind} large", gelu_case, 2, 300, dtype, scale=100.0)
        for N, V, Vp in ((6, 11, 11), (6, 128, 128), (5, 1000, 1024), (4, 8192, 8192), (4, 50257, 50304)):
            add(f"cross_entropy {N}x{V} {kind}", cross_entropy_case, N, V, Vp, dtype)
        add(f"cross_entropy 2x50257 {kind} no grad", cross_entropy_case, 2, 50257, 50304, dtype, grad=False)
    for name, options in {
        "polynomial": {"EXP2_POLYNOMIAL": 1},
        "polynomial, maxnreg": {"EXP2_POLYNOMIAL": 1, "maxnreg": 128},
        "paired": {"PAIR_BLOCKS": 1},
        "one launch": {"ONE_LAUNCH": 1},
    }.items():
        add(f"attention T=300 D=64 bf16 {name}", variant_case, 300, 64, **options)
        add(f"attention T=300 D=64 bf16 documents {name}", variant_case, 300, 64, DOCUMENTS, **options)
    for D in (64, 80, 128):
        add(f"attention T=100 D={D} tf32", tf32_case, 100, D)
    return cases


CASES = _named()
