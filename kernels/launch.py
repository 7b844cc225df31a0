"""Code shared by all ops: checks of arguments, and registration of kernels as PyTorch operators."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read when a kernel is decorated
except ImportError:  # Triton is for Linux; elsewhere the kernels stay plain functions, never called
    triton = tl = SimpleNamespace(jit=lambda kernel: kernel, constexpr=object)
    INTERPRETED = False

HAS_TRITON = hasattr(triton, "compile")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_FLOATING = FLOATING[:3]


def require(holds: bool, what: str, got: object) -> None:
    """Raises ValueError "<what>, got <got>" unless `holds`."""
    if not holds:
        raise ValueError(f"{what}, got {got}")


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all tensors are floating-point and on one device."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        require(tensor.device == device, f"{op}: all inputs must be on one device, {name} on {device}", tensor.device)
        require(tensor.dtype in FLOATING, f"{op}: {name} must be float32, bfloat16, float16 or float64", tensor.dtype)


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` has exactly this shape."""
    require(tuple(tensor.shape) == shape, f"{op}: {name} must be {shape}", tuple(tensor.shape))


def check_triton(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless a Triton kernel can read these tensors here."""
    for name, tensor in tensors.items():
        device, dtype = tensor.device.type, tensor.dtype
        require(HAS_TRITON, f"{op}: Triton must be installed (it comes for Linux)", "none")
        require(
            device == "cuda" or (INTERPRETED and device == "cpu"),
            f"{op}: {name} must be on a CUDA device, or on the CPU under TRITON_INTERPRET=1",
            tensor.device,
        )
        require(dtype in TRITON_FLOATING, f"{op}: {name} must be float32, bfloat16 or float16 for Triton", dtype)
        require(
            not INTERPRETED or dtype != torch.bfloat16,
            f"{op}: {name} must be float32 or float16 under TRITON_INTERPRET=1, which computes bfloat16 wrongly",
            dtype,
        )


def register(
    name: str,
    allocate: Callable,
    fill: Callable,
    *,
    save: Callable | None = None,
    differentiate: Callable | None = None,
) -> Callable:
    """Registers the operator torch.ops.gpt2.<name>, opaque to torch.compile, and returns it.

    allocate(*inputs) returns empty outputs. It is also the fake implementation, so shapes, dtypes
    and strides are stated once. Its annotations give the schema. fill(outputs, *inputs) launches
    the kernels that write the outputs, with the first input's device as the current one. save(ctx,
    inputs, output) and differentiate(ctx, *gradients) are autograd's setup_context and backward.
    The gradient of an output that is not used is None.
    """

    def run(*inputs):
        outputs = allocate(*inputs)
        with torch.cuda.device_of(inputs[0]):
            fill(outputs, *inputs)
        return outputs

    schema = torch.library.infer_schema(allocate, mutates_args=())
    op = torch.library.custom_op(f"gpt2::{name}", run, mutates_args=(), schema=schema)

    def fake(*inputs):
        _shorten_operator_strings()
        return allocate(*inputs)

    op.register_fake(fake)
    if differentiate is not None:

        def setup(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        op.register_autograd(differentiate, setup_context=setup)
    return op


@functools.cache
def _shorten_operator_strings() -> None:
    """Makes Inductor of torch 2.10 to 2.12 name only an operator in a string that it builds for it.

    There the string spells out all arguments, for an opaque operator the whole graph before it. It
    grows 4.7-fold per layer, so GPT-2's 12 layers never compile. torch 2.13 builds it when asked.
    Called while a graph is traced, which is before Inductor runs.
    """
    if torch.__version__ < (2, 13):
        from torch._inductor.exc import OperatorIssue

        OperatorIssue.operator_str = staticmethod(lambda target, args, kwargs: f"  target: {target}")


def num_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Number of programs when each loops over many rows: enough to fill a GPU; 4 on a CPU."""
    if device.type != "cuda":
        return 4
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count
