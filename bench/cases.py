"""The one op list: definition, implementations and check. The work of each is kernels/work.py's."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench.measure import Prepare
from kernels.alternatives import attention_sdpa, linear_cross_entropy_unchunked
from kernels.cases import TENSORS, Sizes, gradients, inputs_of, outputs_of, relative_error, values, with_gradients
from kernels.dispatch import MODULES, implementation
from kernels.work import work

NAMES = (*MODULES, "attention_documents")
TRAINING = ("forward", "backward", "both")
# ||out - exact|| / ||exact|| up to which an implementation may be timed; twice that where "exact" is in its own dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SDPA = {"sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION", "sdpa efficient": "EFFICIENT_ATTENTION"}


@dataclass(frozen=True)
class Op:
    """One op at given sizes. Every implementation takes the tensors of `inputs` and gives the same outputs."""

    name: str
    sizes: Sizes
    inputs: Callable[[torch.dtype, torch.device], list[Tensor]]
    reference: Callable
    peers: dict[str, Callable]  # ours on Triton and on PyTorch's ops, then what else one would write
    tensors: tuple[str, ...]  # names of the outputs, then of the gradients
    phases: tuple[str, ...] = TRAINING

    def amount(self, phase: str, itemsize: int) -> tuple[int, str]:
        """The work of a phase that its rate counts, and the rate's unit: FLOPs if there are any, else bytes."""
        flops, num_bytes = work(self.name, self.sizes, itemsize)[phase.removesuffix("_no_grad")]
        return (flops, "FLOP/s") if flops else (num_bytes, "B/s")

    def fresh(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """New random inputs, and incoming gradients: standard normal, and 1 for a loss."""
        inputs = with_gradients(self.inputs(dtype, device))
        with torch.no_grad():
            outputs = outputs_of(self.peers["torch"], inputs)
        return inputs, [torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outputs]

    def exact(self, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
        """Outputs and gradients by the definition: in float64 where the logits of so many rows fit into 4 GiB."""
        if self.sizes.N * self.sizes.Vp <= 2**29:
            inputs = with_gradients([t.double() if t.is_floating_point() else t for t in inputs])
            douts = [t.double() for t in douts]
        return values(self.reference, inputs, douts)

    def check(self, got: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> float:
        """The largest relative error. Raises ArithmeticError, naming the tensor, if one is above the tolerance."""
        largest, allowed = 0.0, TOLERANCE[dtype] * (1 if exact[-1].dtype == torch.float64 else 2)
        for name, one, truth in zip(self.tensors, got, exact, strict=False):  # a forward has no gradients
            error = relative_error(one, truth)
            if not error <= allowed:
                raise ArithmeticError(f"the error of {name} must be at most {allowed:.0e}, got {error:.1e}")
            largest = max(largest, error)
        return largest


def _op(name: str, sizes: Sizes, on_gpu: bool, compiler: str) -> Op:
    options, plain, others = {}, implementation(name, "torch"), {}
    if name == "linear_cross_entropy":
        options = {"vocab_size": sizes.V}
        plain = functools.partial(linear_cross_entropy_unchunked, **options)
        others = {"plain": plain}
    if name == "attention":  # a CPU lacks some of the backends: each may fall back to the plain one there
        fallback = () if on_gpu else (SDPBackend.MATH,)
        backends = {name: (SDPBackend.__members__[backend], *fallback) for name, backend in SDPA.items()}
        others = {name: functools.partial(attention_sdpa, backends=tried) for name, tried in backends.items()}
    ours = {way: functools.partial(implementation(name, way), **options) for way in ("triton", "torch")}
    compiled = torch.compile(plain, dynamic=False, backend=compiler)
    reference = functools.partial(implementation(name, "reference"), **options)
    inputs = functools.partial(inputs_of, name, sizes)
    # Ours works out the head's gradients in its forward pass.
    phases = ("forward_no_grad", "both") if name == "linear_cross_entropy" else TRAINING
    peers, tensors = {**ours, "compile": compiled, **others}, tuple(TENSORS[name].split())
    return Op(name, sizes, inputs, reference, peers, tensors, phases)


def ops(sizes: Sizes, on_gpu: bool, compiler: str = "inductor") -> dict[str, Op]:
    """Every op at these sizes, by name. compiler: the backend of torch.compile."""
    return {name: _op(name, sizes, on_gpu, compiler) for name in NAMES}


def phase_of(fn: Callable, inputs: list[Tensor], douts: list[Tensor], phase: str) -> Prepare:
    """Prepares one phase of an op: what it returns runs that phase alone."""

    def forward() -> None:
        with torch.set_grad_enabled(phase != "forward_no_grad"):
            outputs_of(fn, inputs)

    def prepare() -> Callable[[], object]:
        if phase == "backward":
            outputs = outputs_of(fn, inputs)
            return lambda: gradients(outputs, inputs, douts)
        return forward if phase.startswith("forward") else lambda: gradients(outputs_of(fn, inputs), inputs, douts)

    return prepare
