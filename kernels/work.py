"""Sizes of the ops, and the work that no version of an op avoids: FLOPs and bytes. Free of PyTorch.

FLOPs count a multiply and an add as two, and the causal half of attention once. Bytes count each
input of the definition read once and each output written once.
"""

from dataclasses import dataclass

Work = tuple[int, int]  # FLOPs, bytes
TRITON_HEAD_ROWS = 8192  # rows of logits that linear_cross_entropy's Triton version holds at once


@dataclass(frozen=True)
class Sizes:
    """B sequences of T positions, H heads of width D, V words padded to Vp."""

    B: int
    T: int
    H: int
    D: int
    V: int
    Vp: int

    @classmethod
    def of(cls, config, B: int, T: int | None = None) -> "Sizes":
        """A micro-batch of the model of a GPT2Config."""
        T = config.n_positions if T is None else T
        return cls(B, T, config.n_head, config.head_dim, config.vocab_size, config.padded_vocab_size)

    @property
    def N(self) -> int:  # noqa: N802
        """Rows."""
        return self.B * self.T

    @property
    def C(self) -> int:  # noqa: N802
        """Width of the residual stream; an MLP is four times as wide inside."""
        return self.H * self.D


def torch_head_elements(device_type: str, itemsize: int) -> tuple[int, int]:
    """Logits that linear_cross_entropy's PyTorch version holds at once, and how many in a softmax.

    Each chunk adds a pass over the weight's gradient and two over the weight. On a CPU 60 MB of
    float32 logits cost no time against 84 MB, and 42 MB cost 4% of the op's (C = 192, 1,024 rows, one
    thread of an AMD EPYC Milan). Their softmax needs no copy, so it takes all of them. Lower
    precision holds 84 MB, and 3.2 MB in float32 too. Elsewhere both take 1 GB in float32.
    """
    if device_type != "cpu":
        return 250_000_000, 250_000_000
    return (42_000_000, 800_000) if itemsize < 4 else (15_000_000, 15_000_000)


def work(op: str, sizes: Sizes, e: int, p: int | None = None) -> dict[str, Work]:
    """Forward and backward work of an op. e: bytes of an element; p: of an element of weight and bias, e by default."""
    op = "attention" if op == "attention_documents" else op
    p, B, T, C, Vp = p or e, sizes.B, sizes.T, sizes.C, sizes.Vp
    x, f = sizes.N * C, sizes.N * 4 * C  # elements of a stream, and inside the MLP
    product, factors = 2 * sizes.N * C * Vp, e * (x + Vp * C)
    forward, backward = {
        # Two products of T x T x D for each of H heads, halved; backward five. qkv -> out; dout, qkv, out -> dqkv.
        # Documents save some of it, how much depends on their lengths: counted as one document.
        "attention": ((2 * B * T * T * C, e * 4 * x), (5 * B * T * T * C, e * 8 * x)),
        # x, weight, bias -> y; dy, x, weight -> dx, dweight, dbias.
        "layer_norm": ((0, e * 2 * x + p * 2 * C), (0, e * 3 * x + p * 3 * C)),
        # x, residual, weight, bias -> y, summed; dy, dsummed, summed, weight -> dx (dresidual is it), dweight, dbias.
        "add_layer_norm": ((0, e * 4 * x + p * 2 * C), (0, e * 4 * x + p * 3 * C)),
        # x -> y; dy, x -> dx.
        "gelu": ((0, e * 2 * f), (0, e * 3 * f)),
        # x, bias -> y; dy, x, bias -> dx, dbias.
        "bias_gelu": ((0, e * 2 * f + p * 4 * C), (0, e * 3 * f + p * 8 * C)),
        # One product for the logits, two for the gradients of its factors.
        "linear_cross_entropy": ((product, factors + 8 * sizes.N), (2 * product, 2 * factors)),
    }[op]
    return {"forward": forward, "backward": backward, "both": tuple(map(sum, zip(forward, backward, strict=True)))}
