"""The plan of bench.gpu: its parts in order of priority, and the seconds that each is given. Free of PyTorch.

The first call comes as far as nine minutes go: ceilings, correctness of the kernels, the headline (ours, compiled,
against its compiled peers), agreement of the losses, eager steps, every kernel, and some of the rest.
`--resume` or `--only` does what is left.
"""

from typing import NamedTuple


class Part(NamedTuple):
    """One line of the plan."""

    section: str
    name: str
    seconds: float  # it is not begun with less left: compilation included, generous

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"


OPS = {
    "attention": ("attention", "separate q, k, v"),
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "gelu": ("gelu", "bias_gelu"),
    "cross_entropy": ("linear_cross_entropy",),
}

# Training steps: part -> precision and contestants, ours first. "triton" and "torch" are this project's model on
# either backend, the others are its peers; those of one part are timed in turns.
PEERS = ("reference", "transformers")
STEPS = {
    "bf16 compiled": ("bf16", ("triton compiled", "reference compiled", "transformers compiled")),
    "bf16 eager": ("bf16", ("triton eager", "torch eager", "reference eager", "transformers eager")),
    "bf16 torch compiled": ("bf16", ("torch compiled",)),
    "fp16 compiled": ("fp16", ("triton compiled",)),
    "tf32 compiled": ("tf32", ("triton compiled",)),
}

# In order of priority: what no longer fits is left out, and the next part is tried.
PLAN = (
    Part("ceilings", "matmul and copy", 20),
    Part("accuracy", "attention", 45),
    *(Part("accuracy", op, 15) for op in ("layer_norm", "add_layer_norm", "gelu", "bias_gelu")),
    Part("accuracy", "linear_cross_entropy", 20),
    Part("step", "bf16 compiled", 200),
    Part("loss", "fp32 eager", 45),
    Part("step", "bf16 eager", 75),
    Part("attention", "attention", 50),
    Part("attention", "separate q, k, v", 15),
    *(Part(section, op, 25) for section in ("layer_norm", "gelu") for op in OPS[section]),
    Part("cross_entropy", "linear_cross_entropy", 50),
    Part("tests", "kernel tests", 75),
    Part("batch", "triton eager", 45),
    Part("step", "bf16 torch compiled", 70),
    Part("step", "fp16 compiled", 70),
    Part("step", "tf32 compiled", 80),
    Part("sizes", "gpt2-medium", 100),
    Part("sizes", "gpt2-large", 140),
    Part("sizes", "gpt2-xl", 190),
    Part("batch", "reference compiled", 150),
)
SECTIONS = tuple(dict.fromkeys(part.section for part in PLAN))
