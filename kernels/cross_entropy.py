"""The language-model head and its cross-entropy as one op, so that the logits never exist whole.

    z = hidden weight^T,   loss = mean over targets not ignored of  logsumexp(z_i) - z_i[target_i]
    dz_i = (softmax(z_i) - onehot(target_i)) / count,   dhidden = dz weight,   dweight = dz^T hidden

hidden: (N, C) and weight: (Vp, C), float32, bfloat16 or float16; targets: (N,) int64; loss: scalar float32
(float64 for float64 inputs). Columns of weight from vocab_size up are padding: they take no probability and no
gradient. Rows whose target is ignore_index count for nothing; when all are ignored the loss and every gradient
are 0. A target outside the vocabulary raises ValueError on a CPU and gives a NaN loss on a GPU, where looking
would mean waiting.

At GPT-2's sizes the logits outweigh everything else in a step: 65,536 rows * 50,304 columns * 2 bytes = 6.6 GB.
Working through chunks of rows keeps one chunk of them, and since a chunk's logits are gone after it, its
gradients are computed with it in the forward pass: three matrix products in all, as many as without chunks.
Source: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import check_floating, require


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> None:
    op = "linear_cross_entropy"
    require(hidden.ndim == 2 and min(hidden.shape) > 0, f"{op}: hidden must be (N, C)", tuple(hidden.shape))
    require(
        weight.ndim == 2 and weight.shape[1] == hidden.shape[1],
        f"{op}: weight must be (Vp, C) with C = {hidden.shape[1]}",
        tuple(weight.shape),
    )
    require(targets.shape == hidden.shape[:1], f"{op}: targets must be ({hidden.shape[0]},)", tuple(targets.shape))
    require(targets.dtype == torch.int64, f"{op}: targets must be int64", targets.dtype)
    require(targets.device == hidden.device, f"{op}: targets must be on {hidden.device}", targets.device)
    require(0 < vocab_size <= weight.shape[0], f"{op}: vocab_size must be 1 to Vp = {weight.shape[0]}", vocab_size)
    check_floating(op, hidden=hidden, weight=weight)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None = None, ignore_index: int = -100
) -> Tensor:
    """The definition. Every other implementation is tested against it."""
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, weight, targets, vocab_size)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight[:vocab_size].to(wide).T  # (N, V)
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


def _chunk_rows(weight: Tensor) -> int:
    """Rows per chunk: logits of 100 MB on a CPU (its caches gain nothing from more), 1 GB elsewhere.

    At most 4,096, so that a chunk's sum over rows stays in float16's range for hidden values up to 16.
    """
    budget = 25_000_000 if weight.device.type == "cpu" else 250_000_000  # elements
    return max(1, min(4096, budget // weight.shape[0]))


@torch.library.custom_op("gpt2::linear_cross_entropy_torch", mutates_args=())
def _sum_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, and where needed its gradients; they are left unscaled, which keeps float16 from underflow."""
    N = hidden.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    compute_weight = weight.to(hidden.dtype)
    valid = targets != ignore_index
    labels = torch.where(valid, targets, 0)
    outside = (labels < 0) | (labels >= vocab_size)
    if hidden.device.type == "cpu" and bool(outside.any()):
        worst = labels[outside][0].item()
        raise ValueError(f"linear_cross_entropy: targets must be 0 to {vocab_size - 1} or {ignore_index}, got {worst}")
    labels = labels.clamp(0, vocab_size - 1)[:, None]  # (N, 1)
    losses = hidden.new_empty(N, dtype=wide)
    dhidden = torch.empty_like(hidden if needs_grad else hidden[:0], memory_format=torch.contiguous_format)
    # dweight is a sum over all rows: in float16 it would overflow before it is divided by their count.
    dweight = hidden.new_zeros(weight.shape if needs_grad else (0, weight.shape[1]), dtype=wide)

    rows = min(N, _chunk_rows(weight))
    logits_buffer = hidden.new_empty(rows, weight.shape[0])
    softmax_buffer = hidden.new_empty(rows, weight.shape[0], dtype=wide)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        n = chunk.stop - start
        logits = torch.mm(hidden[chunk], compute_weight.T, out=logits_buffer[:n])  # (n, Vp)
        logits[:, vocab_size:] = float("-inf")
        peak = logits.amax(dim=-1, keepdim=True).to(wide)
        probs = torch.softmax(logits, dim=-1, dtype=wide, out=softmax_buffer[:n])
        # The largest probability is exp(peak - logsumexp), so this is the log-sum-exp without a pass of its own.
        log_sum_exp = peak - probs.amax(dim=-1, keepdim=True).log()  # (n, 1)
        losses[chunk] = (log_sum_exp - logits.gather(1, labels[chunk])).squeeze(1)
        if needs_grad:
            dlogits = probs.scatter_add_(1, labels[chunk], probs.new_full((n, 1), -1.0)).to(hidden.dtype)
            torch.mm(dlogits, compute_weight, out=dhidden[chunk])
            counted = hidden[chunk] * valid[chunk, None]
            if hidden.dtype == wide:
                dweight.addmm_(dlogits.T, counted)
            else:  # each chunk's product is rounded once, the sum is float32
                dweight += dlogits.T @ counted
    if needs_grad:
        dhidden *= valid[:, None]
    total = torch.where(valid, losses, 0.0).sum() + torch.where(outside.any(), float("nan"), 0.0)
    return total, dhidden, dweight


@_sum_and_gradients.register_fake
def _(hidden, weight, targets, vocab_size, ignore_index, needs_grad):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_empty((), dtype=wide)
    dhidden = torch.empty_like(hidden if needs_grad else hidden[:0], memory_format=torch.contiguous_format)
    dweight = hidden.new_empty(weight.shape if needs_grad else (0, weight.shape[1]), dtype=wide)
    return total, dhidden, dweight


def _setup_context(ctx, inputs, output):
    _, dhidden, dweight = output
    ctx.save_for_backward(dhidden, dweight)
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dtotal, _ddhidden, _ddweight):
    dhidden, dweight = ctx.saved_tensors
    if dtotal is None:
        return None, None, None, None, None, None
    dhidden = (dhidden * dtotal).to(dhidden.dtype) if ctx.needs_input_grad[0] else None
    dweight = (dweight * dtotal).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
    return dhidden, dweight, None, None, None, None


_sum_and_gradients.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int | None = None, ignore_index: int = -100
) -> Tensor:
    """PyTorch's matrix products and softmax over chunks of rows: one chunk of logits in memory, never all."""
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, weight, targets, vocab_size)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, _, _ = _sum_and_gradients(hidden, weight, targets, vocab_size, ignore_index, needs_grad)
    return total / (targets != ignore_index).sum().clamp(min=1)
