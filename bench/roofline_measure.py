"""Measured times for bench.roofline: of each op of a step alone, at its real shapes, or those that bench.gpu took.

Medians of interleaved rounds. Each call finds the caches full of other data, as in a step whose tensors do not fit
them, so that its inputs come from memory as its bound supposes. Ops run as the engine runs them without a compiler:
Triton's where it can run.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contestants import TrainingStep, adamw, initial_weights
from bench.roofline_ops import HEAD, Op, linear_layers
from engine import precision as arithmetic
from engine.distributed import keep_freed_memory
from engine.errors import BadInput
from kernels.dispatch import select
from model.gpt2 import GPT2
from model.presets import PRESETS, GPT2Config

if TYPE_CHECKING:
    from bench.roofline import Roofline

Measured = dict[tuple[str, str], float]  # milliseconds by (op's name, phase); the whole head's is (HEAD, "")
GPU_STEP = (PRESETS["gpt2"], 64, 1024, "bf16")  # what bench.gpu's kernels are timed at: bench.gpu_cases.GPT2
SAME_OP = {"add_layer_norm, ln_f": "add_layer_norm"}  # its backward has one input less
ROUNDS = 7  # of which the first is warm-up


class Times:
    """Collects milliseconds of calls on one device, each after the caches were filled with zeros."""

    def __init__(self, device: torch.device):
        self.device = device
        self.filler = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.int8, device=device)

    def ms(self, call: Callable[[], object]) -> float:
        """One call's time."""
        self.filler.zero_()
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize(self.device)
            return events[0].elapsed_time(events[1])
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)


def measure_ops(config: GPT2Config, B: int, T: int, precision: str, device: torch.device | str) -> Measured:
    """Milliseconds of one call by (op's name, phase); the whole head as ("head", "").

    The optimizer's and the casts' calls are those of the whole model.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()  # as the engine does
    torch.manual_seed(0)
    calls = dict(cases(config, B, T, precision, device))
    times, samples = Times(device), {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            samples[key].append(times.ms(call))
    return {key: statistics.median(taken[1:]) for key, taken in samples.items()}


def cases(
    config: GPT2Config, B: int, T: int, precision: str, device: torch.device
) -> Iterator[tuple[tuple[str, str], Callable]]:
    """((name, phase), a call that does the op once) with inputs made beforehand."""
    dtype = arithmetic.apply(precision)
    N, C, H = B * T, config.n_embd, config.n_head
    ops = select("auto", device, dtype, config.head_dim)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    def both(name: str, op: Callable, *inputs: Tensor) -> Iterator[tuple[tuple[str, str], Callable]]:
        def forward() -> None:
            with torch.no_grad():
                op(*inputs)

        outputs = op(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        douts = [torch.randn_like(output) for output in outputs]
        leaves = [t for t in inputs if t.requires_grad]
        yield (name, "forward"), forward
        yield (name, "backward"), lambda: torch.autograd.grad(outputs, leaves, douts, retain_graph=True)

    model = GPT2(config).to(device)
    parameters = list(model.parameters())
    wte, wpe, ln = model.wte.weight, model.wpe.weight, model.ln_f
    tokens, targets = (torch.randint(config.vocab_size, (B, T), device=device) for _ in range(2))
    yield from both("embedding", lambda a, b: (F.embedding(tokens, a) + b[:T]).to(dtype), wte, wpe)
    x, residual = randn(B, T, C), randn(B, T, C)
    yield from both("layer_norm", ops.layer_norm, x, ln.weight, ln.bias)
    yield from both("add_layer_norm", ops.add_layer_norm, x, residual, ln.weight, ln.bias)
    yield from both(
        "add_layer_norm, ln_f", lambda *tensors: ops.add_layer_norm(*tensors)[0], x, residual, ln.weight, ln.bias
    )
    yield ("gradient of the first sum", "backward"), lambda: x.detach() + residual.detach()
    for name, size in linear_layers(config).items():
        yield from _linear(name, size, N, randn)
    yield from both("attention", ops.attention, randn(B, T, 3, H, C // H))
    yield from both("bias_gelu", ops.bias_gelu, randn(B, T, 4 * C), model.h[0].mlp.c_fc.bias)

    hidden, weight = randn(N, C), wte.detach().to(dtype).requires_grad_()

    def head() -> None:
        loss = ops.linear_cross_entropy(hidden, weight, targets.flatten(), vocab_size=config.vocab_size)
        torch.autograd.grad(loss, [hidden, weight])

    yield (HEAD, ""), head
    yield from _whole_model(model, parameters, dtype)


def _linear(name: str, size: tuple[int, int, bool], N: int, randn: Callable) -> Iterator:
    """One linear layer's products, each alone."""
    K, M, has_bias = size
    with torch.no_grad():
        x, weight, dy = (randn(*shape).detach() for shape in ((N, K), (M, K), (N, M)))
        bias = randn(M).detach() if has_bias else None
    yield (name, "forward"), lambda: F.linear(x, weight, bias)
    yield (f"{name} dinput", "backward"), lambda: dy @ weight
    yield (f"{name} dweight", "backward"), lambda: dy.T @ x
    if has_bias:
        yield (f"{name} dbias", "backward"), lambda: dy.sum(0)


def _whole_model(model: GPT2, parameters: list[nn.Parameter], dtype: torch.dtype) -> Iterator:
    """What goes once through all parameters."""
    gradients, others = ([torch.randn_like(p) * 1e-3 for p in parameters] for _ in range(2))
    linear = [p for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()]
    late = {id(block.mlp.c_fc.bias) for block in model.h}  # added with the GELU, in float32
    linear = [p.detach() for p in linear if id(p) not in late]
    if dtype != torch.float32:
        narrow = [p.to(dtype) for p in linear]
        yield ("weight casts", "forward"), lambda: [p.to(dtype) for p in linear]
        yield ("head weight cast", "forward"), lambda: parameters[0].detach().to(dtype)
        yield ("gradient casts", "backward"), lambda: [p.float() for p in narrow]
    table = gradients[0]
    yield ("sum of wte's gradients", "backward"), lambda: table + others[0]
    yield ("gradient accumulation", "backward"), lambda: [a.add_(b) for a, b in zip(gradients, others, strict=True)]
    optimizer = adamw(model)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    inverse, found_inf = torch.ones((), device=table.device), torch.zeros((), device=table.device)
    unscale = torch._amp_foreach_non_finite_check_and_unscale_  # what GradScaler.unscale_ calls
    yield ("unscaling of the gradient", "optimizer"), lambda: unscale(gradients, found_inf, inverse)
    yield ("norm of the gradient", "optimizer"), lambda: nn.utils.get_total_norm(gradients)
    one = torch.ones((), device=parameters[0].device)
    yield ("scaling of the gradient", "optimizer"), lambda: nn.utils.clip_grads_with_norm_(parameters, 1.0, one)
    yield ("AdamW", "optimizer"), optimizer.step


def measure_step(
    config: GPT2Config, B: int, T: int, precision: str, recompute: str, micro_batches: int, device: torch.device | str
) -> dict[str, float]:
    """{"eager": milliseconds} of one whole step, the median of three after one that does not count."""
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    weights = initial_weights(config)
    step = TrainingStep("ours", config, weights, device, is_compiled=False, precision=precision, recompute=recompute)
    tokens, targets = (torch.randint(config.vocab_size, (B, T), device=device) for _ in range(2))
    taken = []
    for _ in range(4):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(micro_batches - 1):
            step.scaler.scale(step.loss(tokens, targets) / micro_batches).backward()
        step(tokens, targets)
        _synchronize(device)
        taken.append(1e3 * (time.perf_counter() - start))
    del step
    gc.collect()
    return {"eager": statistics.median(taken[1:])}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def per_step(ops: list[Op], per_call: Measured, recompute: str) -> Measured:
    """Milliseconds of a step from those of one call; the whole head is one call per micro-batch."""
    found = {}
    for op in ops:
        key = (op.name.removesuffix(" again"), "forward") if op.name.endswith(" again") else (op.name, op.phase)
        if op.name == "weight casts again" and recompute != "block":  # of two layers of the four only
            continue
        if key in per_call:
            found[op.name, op.phase] = op.calls * per_call[key]
    if (HEAD, "") in per_call:
        passes = next(op.calls for op in ops if op.name == "head scaling")
        found[HEAD, ""] = passes * per_call[HEAD, ""]
    return found


def from_gpu_rows(rows: list[dict], ops: list[Op]) -> Measured:
    """Milliseconds of one call of each op of these that bench.gpu timed, as this project's kernels run it."""
    names = {op.name for op in ops}
    found: Measured = {}
    for row in rows:
        phases = {name: phase["median_ms"] for name, phase in row.get("phases", {}).items() if "median_ms" in phase}
        if row.get("status") != "measured" or row.get("contestant") != "triton":
            continue
        if row["op"] == "linear_cross_entropy" and "both" in phases:
            found[HEAD, ""] = phases["both"]
        for name in (name for name in names if SAME_OP.get(name, name) == row["op"]):
            found |= {
                (name, phase): phases[phase]
                for phase in ("forward", "backward")
                if phase in phases and not (name in SAME_OP and phase == "backward")
            }
    return found


def read(path: Path) -> dict:
    """A JSON file of results. Raises BadInput if it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"roofline: --measured must be a JSON file of results, got {path}: {error}") from error
    if not isinstance(found, dict) or not ("rows" in found or "roofline" in found):
        raise BadInput(f"roofline: --measured must be gpu.json of bench.gpu or roofline.json, got {path}")
    return found


def take_measured(roofline: "Roofline", found: dict, path: Path) -> None:
    """Fills in what a file of results holds. Raises BadInput if it was measured at other sizes, or holds nothing."""
    timed_on = found["chip"]["name"] if "roofline" in found else found.get("machine", {}).get("gpu", "")
    if timed_on and roofline.chip.name not in timed_on:
        raise BadInput(f"roofline: --chip must be what {path} was measured on, {timed_on}, got {roofline.chip.name}")
    if "roofline" in found:
        if found["what"] != roofline.what:
            wrong = [f"{name} {value}" for name, value in found["what"].items() if roofline.what.get(name) != value]
            raise BadInput(f"roofline: {path} must be of the step that is asked for, got one with {', '.join(wrong)}")
        roofline.measured = {(name, phase): ms for name, phase, ms in found["measured"]}
        roofline.step_ms, roofline.measured_on = found["step_ms"], found["measured_on"] or found["facts"]
        return
    _, B, T, precision = GPU_STEP
    if (roofline.config, roofline.B, roofline.T, roofline.precision) != GPU_STEP:
        raise BadInput(
            f"roofline: {path} holds kernels at the sizes of gpt2, {B} sequences of {T:,} in {precision}, and the step "
            f"must have them too, got {roofline.model}, {roofline.B} of {roofline.T:,} in {roofline.precision}"
        )
    roofline.measured = per_step(roofline.ops, from_gpu_rows(found["rows"], roofline.ops), roofline.recompute)
    if not roofline.measured:
        raise BadInput(f"roofline: {path} must hold measured times of this project's kernels, got none")
    roofline.measured_on = found.get("machine")
    if roofline.micro_batches == 1:
        roofline.step_ms = {
            row["contestant"]: row["step_ms"]["median_ms"]
            for row in found["rows"]
            if "median_ms" in row.get("step_ms", {})
        }
