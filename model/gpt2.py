"""GPT-2: token and position embeddings, L pre-norm transformer blocks, and a tied head.

    x = wte[tokens] + wpe[positions]
    x = x + attn(ln_1(x));   x = x + mlp(ln_2(x))          L times
    logits = ln_f(x) wte^T

Each residual add is fused with the LayerNorm that follows it, in one pass over memory. So a block
returns two tensors: the residual stream `x`, and the `branch` that the next LayerNorm adds to it.
Parameters are float32; activations have the compute dtype. Every cast is explicit. Parameter names
are those of the released weights.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import Backend, Ops, select
from model import tied
from model.presets import PRESETS, GPT2Config, num_parameters

if TYPE_CHECKING:
    from model.cache import Cache, LayerCache

__all__ = ["GPT2", "MLP", "PRESETS", "Attention", "Block", "GPT2Config", "LayerNorm", "Linear"]

Recompute = Literal["none", "attention", "block"]
HEAD_ROWS = 1024  # positions whose logits are in memory at once where losses are read one by one: 0.2 GB in float32


class _UseCopy(torch.autograd.Function):
    """(parameter, copy) -> copy, whose gradient is the parameter's. parameter.to(copy.dtype) without the cast."""

    @staticmethod
    def forward(ctx, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


@torch.library.custom_op("gpt2::keep", mutates_args=())
def keep(x: Tensor) -> Tensor:
    """A copy of x that a compiled graph saves for the backward pass, whatever made x.

    torch.compile never saves a view, nor one of the several outputs of an operator that it
    recomputes: it would recompute both, and so all blocks from the first on before any of them is
    needed. It removes a plain clone first.
    """
    return x.clone()


keep.register_fake(torch.empty_like)
keep.register_autograd(lambda _, gradient: gradient)


class Linear(nn.Linear):
    """Linear layer, x weight^T + bias.

    Casts its float32 parameters to x's dtype in each call, or once for all calls in cast_once.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.copies: dict[str, Tensor] = {}  # of weight and bias, in the compute dtype
        self.uses_copies = False

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.cast("bias", x.dtype))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x weight^T, plus this bias if there is one."""
        return F.linear(x, self.cast("weight", x.dtype), bias)

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """The parameter of this name in this dtype."""
        parameter = getattr(self, name)
        return _UseCopy.apply(parameter, self.copies[name]) if self.uses_copies else parameter.to(dtype)


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Context manager in which forwards of the GPT2 in `model` share one cast of its linear layers.

    Outside, each forward casts them. Losses and gradients have the same bits. The weights must not
    change inside, so it surrounds the micro-batches of a step and not the optimizer. The copies are
    kept, and overwritten at the next entry. Not for a sharded model.
    """
    dtype = next(module.compute_dtype for module in model.modules() if isinstance(module, GPT2))
    linears = [module for module in model.modules() if isinstance(module, Linear) and module.weight.dtype != dtype]
    parameters, copies = [], []
    for linear in linears:
        for name, parameter in linear.named_parameters():
            copy = linear.copies.get(name)
            if copy is None or (copy.dtype, copy.device) != (dtype, parameter.device):
                linear.copies[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            parameters.append(parameter)
            copies.append(linear.copies[name])
    if linears:
        with torch.no_grad():
            torch._foreach_copy_(copies, parameters)
    for linear in linears:
        linear.uses_copies = True
    try:
        yield
    finally:
        for linear in linears:
            linear.uses_copies = False


class LayerNorm(nn.Module):
    """Residual add and LayerNorm: (x, branch) -> LayerNorm(x + branch), x + branch. None adds nothing."""

    ops: Ops

    def __init__(self, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if branch is None:
            return self.ops.layer_norm(x, self.weight, self.bias), x
        return self.ops.add_layer_norm(x, branch, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention with H heads of width D."""

    ops: Ops

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one matrix product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, h: Tensor, cache: "LayerCache | None" = None, starts: Tensor | None = None) -> Tensor:
        B, T, C = h.shape
        qkv = self.c_attn(h).view(B, T, 3, self.n_head, C // self.n_head)
        if cache is None:
            documents = {} if starts is None else {"starts": starts}
            out = self.ops.attention(qkv, dropout_p=self.dropout if self.training else 0.0, **documents)  # (B, T, H, D)
        else:  # while generating
            out = cache.attention(qkv, self.ops.attention)
        return F.dropout(self.c_proj(out.view(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    """Feed-forward network: linear to width 4 C, GELU, linear back to C.

    bias_gelu adds the first linear layer's bias.
    """

    ops: Ops

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, h: Tensor) -> Tensor:
        h = self.ops.bias_gelu(self.c_fc.product(h), self.c_fc.bias)  # (B, T, 4 C)
        return F.dropout(self.c_proj(h), self.dropout, self.training)


class Block(nn.Module):
    """Transformer block: attention, then the MLP, each after its LayerNorm.

    `recompute` names the part that is checkpointed: it saves only its inputs, and recomputes its
    activations in backward. This saves memory and costs that part's forward time once more. The
    gradients have the same bits, with dropout too.
    Source: Chen et al. 2016, arXiv:1604.06174.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.recompute: Recompute = "none"
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: "LayerCache | None" = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run("block", self._forward, x, branch, cache, starts)

    def _forward(self, x: Tensor, branch: Tensor | None, *inputs) -> tuple[Tensor, Tensor]:
        h, x = self.ln_1(x, branch)
        h, x = self.ln_2(x, self._run("attention", self.attn, h, *inputs))
        return x, self.mlp(h)

    def _run(self, part: Recompute, function: Callable, *inputs):
        if self.recompute == part and self.training and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


class GPT2(nn.Module):
    """GPT-2. `model(tokens)` returns logits (B, T, V), `model(tokens, targets)` the mean loss.

    tokens, targets: (B, T) int64, T at most n_positions. Targets of -100 are ignored. The default
    is PyTorch's ops in float32; `configure` changes both.
    """

    end_of_text: int | None = None  # token that begins a document; None: no mask
    restarts_positions = False
    training_loss: Callable[..., Tensor] | None = None  # in training, in place of ops.linear_cross_entropy

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # also the head; rows from V up are padding
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        self.reset_parameters()
        self.configure("torch", torch.float32)

    def reset_parameters(self) -> None:
        """Draws new weights as config.init says, from PyTorch's current random state.

        fan_in: std = 1/sqrt(n_embd) for every matrix and embedding. The logits then have unit
            variance, so the first loss is near ln V + 1/2.
        gpt2: std = 0.02, and the two projections into the residual stream of each block are scaled
            by 1/sqrt(2 L), so that the stream's variance does not grow with depth. The first loss
            is nearer ln V.
        zero_residual: fan_in with those projections at zero. Every block begins as the identity and
            adds no noise to the embeddings, so a short run learns faster. The first loss is higher,
            near ln V + 1 for small models, because with a tied head the identity predicts the input
            token.
        """
        C, L = self.config.n_embd, self.config.n_layer
        std, residual_scale = {
            "fan_in": (1.0 / math.sqrt(C), 1.0),
            "gpt2": (0.02, 1.0 / math.sqrt(2 * L)),
            "zero_residual": (1.0 / math.sqrt(C), 0.0),
        }[self.config.init]
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:  # LayerNorm
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std * residual_scale if name.endswith("c_proj.weight") else std)
        with torch.no_grad():
            self.wte.weight[self.config.vocab_size :] = 0.0

    def configure(self, backend: Backend | Ops, compute_dtype: torch.dtype, recompute: Recompute = "none") -> Ops:
        """Sets the ops, the activations' dtype and the recomputed part; returns the ops.

        `recompute` names the part of each block that backward recomputes in training: its
        "attention", the whole "block" or "none". Call this after moving the model, because the ops
        depend on the device. Raises ValueError as dispatch.select does.
        """
        ops = backend
        if not isinstance(backend, Ops):
            device, dropout_p = self.wte.weight.device, self.config.dropout
            ops = select(backend, device, compute_dtype, self.config.head_dim, dropout_p=dropout_p)
        for module in self.modules():
            if isinstance(module, GPT2 | LayerNorm | Attention | MLP):
                module.ops = ops
            if isinstance(module, Block):
                module.recompute = recompute
        self.compute_dtype = compute_dtype
        return ops

    def mask_documents(self, end_of_text: int | None, restarts_positions: bool = False) -> None:
        """Keeps attention inside each document, which begins with this token; None: no mask.

        restarts_positions: each document's positions begin at 0. Evaluation and sampling heed both.
        """
        if end_of_text is not None and not 0 <= end_of_text < self.config.vocab_size:
            raise ValueError(f"model: end_of_text must be 0 to {self.config.vocab_size - 1}, got {end_of_text}")
        self.end_of_text = end_of_text
        self.restarts_positions = restarts_positions and end_of_text is not None

    def document_starts(self, tokens: Tensor, first: int | Tensor = 0) -> Tensor | None:
        """Position of the first token of each token's document, (B, T) int32; None without a mask.

        A sequence may begin inside a document: `first` is then the position.
        """
        if self.end_of_text is None:
            return None
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where(tokens == self.end_of_text, places, first).cummax(dim=1).values.int()

    def crop(self, n_positions: int) -> None:
        """Keeps the first n_positions positions. Call it before an optimizer is made."""
        self.config = replace(self.config, n_positions=n_positions)
        self.wpe = nn.Embedding.from_pretrained(self.wpe.weight.detach()[:n_positions].clone(), freeze=False)

    def crop_vocabulary(self, vocab_size: int) -> None:
        """Keeps the first vocab_size tokens. Call it before an optimizer is made."""
        self.config = replace(self.config, vocab_size=vocab_size)
        rows = self.wte.weight.detach()[: self.config.padded_vocab_size].clone()
        rows[vocab_size:] = 0.0
        self.wte = nn.Embedding.from_pretrained(rows, freeze=False)

    def num_parameters(self) -> int:
        """Number of parameters as published: tied head once, without the vocabulary's padding."""
        return num_parameters(self.config, padded=False)

    def hidden(self, tokens: Tensor, cache: "Cache | None" = None, table: Tensor | None = None) -> Tensor:
        """Output of the last LayerNorm, (B, T, C) in the compute dtype.

        cache: of the tokens before these; see model.cache. table: the embedding's use of wte; see model.tied.
        """
        T = tokens.shape[1]
        if T > self.config.n_positions:
            raise ValueError(f"model: a sequence must have at most {self.config.n_positions} tokens, got {T}")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions
        starts = self.document_starts(tokens) if cache is None else None  # a cache has its own
        if starts is not None and self.restarts_positions:
            positions = positions - starts
        x = self.wte(tokens) if table is None else F.embedding(tokens, table, sparse=True)
        x = F.dropout((x + self.wpe(positions)).to(self.compute_dtype), self.config.dropout, self.training)  # (B, T, C)
        branch, is_compiled = None, torch.compiler.is_compiling() and self.training  # as one graph
        for block, layer in zip(self.h, [None] * len(self.h) if cache is None else cache.layers, strict=True):
            if branch is not None and is_compiled and block.recompute == "block":
                x, branch = keep(x), keep(branch)
            x, branch = block(x, branch, layer, starts)
        return self.ln_f(x, branch)[0]

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C), without the vocabulary's padding."""
        return F.linear(h, self.wte.weight.to(h.dtype))[..., : self.config.vocab_size]

    def last_logits(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Logits (B, V) of the token after tokens (B, T). The head runs at one position only."""
        return self.head(self.hidden(tokens, cache)[:, -1])

    def log_probabilities(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target but -100, (N,) float32 in nats, and whether it is the most likely token.

        targets: (B, T) int64. The head runs at their positions only, HEAD_ROWS at a time.
        """
        is_wanted = targets != -100
        parts = zip(self.hidden(tokens)[is_wanted].split(HEAD_ROWS), targets[is_wanted].split(HEAD_ROWS), strict=True)
        log_p, is_likely = [], []
        for h, wanted in parts:
            logits = self.head(h).float()
            log_p.append(-F.cross_entropy(logits, wanted, reduction="none"))
            is_likely.append(logits.argmax(-1) == wanted)
        return torch.cat(log_p), torch.cat(is_likely)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self.head(self.hidden(tokens))
        table, weight = tied.split(self.wte.weight)
        h, V = self.hidden(tokens, table=table).flatten(0, 1), self.config.vocab_size
        loss = self.training_loss if self.training and self.training_loss else self.ops.linear_cross_entropy
        return loss(h, weight, targets.flatten(), vocab_size=V)

    def generate(
        self,
        tokens: Tensor | list[Tensor],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        context: int | None = None,
        **options,
    ) -> Tensor | list[Tensor]:
        """Returns tokens (B, T) followed by max_new_tokens drawn tokens: (B, T + max_new_tokens).

        See model.generate, also for the other options and for prompts of different lengths.
        """
        from model.generate import generate

        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "context": context}
        return generate(self, tokens, max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, dir_or_name: str | Path) -> "GPT2":
        """Loads a model from weights in the Hugging Face layout. See model.pretrained.load."""
        from model.pretrained import load

        return load(cls, dir_or_name)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the weights in the Hugging Face layout. See model.pretrained.save."""
        from model.pretrained import save

        save(self, directory)
