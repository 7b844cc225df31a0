"""GPT2Config, the named sizes, and the count of parameters, shapes and FLOPs of a size.

Free of PyTorch, so that a command line can list the sizes without a slow import.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

InitScheme = Literal["fan_in", "gpt2", "zero_residual"]
INIT_SCHEMES = get_args(InitScheme)


@dataclass(frozen=True)
class GPT2Config:
    """Sizes, dropout and initialisation of a GPT-2."""

    n_layer: int = 12  # L, transformer blocks
    n_head: int = 12  # H, attention heads; divides n_embd
    n_embd: int = 768  # C, width of the residual stream
    n_positions: int = 1024  # largest context T, in tokens
    vocab_size: int = 50257  # V, number of tokens; the model pads it to Vp, a multiple of 128
    dropout: float = 0.0  # probability, on embeddings, attention weights and both residual branches
    init: InitScheme = "fan_in"  # initial weights: see GPT2.reset_parameters

    def __post_init__(self) -> None:
        """Raises ValueError, naming every field that is wrong."""
        wrong = [
            f"{name} must be at least 1, got {value}"
            for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
            if (value := getattr(self, name)) < 1
        ]
        if self.n_head >= 1 and self.n_embd % self.n_head:
            wrong.append(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.init not in INIT_SCHEMES:
            wrong.append(f"init must be one of {', '.join(INIT_SCHEMES)}, got {self.init!r}")
        if wrong:
            raise ValueError("model: " + "; ".join(wrong))

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Vp: V rounded up to a multiple of 128, aligned for tensor cores in the head's matmuls."""
        return -(-self.vocab_size // 128) * 128


def _gpt3(n_layer: int, n_embd: int, n_head: int) -> GPT2Config:
    return GPT2Config(n_layer, n_head, n_embd, n_positions=2048)


# GPT-2's sizes are the released ones. GPT-3's are table 2.1 of Brown et al. 2020, arXiv:2005.14165,
# with two entries corrected, because n_head * d_head must be d_model: XL has 16 heads of width 128
# (the table says 24), and 13B is 5,120 wide (the table says 5,140). GPT-3 alternates dense and
# sparse attention; here all attention is dense.
PRESETS: dict[str, GPT2Config] = {
    # tiny and mini are for minutes of training on a CPU, where a short context gives a lower loss.
    # After 1.2 million bytes with AdamW, tiny had a validation loss of 1.51 nats per byte with 64
    # positions and 1.62 with 128 (one run each).
    "tiny": GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=64, vocab_size=257, init="zero_residual"),
    "mini": GPT2Config(n_layer=6, n_head=6, n_embd=384, n_positions=128, vocab_size=257, init="zero_residual"),
    # small is for one's own text on a CPU, with GPT-2's vocabulary. For about the same FLOPs a width of 256 read
    # 164 thousand tokens of Python and 192 read 225 thousand: validation losses 3.41 and 3.33 (one run each).
    "small": GPT2Config(n_layer=6, n_head=6, n_embd=192, n_positions=256, init="zero_residual"),
    "gpt2": GPT2Config(12, 12, 768),
    "gpt2-medium": GPT2Config(24, 16, 1024),
    "gpt2-large": GPT2Config(36, 20, 1280),
    "gpt2-xl": GPT2Config(48, 25, 1600),
    "gpt3-small": _gpt3(12, 768, 12),
    "gpt3-medium": _gpt3(24, 1024, 16),
    "gpt3-large": _gpt3(24, 1536, 16),
    "gpt3-xl": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name, in the order of GPT2.named_parameters().

    The names are those of the released weights. wte has the padded vocabulary's Vp rows; the tied
    head is not listed.
    """
    C = config.n_embd
    block = {
        "ln_1": (C,),
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.padded_vocab_size, C),
        "wpe.weight": (config.n_positions, C),
    }
    modules = [(f"h.{i}.{name}", shape) for i in range(config.n_layer) for name, shape in block.items()]
    for name, shape in [*modules, ("ln_f", (C,))]:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def num_parameters(config: GPT2Config, *, padded: bool = True) -> int:
    """Number of parameters, the tied head counted once.

    padded=False leaves out the vocabulary's padding rows, which gives the published counts.
    """
    shapes = parameter_shapes(replace(config, n_layer=1))  # all blocks are alike
    total = sum((config.n_layer if name.startswith("h.") else 1) * math.prod(shape) for name, shape in shapes.items())
    return total if padded else total - (config.padded_vocab_size - config.vocab_size) * config.n_embd


# Activations that one block stores, in widths C per token. Without recomputation: the inputs of both
# LayerNorms, their outputs, q, k and v, attention's output, and GELU's input and output of 4 C each.
# "attention" leaves out four of them, "block" stores the block's two inputs only.
STORED_WIDTHS = {"none": 16, "attention": 12, "block": 2}


def flops_per_token(config: GPT2Config, context: int) -> int:
    """FLOPs of one token's forward and backward pass: 6 (N - wpe) + 12 L C T, with T = context.

    N counts every parameter once, the padded vocabulary included. wpe is left out because it is
    only looked up. The second term is attention, counted as if it were not causal, and as if a
    sequence were one document.
    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    C, L = config.n_embd, config.n_layer
    return 6 * (num_parameters(config) - config.n_positions * C) + 12 * L * C * context
