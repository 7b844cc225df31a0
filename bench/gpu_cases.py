"""What bench.gpu measures: sizes, inputs, the contestants of each op, and the work that no version can avoid.

FLOPs count a multiply and an add as two, and the causal half of attention once. Bytes count each input read once and
each output written once, those that the op's definition has and no others: a row's saved mean is the kernel's affair.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention_reference, attention_torch, attention_triton
from kernels.cross_entropy import (
    linear_cross_entropy_reference,
    linear_cross_entropy_torch,
    linear_cross_entropy_triton,
)
from kernels.gelu import (
    bias_gelu_reference,
    bias_gelu_torch,
    bias_gelu_triton,
    gelu_reference,
    gelu_torch,
    gelu_triton,
)
from kernels.layer_norm import (
    add_layer_norm_reference,
    add_layer_norm_torch,
    add_layer_norm_triton,
    layer_norm_reference,
    layer_norm_torch,
    layer_norm_triton,
)

TRAINING = ("forward", "backward", "both")


@dataclass(frozen=True)
class Sizes:
    """B sequences of T positions, H heads of width D, V words padded to Vp."""

    B: int
    T: int
    H: int
    D: int
    V: int
    Vp: int

    @property
    def N(self) -> int:  # noqa: N802
        """Rows."""
        return self.B * self.T

    @property
    def C(self) -> int:  # noqa: N802
        """Width of the residual stream."""
        return self.H * self.D

    @property
    def F(self) -> int:  # noqa: N802
        """Width inside the MLP."""
        return 4 * self.C


GPT2 = Sizes(B=64, T=1024, H=12, D=64, V=50257, Vp=50304)
MODERATE = Sizes(B=2, T=1024, H=12, D=64, V=50257, Vp=50304)  # a float64 reference takes milliseconds
DRY = Sizes(B=2, T=5, H=1, D=16, V=61, Vp=64)


def attention_flops(sizes: Sizes) -> dict[str, float]:
    """Two matrix products of T x T x D per head, of which causality needs half; backward has five for their two."""
    forward = 2 * 2 * sizes.B * sizes.H * sizes.T * sizes.T * sizes.D / 2
    return {"forward": forward, "backward": 2.5 * forward}


def linear_cross_entropy_flops(sizes: Sizes) -> dict[str, float]:
    """One matrix product of N x C x Vp for the logits, two for the gradients of both factors."""
    forward = 2.0 * sizes.N * sizes.C * sizes.Vp
    return {"forward": forward, "backward": 2.0 * forward}


def layer_norm_bytes(sizes: Sizes, itemsize: int) -> dict[str, float]:
    """x, weight, bias -> y; dy, x, weight -> dx, dweight, dbias."""
    rows = sizes.N * sizes.C
    return {"forward": itemsize * (2 * rows + 2 * sizes.C), "backward": itemsize * (3 * rows + 3 * sizes.C)}


def add_layer_norm_bytes(sizes: Sizes, itemsize: int) -> dict[str, float]:
    """x, residual, weight, bias -> y, summed; dy, dsummed, summed, weight -> dx (dresidual is it), dweight, dbias."""
    rows = sizes.N * sizes.C
    return {"forward": itemsize * (4 * rows + 2 * sizes.C), "backward": itemsize * (4 * rows + 3 * sizes.C)}


def gelu_bytes(sizes: Sizes, itemsize: int) -> dict[str, float]:
    """x -> y; dy, x -> dx."""
    rows = sizes.N * sizes.F
    return {"forward": itemsize * 2 * rows, "backward": itemsize * 3 * rows}


def bias_gelu_bytes(sizes: Sizes, itemsize: int) -> dict[str, float]:
    """x, bias -> y; dy, x, bias -> dx, dbias."""
    rows = sizes.N * sizes.F
    return {"forward": itemsize * (2 * rows + sizes.F), "backward": itemsize * (3 * rows + 2 * sizes.F)}


def amount(work: dict[str, float], phase: str) -> float:
    """FLOPs or bytes of a phase."""
    if phase == "both":
        return work["forward"] + work["backward"]
    return work["backward" if phase == "backward" else "forward"]


@dataclass(frozen=True)
class Op:
    """One op at given sizes. All functions take the tensors of `inputs` and give the same outputs."""

    inputs: Callable[[torch.dtype, torch.device], list[Tensor]]
    reference: Callable
    pytorch: Callable  # what one writes without this project; also what torch.compile is given
    triton: Callable | None
    tensors: str  # names of the outputs, then of the gradients
    work: Callable[[int], dict[str, float]]  # bytes of an element -> FLOPs or bytes, forward and backward
    unit: str  # TFLOP/s or GB/s
    rivals: dict[str, Callable] = field(default_factory=dict)  # by name, beside eager and compiled PyTorch
    phases: tuple[str, ...] = TRAINING

    def contestants(self, compiler: str) -> dict[str, Callable]:
        """By name: ours, PyTorch eager and compiled by this backend of torch.compile, and the rivals."""
        if self.triton is None:
            return {"eager": self.pytorch, **self.rivals}
        compiled = torch.compile(self.pytorch, dynamic=False, backend=compiler)
        return {"triton": self.triton, "eager": self.pytorch, "compile": compiled, **self.rivals}


def sdpa_separate(q: Tensor, k: Tensor, v: Tensor, *, backends: Sequence[SDPBackend]) -> Tensor:
    """PyTorch's attention by one of these backends: q, k, v and the result (B, H, T, D)."""
    with sdpa_kernel(list(backends)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_packed(qkv: Tensor, *, backends: Sequence[SDPBackend]) -> Tensor:
    """The same on views of qkv (B, T, 3, H, D), whose gradient autograd assembles in one copy: (B, T, H, D)."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return sdpa_separate(q, k, v, backends=backends).transpose(1, 2).contiguous()


def separate_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, for q, k, v (B, H, T, D)."""
    return attention_reference(torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)).transpose(1, 2)


def plain_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """What one writes: a matrix product, then the cross-entropy of its float32 logits."""
    logits = (hidden @ weight.T)[:, :vocab_size]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def sdpa_backends(on_gpu: bool) -> dict[str, tuple[SDPBackend, ...]]:
    """SDPA's backends by name. On a CPU, which lacks some, each may fall back to the plain one."""
    fallback = () if on_gpu else (SDPBackend.MATH,)
    return {
        "sdpa flash": (SDPBackend.FLASH_ATTENTION, *fallback),
        "sdpa cudnn": (SDPBackend.CUDNN_ATTENTION, *fallback),
        "sdpa efficient": (SDPBackend.EFFICIENT_ATTENTION, *fallback),
    }


def ops(sizes: Sizes, on_gpu: bool) -> dict[str, Op]:
    """Every op at these sizes, by name."""
    B, T, H, D, N, C, F_ = sizes.B, sizes.T, sizes.H, sizes.D, sizes.N, sizes.C, sizes.F

    def randn(*shape: int, dtype: torch.dtype, device: torch.device, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(std).add_(mean).to(dtype)

    def parameters(width: int, **kind) -> list[Tensor]:
        return [randn(width, mean=1.0, std=0.1, **kind), randn(width, std=0.1, **kind)]  # weight, bias

    def head(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        weight = randn(sizes.Vp, C, std=C**-0.5, dtype=dtype, device=device)  # logits of variance 1
        return [
            randn(N, C, dtype=dtype, device=device),
            weight,
            torch.randint(sizes.V, (N,), device=device),
        ]

    def layer_norm_inputs(count: int) -> Callable:
        return lambda dtype, device: [
            *(randn(B, T, C, dtype=dtype, device=device) for _ in range(count)),
            *parameters(C, dtype=dtype, device=device),
        ]

    backends = sdpa_backends(on_gpu)
    return {
        "attention": Op(
            inputs=lambda dtype, device: [randn(B, T, 3, H, D, dtype=dtype, device=device)],
            reference=attention_reference,
            pytorch=attention_torch,
            triton=attention_triton,
            tensors="out dqkv",
            work=lambda itemsize: attention_flops(sizes),
            unit="TFLOP/s",
            rivals={name: functools.partial(sdpa_packed, backends=some) for name, some in backends.items()},
        ),
        "separate q, k, v": Op(
            inputs=lambda dtype, device: [randn(B, H, T, D, dtype=dtype, device=device) for _ in range(3)],
            reference=separate_reference,
            pytorch=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            triton=None,
            tensors="out dq dk dv",
            work=lambda itemsize: attention_flops(sizes),
            unit="TFLOP/s",
            rivals={name: functools.partial(sdpa_separate, backends=some) for name, some in backends.items()},
        ),
        "layer_norm": Op(
            inputs=layer_norm_inputs(1),
            reference=layer_norm_reference,
            pytorch=layer_norm_torch,
            triton=layer_norm_triton,
            tensors="y dx dweight dbias",
            work=functools.partial(layer_norm_bytes, sizes),
            unit="GB/s",
        ),
        "add_layer_norm": Op(
            inputs=layer_norm_inputs(2),
            reference=add_layer_norm_reference,
            pytorch=add_layer_norm_torch,
            triton=add_layer_norm_triton,
            tensors="y summed dx dresidual dweight dbias",
            work=functools.partial(add_layer_norm_bytes, sizes),
            unit="GB/s",
        ),
        "gelu": Op(
            inputs=lambda dtype, device: [randn(B, T, F_, dtype=dtype, device=device)],
            reference=gelu_reference,
            pytorch=gelu_torch,
            triton=gelu_triton,
            tensors="y dx",
            work=functools.partial(gelu_bytes, sizes),
            unit="GB/s",
        ),
        "bias_gelu": Op(
            inputs=lambda dtype, device: [
                randn(B, T, F_, dtype=dtype, device=device),
                randn(F_, std=0.1, dtype=dtype, device=device),
            ],
            reference=bias_gelu_reference,
            pytorch=bias_gelu_torch,
            triton=bias_gelu_triton,
            tensors="y dx dbias",
            work=functools.partial(bias_gelu_bytes, sizes),
            unit="GB/s",
        ),
        "linear_cross_entropy": Op(
            inputs=head,
            reference=functools.partial(linear_cross_entropy_reference, vocab_size=sizes.V),
            pytorch=lambda *tensors: plain_linear_cross_entropy(*tensors, sizes.V),
            triton=functools.partial(linear_cross_entropy_triton, vocab_size=sizes.V),
            tensors="loss dhidden dweight",
            work=lambda itemsize: linear_cross_entropy_flops(sizes),
            unit="TFLOP/s",
            rivals={"chunked torch": functools.partial(linear_cross_entropy_torch, vocab_size=sizes.V)},
            phases=("forward_no_grad", "both"),  # ours works out its gradients in the forward pass
        ),
    }
