"""Measured times for bench.roofline: of the kernels' ops and the linear layers alone, or those that bench.gpu took.

Each call finds the caches full of other data, as in a step whose tensors do not fit them. Ops run as the engine runs
them without a compiler: Triton's where it can run. What moves parameters alone (casts, norm, AdamW) is not timed.
"""

from collections.abc import Iterator, Sequence

import torch

from bench import cases, steps
from bench.measure import Prepare, Stopwatch, in_turns
from bench.results import Figure, Row, scaled, spread
from bench.roofline_ops import HEAD, Op, StepShape, linear_layers
from engine.device import apply_precision, tune_malloc
from kernels.dispatch import select

Measured = dict[tuple[str, str], Figure]  # seconds by (op's name, phase); (HEAD, "") is the whole head
SAME_OP = {"add_layer_norm, ln_f": "add_layer_norm"}  # its backward has one input less
ROUNDS = 7  # of which the first is warm-up


def measure(shape: StepShape, device: torch.device) -> tuple[Measured, Figure]:
    """Seconds of one call of each op, and of one whole eager step of engine.step."""
    if device.type == "cpu":
        tune_malloc()  # as the engine does
    torch.manual_seed(0)
    cold, warm = Stopwatch(device), Stopwatch(device, is_cold=False)
    samplers = {key: lambda prepare=prepare: cold(prepare, 1) for key, prepare in _prepared(shape, device)}
    setup = steps.Setup(precision=shape.precision, recompute=shape.recompute)
    step = steps.build(setup, shape.config, steps.initial_weights(shape.config), device)
    batch = tuple(torch.randint(shape.config.vocab_size, (shape.B, shape.T), device=device) for _ in range(2))
    samplers["step", ""] = lambda: warm(lambda: lambda: step([batch] * shape.micro_batches), 1)
    found = in_turns(samplers, lambda done: done < ROUNDS)
    figures = {key: spread(taken[1:], "s") for key, taken in found.items()}
    return figures, figures.pop(("step", ""))


def _prepared(shape: StepShape, device: torch.device) -> Iterator[tuple[tuple[str, str], Prepare]]:
    """((name, phase), what prepares a call that does the op once)."""
    dtype = apply_precision(shape.precision)
    sizes = cases.Sizes.of(shape.config, shape.B, shape.T)
    way = select("auto", device, dtype, sizes.D).choices[0].implementation
    for name, op in cases.ops(sizes, device.type == "cuda").items():
        inputs, douts = op.fresh(dtype, device)
        if name == "linear_cross_entropy":
            yield (HEAD, ""), cases.phase_of(op.peers[way], inputs, douts, "both")
        elif name != "gelu":  # the model has it with the bias
            yield (name, "forward"), cases.phase_of(op.peers[way], inputs, douts, "forward_no_grad")
            yield (name, "backward"), cases.phase_of(op.peers[way], inputs, douts, "backward")
    for name, (K, M, has_bias) in linear_layers(shape.config).items():
        x, weight, dy = (torch.randn(*s, device=device).to(dtype) for s in ((sizes.N, K), (M, K), (sizes.N, M)))
        bias = weight.new_zeros(M) if has_bias else None
        yield (name, "forward"), lambda x=x, w=weight, b=bias: lambda: torch.nn.functional.linear(x, w, b)
        yield (f"{name} dinput", "backward"), lambda dy=dy, w=weight: lambda: dy @ w
        yield (f"{name} dweight", "backward"), lambda dy=dy, x=x: lambda: dy.T @ x


def per_step(ops: Sequence[Op], per_call: Measured) -> Measured:
    """Seconds of a step from those of one call; the whole head is one call per micro-batch."""
    found = {}
    for op in ops:
        key = (op.name.removesuffix(" again"), "forward" if op.name.endswith(" again") else op.phase)
        key = (SAME_OP[key[0]], key[1]) if key[0] in SAME_OP and op.phase == "forward" else key
        if key in per_call:
            found[op.name, op.phase] = scaled(per_call[key], op.calls, "s")
        if op.name == "head scaling" and (HEAD, "") in per_call:  # once per micro-batch
            found[HEAD, ""] = scaled(per_call[HEAD, ""], op.calls, "s")
    return found


def from_gpu_rows(rows: Sequence[Row]) -> Measured:
    """Seconds of one call of each op that bench.gpu timed, as this project's kernels run it."""
    found: Measured = {}
    for row in (row for row in rows if row.section == "ops" and row.peer == "triton"):
        for phase, figure in row.figures.items():
            if row.case == "linear_cross_entropy" and phase == "both":
                found[HEAD, ""] = figure
            elif row.case != "linear_cross_entropy" and phase in ("forward", "backward"):
                found[row.case, phase] = figure
    return found
