"""Owner of each of Muon's matrices, its work, and the rows that a process holds under FSDP2. Free of PyTorch."""

from collections import Counter
from collections.abc import Sequence

from model.presets import GPT2Config, parameter_shapes

NUM_QUINTICS = 5  # in a row, of engine.optim.muon


def parts(name: str) -> int:
    """Matrices in a weight of this name: c_attn's is three, of q, k and v, one above the other."""
    return 3 if name.endswith("attn.c_attn.weight") else 1


def work(shape: Sequence[int], parts: int) -> int:
    """In proportion to the FLOPs of a quintic for the matrices in a parameter: x x^T, G G and P x."""
    small, large = sorted((shape[0] // parts, shape[1]))
    return parts * small**2 * (2 * large + small)


def assign(costs: list[int], size: int) -> list[int]:
    """Owner of each matrix: the largest comes first, and each goes to the rank with the least work."""
    owners, loads = [0] * len(costs), [0] * size
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = rank = loads.index(min(loads))
        loads[rank] += costs[index]
    return owners


def matrices(model: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Shapes of Muon's weights: the matrices of the blocks."""
    return {name: shape for name, shape in parameter_shapes(model).items() if name.startswith("h.") and len(shape) == 2}


def flops(model: GPT2Config, size: int) -> int:
    """FLOPs of orthogonalising on a GPU, per step, of the rank that owns most of so many that share them."""
    costs, loads = [work(shape, parts(name)) for name, shape in matrices(model).items()], Counter()
    for owner, cost in zip(assign(costs, min(size, len(costs))), costs, strict=True):
        loads[owner] += cost
    return 2 * NUM_QUINTICS * max(loads.values())


def share(rows: int, rank: int, size: int) -> int:
    """How many of a matrix's rows a rank holds under FSDP2, which cuts it as torch.chunk does."""
    each = -(-rows // size)
    return max(0, min(each, rows - rank * each))
