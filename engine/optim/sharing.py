"""Muon's work, shared among processes: each matrix has an owner, which orthogonalises it.

DDP: every process holds whole matrices, and the owners broadcast their results. FSDP2: it holds some
rows of each, sends them to the owners and gets the same rows of the results back. hsdp: as FSDP2,
within each replica, so replicas stay alike on devices of one kind only. engine.planning.owners says who owns which.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from engine.planning.owners import share


class Peers:
    """Processes that share the work. group: None if this one works alone.

    Every process calls both functions with the same matrices in the same order, so that all make the
    same collectives.
    """

    def __init__(self, group: dist.ProcessGroup | None, is_sharded: bool):
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.group, self.is_sharded = group, is_sharded and self.size > 1

    def collect(self, pieces: list[Tensor], rows: list[int], owners: list[int]) -> dict[int, Tensor]:
        """The whole matrices that this rank owns, by index.

        pieces: what this rank holds of each, (its rows, columns). rows: of each whole matrix.
        """
        owned = self._owned(owners)
        mine = owned[self.rank]
        if not self.is_sharded:
            return {index: pieces[index] for index in mine}
        sent = [[pieces[index] for index in theirs] for theirs in owned]
        counts = [[share(rows[index], rank, self.size) for index in mine] for rank in range(self.size)]
        columns = [pieces[index].shape[1] for index in mine]
        received = self._exchange(sent, [list(zip(each, columns, strict=True)) for each in counts], pieces[0])
        return {index: torch.cat(parts) for index, *parts in zip(mine, *received, strict=True)}

    def distribute(self, whole: dict[int, Tensor], pieces: list[Tensor], owners: list[int]) -> None:
        """Fills the pieces of every rank, in place, from the owners' whole matrices."""
        owned = self._owned(owners)
        if self.is_sharded:
            cut = [
                whole[index].split([share(len(whole[index]), rank, self.size) for rank in range(self.size)])
                for index in owned[self.rank]
            ]
            sent = [[parts[rank] for parts in cut] for rank in range(self.size)]
            received = self._exchange(
                sent, [[tuple(pieces[index].shape) for index in theirs] for theirs in owned], pieces[0]
            )
            for theirs, parts in zip(owned, received, strict=True):
                for index, part in zip(theirs, parts, strict=True):
                    pieces[index].copy_(part)
        elif self.size > 1:
            for rank, theirs in enumerate(owned):
                self._broadcast([pieces[index] for index in theirs], rank)

    def _owned(self, owners: list[int]) -> list[list[int]]:
        """Indices of the matrices of each rank."""
        return [[index for index, owner in enumerate(owners) if owner == rank] for rank in range(self.size)]

    def _broadcast(self, tensors: list[Tensor], source: int) -> None:
        """Copies one rank's tensors to the others in one collective. No tensors: none."""
        if not tensors:
            return
        sizes = [tensor.numel() for tensor in tensors]
        is_source = self.rank == source
        flat = torch.cat([t.flatten() for t in tensors]) if is_source else tensors[0].new_empty(sum(sizes))
        dist.broadcast(flat, group=self.group, group_src=source)
        if not is_source:
            for tensor, part in zip(tensors, flat.split(sizes), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _exchange(self, sent: list[list[Tensor]], shapes: list[list[tuple]], like: Tensor) -> list[list[Tensor]]:
        """Sends sent[r] to rank r. Returns what each rank sends here, in the shapes[r] of rank r."""
        flat = torch.cat([like.new_empty(0), *(tensor.flatten() for theirs in sent for tensor in theirs)])
        counts = [[rows * columns for rows, columns in theirs] for theirs in shapes]
        received = like.new_empty(sum(map(sum, counts)))
        to_each = [sum(tensor.numel() for tensor in theirs) for theirs in sent]
        dist.all_to_all_single(received, flat, [*map(sum, counts)], to_each, group=self.group)
        parts = iter(received.split([count for theirs in counts for count in theirs]))
        return [[next(parts).view(shape) for shape in theirs] for theirs in shapes]
