"""Owner of each of Muon's matrices, and the rows of it that a process holds under FSDP2. Free of PyTorch."""

from collections.abc import Sequence


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


def share(rows: int, rank: int, size: int) -> int:
    """How many of a matrix's rows a rank holds under FSDP2, which cuts it as torch.chunk does."""
    each = -(-rows // size)
    return max(0, min(each, rows - rank * each))
