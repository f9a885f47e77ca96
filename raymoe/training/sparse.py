"""Sparse collectives: this step's copies go out, their gradients come home.

`sparse_all_gather` sends chosen experts from their owners to chosen ranks; `sparse_reduce_scatter` is its adjoint, the sum of
all copies' gradients at the owner. Batched point-to-point messages in one canonical order, (expert, rank), so that both ends
of every pair agree without a tag. Source: SparseAllGather and SparseReduceScatter of Hecate (arXiv 2502.02581, section 3).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.placement import LayerPlan
from raymoe.training.shard import ExpertShard
from raymoe.training.world import World


@dataclass(frozen=True)
class Transfers:
    """What one rank sends and receives for one layer, in canonical order. Gradients take the same ways back."""

    outgoing: list[tuple[int, int]]
    """(expert, rank) for each copy that this rank, the owner, sends."""
    incoming: list[tuple[int, int]]
    """(expert, owner) for each copy that this rank receives."""

    @classmethod
    def of(cls, plan: LayerPlan, rank: int) -> "Transfers":
        pairs = [(int(expert), int(holder)) for expert, holder in np.argwhere(plan.extra_copies())]
        owner = plan.owners
        return cls(
            outgoing=[(expert, holder) for expert, holder in pairs if owner[expert] == rank],
            incoming=[(expert, int(owner[expert])) for expert, holder in pairs if holder == rank],
        )

    @property
    def copies(self) -> list[int]:
        return [expert for expert, _ in self.incoming]


class Pending:
    """Messages under way. `wait` returns when they have arrived and the sums that hang on them are done."""

    def __init__(self, works: list[dist.Work], sums: list[tuple[Tensor, Tensor]]):
        self._works = works
        self._sums = sums

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        for total, addend in self._sums:
            total += addend
        self._works, self._sums = [], []


def sparse_all_gather(shard: ExpertShard, transfers: Transfers, world: World) -> Pending:
    """Starts to bring this step's copies of a layer into the pool's copy slots. No copies: no communication."""
    shard.place(transfers.copies)
    operations = [
        dist.P2POp(dist.isend, shard.pool[shard.slots[expert]], group=world.experts, group_peer=holder)
        for expert, holder in transfers.outgoing
    ] + [
        dist.P2POp(dist.irecv, shard.pool[shard.slots[expert]], group=world.experts, group_peer=owner)
        for expert, owner in transfers.incoming
    ]
    return _start(operations, [], "sparse_all_gather", world)


def sparse_reduce_scatter(shard: ExpertShard, transfers: Transfers, world: World) -> Pending:
    """Starts to send the copies' gradients to their owners, where `wait` adds them in the order of the ranks."""
    received = torch.empty(
        len(transfers.outgoing), shard.pool.shape[1], dtype=shard.pool.dtype, device=shard.pool.device
    )
    operations = [
        dist.P2POp(dist.isend, shard.gradient[shard.slots[expert]], group=world.experts, group_peer=owner)
        for expert, owner in transfers.incoming
    ] + [
        dist.P2POp(dist.irecv, row, group=world.experts, group_peer=holder)
        for row, (_, holder) in zip(received, transfers.outgoing, strict=True)
    ]
    sums = [
        (shard.gradient[shard.slots[expert]], row)
        for row, (expert, _) in zip(received, transfers.outgoing, strict=True)
    ]
    return _start(operations, sums, "sparse_reduce_scatter", world)


def _start(operations: list[dist.P2POp], sums: list[tuple[Tensor, Tensor]], kind: str, world: World) -> Pending:
    if not operations:
        return Pending([], [])
    world.moved_bytes[kind] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
    return Pending(dist.batch_isend_irecv(operations), sums)
