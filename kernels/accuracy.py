"""Accuracy of the Triton ops on this device, forward and backward, against their definitions.

An output or gradient may be off by twice the error of PyTorch's op in the same dtype, and by FLOORS
in any case. Errors are ||got - exact|| / ||exact||, exact in float64.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.cases import TENSORS, Sizes, inputs_of, outputs_of, relative_error, values, with_gradients
from kernels.dispatch import implementation

# Errors that are fine even where PyTorch's own is smaller: 2^-8 and 2^-10 for bf16 and fp16.
FLOORS = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
TF32_FLOOR = 2e-3  # 2^-9
WITH_PARAMETERS = {"layer_norm": 2, "add_layer_norm": 2, "bias_gelu": 1}  # number of last inputs that are parameters


def floor(dtype: torch.dtype) -> float:
    """The error that is always allowed. float32 products are TF32's if PyTorch's precision allows it."""
    is_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return TF32_FLOOR if is_tf32 else FLOORS[dtype]


def inputs_as_in_the_model(
    op: str, sizes: Sizes, dtype: torch.dtype, parameter_dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Random inputs of an op: activations in `dtype`, parameters in theirs, every eighth target ignored."""
    inputs = inputs_of(op, sizes, torch.float32, device)
    places = range(len(inputs) - WITH_PARAMETERS.get(op, 0), len(inputs))
    if op == "linear_cross_entropy":
        places = (1,)
        inputs[2][::8] = -100
    for place, tensor in enumerate(inputs):
        if tensor.is_floating_point():
            inputs[place] = tensor.to(parameter_dtype if place in places else dtype)
    return with_gradients(inputs)


def errors(op: str, inputs: Sequence[Tensor], sizes: Sizes) -> dict[str, tuple[float, float]]:
    """{output or gradient: (our relative error, PyTorch's)} of the Triton op.

    Raises ArithmeticError, naming the tensor, if ours is too large or if two runs differ in a bit.
    """
    options = {"vocab_size": sizes.V} if op == "linear_cross_entropy" else {}
    ours, theirs, reference = (
        functools.partial(implementation(op, name), **options) for name in ("triton", "torch", "reference")
    )
    with torch.no_grad():
        outputs = outputs_of(theirs, inputs)
    douts = [torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outputs]
    wide = with_gradients([t.double() if t.is_floating_point() else t for t in inputs])
    exact = values(reference, wide, [dout.double() for dout in douts])
    runs = [poisoned(lambda: values(ours, inputs, douts)) for _ in range(2)]
    if not all(map(torch.equal, *runs)):
        raise ArithmeticError("two runs must give the same bits, they do not")
    return judged(TENSORS[op].split(), runs[0], values(theirs, inputs, douts), exact, floor(inputs[0].dtype))


def poisoned(run: Callable) -> list[Tensor]:
    """run() with fresh memory filled with NaN, so that an element that is not written shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def judged(
    names: Sequence[str], ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], floor: float
) -> dict[str, tuple[float, float]]:
    """Relative errors, ours and PyTorch's, by name. Raises ArithmeticError if ours is above floor and twice theirs."""
    found = {}
    for name, one, other, truth in zip(names, ours, theirs, exact, strict=True):
        found[name] = relative_error(one, truth), relative_error(other, truth)
        allowed = max(floor, 2.0 * found[name][1])
        if not found[name][0] <= allowed:
            raise ArithmeticError(f"{name} is off by {found[name][0]:.1e}, at most {allowed:.1e} is allowed")
    return found


def failure(
    op: str, sizes: Sizes, dtype: torch.dtype, parameter_dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the Triton op is not to be used on this device in this dtype, or None. Sets PyTorch's random state."""
    torch.manual_seed(0)
    try:
        errors(op, inputs_as_in_the_model(op, sizes, dtype, parameter_dtype, device), sizes)
    except ArithmeticError as error:
        return f"its self-check failed: {error}"
    except Exception as error:  # does not compile, does not fit, cannot be launched: the types vary
        lines = str(error).strip().splitlines() or ["no message"]
        return f"does not run here: {type(error).__name__}: {lines[0]}"[:200]
    return None
