"""Each of the six ops, forward and backward, by the `torch` backend and by Triton's, at the shapes of presets.

The throughput counts the work that no version can avoid (bench/gpu_cases.py). Outputs and gradients are first checked
against the op's definition in float64 on the same inputs. On a CPU there is only the `torch` backend, in fp32.
`pytest bench/bench_kernels.py`
"""

import functools
from collections.abc import Callable
from itertools import product

import pytest
import torch
from conftest import DEVICE, ON_GPU, QUICK, SEQUENCES, case, require_triton
from torch import Tensor

from bench import gpu_cases
from bench.gpu_timing import outputs_of, random_douts, relative_error, values, with_gradients
from kernels.dispatch import MODULES
from kernels.dispatch import select as select_ops
from model.presets import PRESETS

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32} if ON_GPU else {"fp32": torch.float32}
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}  # ||error|| / ||exact||
HOW = ("torch-eager", "torch-compiled", "triton")


def cases() -> list:
    """The second preset of a CPU is quick where nothing compiles."""
    quick = {QUICK: HOW, "mini": ("torch-eager",)}
    return [
        case(op, preset, precision, how, is_quick=how in quick.get(preset, ()))
        for op, preset, precision, how in product(MODULES, SEQUENCES, PRECISIONS, HOW)
    ]


def sizes(preset: str) -> gpu_cases.Sizes:
    """A micro-batch of a preset."""
    config = PRESETS[preset]
    return gpu_cases.Sizes(
        B=SEQUENCES[preset],
        T=config.n_positions,
        H=config.n_head,
        D=config.head_dim,
        V=config.vocab_size,
        Vp=config.padded_vocab_size,
    )


def implementation(op: str, at: gpu_cases.Sizes, dtype: torch.dtype, how: str) -> Callable:
    """The function that the model calls, compiled if asked."""
    backend, _, mode = how.partition("-")
    function = getattr(select_ops(backend, DEVICE, dtype, at.D), op)
    if op == "linear_cross_entropy":
        function = functools.partial(function, vocab_size=at.V)
    return torch.compile(function, dynamic=False) if mode == "compiled" else function


def require_close(got: list[Tensor], exact: list[Tensor], names: str, tolerance: float) -> None:
    """Raises AssertionError, naming the tensor, unless every one is as close as the tolerance says."""
    for name, one, truth in zip(names.split(), got, exact, strict=True):
        error = relative_error(one, truth)
        assert error <= tolerance, f"{name} must be within {tolerance} of its float64 definition, got {error:.2g}"


@pytest.mark.parametrize(("op", "preset", "precision", "how"), cases())
def test_kernel(op: str, preset: str, precision: str, how: str, measure):
    at, dtype = sizes(preset), PRECISIONS[precision]
    if how == "triton":
        require_triton(dtype, at.D)
    definition = gpu_cases.ops(at, ON_GPU)[op]
    function = implementation(op, at, dtype, how)
    torch.manual_seed(0)
    inputs = with_gradients(definition.inputs(dtype, DEVICE))
    with torch.no_grad():
        douts = random_douts(outputs_of(definition.pytorch, inputs))

    def check(got: list[Tensor]) -> None:
        wide = with_gradients([t.double() if t.is_floating_point() else t for t in inputs])
        exact = values(definition.reference, wide, [dout.double() for dout in douts])
        require_close(got, exact, definition.tensors, TOLERANCE[precision])

    measure.benchmark.group = op
    work = gpu_cases.amount(definition.work(dtype.itemsize), "both")
    unit = {"TFLOP/s": "flops", "GB/s": "bytes"}[definition.unit]
    measure(lambda: values(function, inputs, douts), check, device=DEVICE, **{unit: work})
