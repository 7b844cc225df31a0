"""Gradient of a matrix that is both embedding and head, added up in one place.

The head's gradient is a whole matrix. The embedding's is zero but for the rows that were read. As a
matrix of its own it would be filled with zeros and then added: 16 bytes of memory traffic per element
of the matrix, against those of the rows alone.
"""

import torch
from torch import Tensor


def split(weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """The matrix as the embedding and as the head take it, whose gradients Tied adds up in place.

    None for the embedding: it reads the matrix itself. So it is anywhere but on an uncompiled CPU.
    """
    return Tied.apply(weight) if weight.is_cpu and not torch.compiler.is_compiling() else (None, weight)


class Tied(torch.autograd.Function):
    """weight -> weight for F.embedding(sparse=True), weight for the head. Use each once.

    In backward the sparse gradient is added into the head's, which nothing else may hold.
    """

    @staticmethod
    def forward(ctx, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, sparse: Tensor | None, dense: Tensor | None) -> Tensor | None:
        if sparse is None or dense is None:
            return dense if sparse is None else sparse.to_dense()
        return dense.add_(sparse)
