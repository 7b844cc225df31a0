"""Check of torch.compile: the loss and gradients of one micro-batch, compiled against uncompiled.

torch.compile can be wrong without an error. So before the first update both are made on the very
model that trains, wrapped as it is, and compared:

    error = ||compiled - eager|| / max(||eager||, SMALL ||whole eager gradient||)   of each parameter

Nothing is updated and no gradient stays, so a run has the same bits with the check as without. What
is compiled for it is what trains. With dropout there is no check: compiled, it draws other numbers.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import device, distributed
from engine.distributed import Ranks
from engine.errors import Diverged
from engine.health.failures import is_lost_peer, out_of_memory
from model.gpt2 import GPT2, cast_once

# Largest error that passes, by compute dtype. Inductor rounds in other places than eager does. On a CPU
# the largest error of 4 layers of width 256 was 1.1e-6, 3.5e-2 and 4.2e-3, and of `tiny` half of that.
# Rounding grows little with depth: from 4 to 48 layers eager bfloat16 moved from 3.3e-2 to 5.3e-2 off
# float32.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 2e-1, torch.float16: 2e-2}
TF32_BOUND = 1e-2  # not measured: products keep 10 bits, as in float16
SMALL = 1e-3  # a gradient below this part of the whole is held against this part of the whole
LOSS_SCALE = 1024.0  # in float16, where small gradients would vanish
LOSS = "the loss"

MicroBatch = tuple[Tensor, Tensor]  # tokens, targets: (B, T) int64


class Finding(NamedTuple):
    """Whether the compiled model may train, and why. The same on every rank."""

    is_right: bool
    text: str


def wanted(asked: bool | None, is_strict: bool, ranks: Ranks) -> tuple[bool, str]:
    """(whether to compile the training step, why), the same on every rank. All ranks call it.

    A rank that cannot compile keeps all from it. asked: --compile. Raises Diverged instead with
    --strict.
    """
    answers = ranks.gather(device.wants_compile(asked, ranks.device))
    rank, (is_compiled, why) = next(((r, a) for r, a in enumerate(answers) if not a[0]), (0, answers[0]))
    if is_compiled or why.startswith("off"):
        return is_compiled, why
    if ranks.world_size > 1:
        why = f"{why} (rank {rank})"
    if is_strict:
        raise Diverged(f"train: with --strict the training step must be compiled, got: {why}; leave out --strict")
    return False, why


def check(model: nn.Module, raw_model: GPT2, batch: MicroBatch, ranks: Ranks) -> Finding:
    """Compares a compiled model in training with itself uncompiled. All ranks call it.

    model: compiled and wrapped. batch: of this rank. Clears the gradients and the GPU's peak memory.
    """
    try:
        return _check(model, raw_model, batch, ranks)
    finally:
        raw_model.zero_grad(set_to_none=True)
        device.forget_memory(ranks.device)  # what uncompiled steps need is not what the run needs


def _check(model: nn.Module, raw_model: GPT2, batch: MicroBatch, ranks: Ranks) -> Finding:
    if raw_model.config.dropout:
        return Finding(True, "unchecked, since dropout draws other numbers when compiled")
    # FSDP must sum gradients in every backward pass; DDP need not.
    distributed.synchronize_gradients(model, distributed.is_sharded(model))
    made: list[dict[str, Tensor]] = []
    for stance in ("force_eager", "default"):
        problem = None
        try:
            casts = nullcontext() if distributed.is_sharded(model) else cast_once(model)  # as in a step
            with torch.compiler.set_stance(stance), casts:
                made.append(loss_and_gradients(model, raw_model, batch, ranks.device))
        except Exception as error:  # what compiling raises has many types
            is_memory = out_of_memory(error)
            # Of FSDP a pass that fails leaves gradients unreduced, and other ranks waiting.
            if is_lost_peer(error) or distributed.is_sharded(model) or (stance == "force_eager" and not is_memory):
                raise
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            problem = (is_memory, f"it fails with {type(error).__name__}: {first_line}"[:300])
        problems = [each for each in ranks.gather(problem) if each is not None]
        if problems:  # out here the error is gone, and with it the frames that hold memory
            made.clear()
            if all(is_memory for is_memory, _ in problems):
                return Finding(True, "unchecked, since memory does not suffice for a second set of gradients")
            return Finding(False, next(text for is_memory, text in problems if not is_memory))
    return judge(*made, bound_of(raw_model.compute_dtype), ranks, is_sharded=distributed.is_sharded(model))


def bound_of(dtype: torch.dtype) -> float:
    """Largest error that passes. float32 products are TF32's if PyTorch's precision allows it."""
    is_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return TF32_BOUND if is_tf32 else BOUNDS[dtype]


def loss_and_gradients(model: nn.Module, raw_model: GPT2, batch: MicroBatch, on: torch.device) -> dict[str, Tensor]:
    """The loss, and this rank's part of each parameter's gradient. Parameters keep no gradient."""
    tokens, targets = device.send(on, *batch)
    loss = model(tokens, targets)
    (loss * (LOSS_SCALE if raw_model.compute_dtype == torch.float16 else 1.0)).backward()
    values = {LOSS: loss.detach()}
    for name, parameter in raw_model.named_parameters():
        if parameter.grad is not None:
            values[f"the gradient of {name}"] = distributed.local(parameter.grad)
        parameter.grad = None
    return values


def judge(
    eager: dict[str, Tensor], compiled: dict[str, Tensor], bound: float, ranks: Ranks, is_sharded: bool = False
) -> Finding:
    """Compares all values of all ranks with the bound. Waits for the device."""
    norms = []  # of the difference and of the eager value, squared
    for name, value in eager.items():
        difference = compiled[name] - value if name in compiled else value
        norms.append(
            torch.stack([torch.linalg.vector_norm(t, dtype=device.widest(ranks.device)) for t in (difference, value)])
        )
    squares = torch.stack(norms).square()
    if is_sharded:  # replicas of shards are counted as often above and below
        squares = ranks.sum(squares)
    (of_difference, of_loss), *others = squares.sqrt().tolist()
    whole = math.hypot(*(norm for _, norm in others))
    errors = {LOSS: of_difference / max(of_loss, SMALL)}
    for name, (difference, norm) in zip([*eager][1:], others, strict=True):
        errors[name] = difference / max(norm, SMALL * whole, 1e-30)
    name, error = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    found = ranks.gather((math.isfinite(whole + of_loss), math.inf if math.isnan(error) else error, name))
    if not all(is_finite for is_finite, _, _ in found):
        return Finding(True, "unchecked, since the uncompiled gradients are not finite")
    _, error, name = max(found, key=lambda each: each[1])
    if error <= bound:
        return Finding(True, f"checked, loss and gradients are the uncompiled ones to {error:.0e}")
    return Finding(False, f"{name} differs from the uncompiled one by {error:.1e}, at most {bound:.0e} is allowed")
