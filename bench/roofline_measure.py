"""Measured times for bench.roofline: of each op of a step alone, at its real shapes, or those that bench.gpu took.

Each call finds the caches full of other data, as in a step whose tensors do not fit them, so that its inputs come from
memory as its bound supposes. Ops run as the engine runs them without a compiler: Triton's where it can run.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import steps
from bench.cases import phase_of
from bench.measure import Prepare, Stopwatch, in_turns, within
from bench.results import Figure, Row, scaled, spread
from bench.roofline_ops import HEAD, Op, StepShape, linear_layers
from engine.device import apply_precision, tune_malloc
from kernels.dispatch import select
from model.gpt2 import GPT2

Key = tuple[str, str]  # an op's name and phase; (HEAD, "") is the whole head
Measured = dict[Key, Figure]  # seconds
SAME_OP = {"add_layer_norm, ln_f": "add_layer_norm"}  # its backward has one input less
ROUNDS = 7  # of which the first is warm-up


def measure_ops(shape: StepShape, device: torch.device) -> Measured:
    """Seconds of one call by (op's name, phase). The optimizer's and the casts' calls are those of the whole model."""
    if device.type == "cpu":
        tune_malloc()  # as the engine does
    torch.manual_seed(0)
    watch = Stopwatch(device)
    samplers = {key: lambda prepare=prepare: watch(prepare, calls=1) for key, prepare in prepared(shape, device)}
    return {key: spread(taken[1:], "s") for key, taken in in_turns(samplers, lambda done: done < ROUNDS).items()}


def prepared(shape: StepShape, device: torch.device) -> Iterator[tuple[Key, Prepare]]:
    """((name, phase), what prepares a call that does the op once)."""
    config, B, T = shape.config, shape.B, shape.T
    dtype = apply_precision(shape.precision)
    N, C, H = B * T, config.n_embd, config.n_head
    ops = select("auto", device, dtype, config.head_dim)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype).requires_grad_()

    def both(name: str, op: Callable, *inputs: Tensor) -> Iterator[tuple[Key, Prepare]]:
        leaves = [t for t in inputs if t.requires_grad]
        with torch.no_grad():
            outputs = op(*inputs)
        douts = [torch.randn_like(out) for out in ([outputs] if isinstance(outputs, Tensor) else outputs)]
        yield (name, "forward"), phase_of(op, leaves, douts, "forward_no_grad")
        yield (name, "backward"), phase_of(op, leaves, douts, "backward")

    model = GPT2(config).to(device)
    wte, wpe, ln = model.wte.weight, model.wpe.weight, model.ln_f
    tokens, targets = (torch.randint(config.vocab_size, (B, T), device=device) for _ in range(2))
    yield from both("embedding", lambda a, b: (F.embedding(tokens, a) + b[:T]).to(dtype), wte, wpe)
    x, residual = randn(B, T, C), randn(B, T, C)
    norm = x, residual, ln.weight, ln.bias
    yield from both("layer_norm", ops.layer_norm, x, ln.weight, ln.bias)
    yield from both("add_layer_norm", ops.add_layer_norm, *norm)
    yield from both("add_layer_norm, ln_f", lambda *tensors: ops.add_layer_norm(*tensors)[0], *norm)
    yield ("gradient of the first sum", "backward"), lambda: lambda: x.detach() + residual.detach()
    for name, size in linear_layers(config).items():
        yield from _linear(name, size, N, randn)
    yield from both("attention", ops.attention, randn(B, T, 3, H, C // H))
    yield from both("bias_gelu", ops.bias_gelu, randn(B, T, 4 * C), model.h[0].mlp.c_fc.bias)

    hidden, weight = randn(N, C), wte.detach().to(dtype).requires_grad_()

    def head() -> None:
        loss = ops.linear_cross_entropy(hidden, weight, targets.flatten(), vocab_size=config.vocab_size)
        torch.autograd.grad(loss, [hidden, weight])

    yield (HEAD, ""), lambda: head
    yield from _whole_model(model, dtype)


def _linear(name: str, size: tuple[int, int, bool], N: int, randn: Callable) -> Iterator[tuple[Key, Prepare]]:
    """One linear layer's products, each alone."""
    K, M, has_bias = size
    with torch.no_grad():
        x, weight, dy = (randn(*sizes).detach() for sizes in ((N, K), (M, K), (N, M)))
        bias = randn(M).detach() if has_bias else None
    yield (name, "forward"), lambda: lambda: F.linear(x, weight, bias)
    yield (f"{name} dinput", "backward"), lambda: lambda: dy @ weight
    yield (f"{name} dweight", "backward"), lambda: lambda: dy.T @ x
    if has_bias:
        yield (f"{name} dbias", "backward"), lambda: lambda: dy.sum(0)


def _whole_model(model: GPT2, dtype: torch.dtype) -> Iterator[tuple[Key, Prepare]]:
    """What goes once through all parameters."""
    parameters = list(model.parameters())
    gradients, others = ([torch.randn_like(p) * 1e-3 for p in parameters] for _ in range(2))
    late = {id(block.mlp.c_fc.bias) for block in model.h}  # added with the GELU, in float32
    linear = [p for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()]
    linear = [p.detach() for p in linear if id(p) not in late]
    if dtype != torch.float32:
        narrow = [p.to(dtype) for p in linear]
        yield ("weight casts", "forward"), lambda: lambda: [p.to(dtype) for p in linear]
        yield ("head weight cast", "forward"), lambda: lambda: parameters[0].detach().to(dtype)
        yield ("gradient casts", "backward"), lambda: lambda: [p.float() for p in narrow]
    table = gradients[0]
    yield ("sum of wte's gradients", "backward"), lambda: lambda: table + others[0]
    add = lambda: [a.add_(b) for a, b in zip(gradients, others, strict=True)]  # noqa: E731
    yield ("gradient accumulation", "backward"), lambda: add
    optimizer = steps.adamw(model)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    inverse, found_inf = torch.ones((), device=table.device), torch.zeros((), device=table.device)
    unscale = torch._amp_foreach_non_finite_check_and_unscale_  # what GradScaler.unscale_ calls
    yield ("unscaling of the gradient", "optimizer"), lambda: lambda: unscale(gradients, found_inf, inverse)
    yield ("norm of the gradient", "optimizer"), lambda: lambda: nn.utils.get_total_norm(gradients)
    clip = lambda: nn.utils.clip_grads_with_norm_(parameters, 1.0, inverse)  # noqa: E731
    yield ("scaling of the gradient", "optimizer"), lambda: clip
    yield ("AdamW", "optimizer"), lambda: optimizer.step


def measure_step(shape: StepShape, device: torch.device) -> Figure:
    """Seconds of one whole step of engine.step, eager, after one that does not count."""
    if device.type == "cpu":
        tune_malloc()
    setup = steps.Setup(precision=shape.precision, recompute=shape.recompute)
    step = steps.build(setup, shape.config, steps.initial_weights(shape.config), device)
    sizes = shape.B, shape.T
    tokens, targets = (torch.randint(shape.config.vocab_size, sizes, device=device) for _ in range(2))
    watch = Stopwatch(device, is_cold=False)
    call = lambda: step([(tokens, targets)] * shape.micro_batches)  # noqa: E731
    samples = in_turns({"": lambda: watch(lambda: call, calls=1)}, within(0, 4, 4))[""]
    return spread(samples[1:], "s")


def per_step(ops: Sequence[Op], per_call: Measured, recompute: str) -> Measured:
    """Seconds of a step from those of one call; the whole head is one call per micro-batch."""
    found = {}
    for op in ops:
        key = (op.name.removesuffix(" again"), "forward") if op.name.endswith(" again") else (op.name, op.phase)
        if op.name == "weight casts again" and recompute != "block":  # of two layers of the four only
            continue
        if key in per_call:
            found[op.name, op.phase] = scaled(per_call[key], op.calls, "s")
    if (HEAD, "") in per_call:
        passes = next(op.calls for op in ops if op.name == "head scaling")
        found[HEAD, ""] = scaled(per_call[HEAD, ""], passes, "s")
    return found


def from_gpu_rows(rows: Sequence[Row], ops: Sequence[Op]) -> Measured:
    """Seconds of one call of each op of these that bench.gpu timed, as this project's kernels run it."""
    found: Measured = {}
    for row in (row for row in rows if row.section == "ops" and row.peer == "triton"):
        if row.case == "linear_cross_entropy" and "both" in row.figures:
            found[HEAD, ""] = row.figures["both"]
        for name in (name for name in {op.name for op in ops} if SAME_OP.get(name, name) == row.case):
            for phase in ("forward",) if name in SAME_OP else ("forward", "backward"):
                if phase in row.figures:
                    found[name, phase] = row.figures[phase]
    return found
