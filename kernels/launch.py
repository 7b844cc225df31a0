"""What every op shares: checks that turn a wrong call into a sentence, and the registration of a kernel as an op."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read when a kernel is decorated
except ImportError:  # Triton comes for Linux: elsewhere the kernels stay plain functions that nobody calls
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
    """Raises ValueError unless every tensor is floating and all are on one device."""
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
    """Registers torch.ops.gpt2.<name>, opaque to torch.compile, and returns it.

    allocate(*inputs) makes the outputs, empty; it is also what the compiler traces, so shapes, dtypes and strides are
    said once, and its annotations are the op's schema. fill(outputs, *inputs) launches the kernels that write them,
    with the first input's device current. save(ctx, inputs, output) and differentiate(ctx, *gradients) are the
    autograd formula; a gradient that nobody uses arrives as None.
    """

    def run(*inputs):
        outputs = allocate(*inputs)
        with torch.cuda.device_of(inputs[0]):
            fill(outputs, *inputs)
        return outputs

    schema = torch.library.infer_schema(allocate, mutates_args=())
    op = torch.library.custom_op(f"gpt2::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(allocate)
    if differentiate is not None:

        def setup(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        op.register_autograd(differentiate, setup_context=setup)
    return op


def num_programs(device: torch.device, per_multiprocessor: int) -> int:
    """How many programs keep a device busy when each loops over many rows; few where nothing runs in parallel."""
    if device.type != "cuda":
        return 4
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count
