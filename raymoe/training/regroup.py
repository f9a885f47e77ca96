"""A trainer's way into a new epoch: other ranks, other owners, the same state.

Dense parameters that FSDP2 has sharded are bound to their ranks: they come into an epoch in a fresh trainer, from a snapshot.

L MoE layers, E experts a layer, D ranks of the new epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from raymoe.placement import Base, owners_after
from raymoe.training.dense import ReplicatedDense
from raymoe.training.placing import Placing, first_base
from raymoe.training.pool import Place
from raymoe.training.publication import Publication
from raymoe.training.reshard import move_experts
from raymoe.training.shadow import Key
from raymoe.training.snapshot import FromSnapshots, Snapshots
from raymoe.training.state import TrainerState
from raymoe.training.trainer import Trainer
from raymoe.training.world import World

_Parts = dict[int, dict[Key, Tensor]]
"""By member, what of its snapshot is kept by somebody beside it, as far as this rank is who gives it."""

_IN_FLIGHT_BYTES = 64 << 20
"""Of experts under way to or from a rank at once."""


@dataclass(frozen=True)
class Live:
    """All ranks that were there before hold the state of the same step; those that are new hold none."""

    survivors: tuple[int | None, ...]
    """For each new rank the one it had, or None."""


def evacuate(trainer: Trainer, leaving: list[int]) -> int:
    """Moves all experts off some ranks, which are about to leave; all ranks call it between steps.

    Returns:
        Experts that moved.
    """
    placing, size = trainer.placing, trainer.world.size
    staying = [rank for rank in range(size) if rank not in leaving]
    owners = np.array(staying)[owners_after(placing.base.owners, staying)]
    # replicas beside the owners are made anew in the next epoch
    placing.base = Base.of_owners(owners, size)
    return move_experts(trainer.experts, placing.base)


def enter_epoch(
    trainer: Trainer, world: World, publication: Publication, source: Live | FromSnapshots, snapshots: Snapshots
) -> None:
    """Makes a trainer a rank of `world`; all ranks call it, before the first step there. One whose dense parameters are sharded has
    been made in that world, and comes from a snapshot.

    Experts keep their homes as far as an even split allows; parameters, masters and moments arrive bit for bit, and so do
    history, step and, where a snapshot is the source, the random generators.

    Args:
        publication: what the ranks plan from at first.
        snapshots: what this process holds.

    Raises:
        RuntimeError: a collective broke. Snapshots are as they were; the trainer is of no use until it enters another epoch.
    """
    if isinstance(source, Live):
        _enter_live(trainer, world, publication, source)
    else:
        _enter_snapshot(trainer, world, publication, source, snapshots)
        snapshots.restored(source.step, source.epoch)
    trainer.experts.optimizer.refresh(trainer.experts.pool.slots.values())
    trainer.dense.refresh()


def _enter_live(trainer: Trainer, world: World, publication: Publication, source: Live) -> None:
    is_new = source.survivors[world.rank] is None
    teacher = next(rank for rank, old in enumerate(source.survivors) if old is not None)
    common = _shared(TrainerState(trainer).common() if world.rank == teacher else None, teacher, world)
    owners: Any = common["owners"]
    resident: Any = common["resident"]
    _bind(trainer, world)
    # where experts are now, in the numbers of the new ranks
    new_of = {old: rank for rank, old in enumerate(source.survivors) if old is not None}
    before = np.zeros((*owners.shape, world.size), dtype=np.uint8)
    for old, rank in new_of.items():
        before[:, :, rank] = resident[:, :, old]
    held_by = np.vectorize(lambda old: new_of.get(int(old), -1), otypes=[np.int64])(owners)
    held_by = np.where(held_by < 0, before.argmax(axis=2), held_by)
    assert before.any(axis=2).all(), "who leaves has given its experts away"
    trainer.experts.rehome(Base(held_by, before))
    after = first_base(publication, owners_after(owners, source.survivors), world)
    move_experts(trainer.experts, after)
    _place(trainer, publication, after, common)
    if is_new or None in source.survivors:
        _replicated(trainer).broadcast(teacher)


def _enter_snapshot(
    trainer: Trainer, world: World, publication: Publication, source: FromSnapshots, snapshots: Snapshots
) -> None:
    member = world.members[world.rank]
    has_own = [source.holders.get(each) == each for each in world.members]
    teacher = has_own.index(True)
    own = snapshots.shadow(member, source.step, source.epoch) if has_own[world.rank] else None
    common = _shared(own.index().common if world.rank == teacher and own is not None else None, teacher, world)
    owners: Any = common["owners"]
    resident: Any = common["resident"]
    _bind(trainer, world)
    survivors = [source.members.index(each) if each in source.members else None for each in world.members]
    after = first_base(publication, owners_after(owners, survivors), world)
    trainer.experts.rehome(after)
    _place(trainer, publication, after, common)
    parts = {
        each: snapshots.shadow(each, source.step, source.epoch).shared_tensors()
        for each, holder in source.holders.items()
        if holder == member
    }
    _restore_experts(trainer, source, resident, parts)
    dense = trainer.dense.tensors()
    is_sharded = any(isinstance(tensor, DTensor) for tensor in dense.values())
    if is_sharded:
        _restore_shards(dense, world, source, parts)
    if own is not None:
        kept = own.tensors()
        for name, tensor in dense.items() if not is_sharded else ():
            tensor.copy_(kept["dense", name])
        state = TrainerState(trainer)
        for name, tensor in state.own().items():
            tensor.copy_(kept["own", name])
        state.apply_generators()
    if not is_sharded and not all(has_own):
        _replicated(trainer).broadcast(teacher)


def _restore_shards(dense: dict[str, Tensor], world: World, source: FromSnapshots, parts: _Parts) -> None:
    """Puts each dense tensor together from the shards of the snapshot's ranks, and keeps this rank's of today."""
    rank_of = {each: rank for rank, each in enumerate(world.members)}
    for name, tensor in dense.items():
        assert isinstance(tensor, DTensor), "all of them are sharded or none"
        shard, pieces = tensor.to_local(), []
        for each, rows in zip(source.members, _rows(tensor.shape[0], len(source.members)), strict=True):
            holder = rank_of[source.holders[each]]
            if holder == world.rank:
                piece = parts[each]["shard", name].to(shard.device)
            else:
                piece = torch.empty((rows, *tensor.shape[1:]), dtype=shard.dtype, device=shard.device)
            if rows:
                dist.broadcast(piece, holder, group=world.dense)
            pieces.append(piece)
        shard.copy_(torch.cat(pieces).split(_rows(tensor.shape[0], world.size))[world.rank])


def _rows(num_rows: int, num_ranks: int) -> list[int]:
    """How many of a tensor's rows FSDP2 gives to each rank: as `torch.chunk` does, and none to those that come away empty."""
    most = -(-num_rows // num_ranks)
    return [max(0, min(most, num_rows - rank * most)) for rank in range(num_ranks)]


def _restore_experts(trainer: Trainer, source: FromSnapshots, resident: np.ndarray, parts: _Parts) -> None:
    """Writes every expert that lives here from the snapshot that holds it, wherever that is."""
    world, experts = trainer.world, trainer.experts
    rank_of = {each: rank for rank, each in enumerate(world.members)}
    kinds = experts.optimizer.tensors()
    batch = _Batch(world)
    for layer, expert in np.ndindex(*resident.shape[:2]):
        place: Place = (layer, expert)
        keepers = [source.members[rank] for rank in np.flatnonzero(resident[layer, expert])]
        homes = np.flatnonzero(experts.base.resident[layer, expert]).tolist()
        for home in homes:
            # from its own memory if that has it
            keeper = next((each for each in keepers if rank_of[source.holders[each]] == home), keepers[0])
            holder = rank_of[source.holders[keeper]]
            for kind, rows in kinds.items():
                key: Key = ("expert", *place, kind)
                target = rows[experts.pool.slots[place]] if home == world.rank else None
                batch.move(parts[keeper][key] if holder == world.rank else None, target, holder, home)
    batch.finish()


class _Batch:
    """Rows on their way between ranks, in one order on all of them, and only so many bytes at a time."""

    def __init__(self, world: World):
        self._world = world
        self._sends: list[dist.P2POp] = []
        self._arrivals: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0

    def move(self, row: Tensor | None, target: Tensor | None, holder: int, home: int) -> None:
        """One row [C]: from `row` at the holder to `target` at its home."""
        if row is not None and target is not None:
            target.copy_(row)
            return
        world = self._world
        if row is not None:
            on_device = row.to(world.device)
            self._sends.append(dist.P2POp(dist.isend, on_device, home, world.experts))
            world.sent("restore", home, row.nbytes)
            self._bytes += row.nbytes
        elif target is not None:
            room = torch.empty_like(target)
            self._sends.append(dist.P2POp(dist.irecv, room, holder, world.experts))
            self._arrivals.append((room, target))
            self._bytes += target.nbytes
        if self._bytes > _IN_FLIGHT_BYTES:
            self.finish()

    def finish(self) -> None:
        """Waits for all that is under way here."""
        for work in dist.batch_isend_irecv(self._sends) if self._sends else []:
            work.wait()
        for room, target in self._arrivals:
            target.copy_(room)
        self._sends, self._arrivals, self._bytes = [], [], 0


def _bind(trainer: Trainer, world: World) -> None:
    """Every part of the trainer talks through the new world."""
    if trainer.world is world:
        return
    dense = _replicated(trainer)
    trainer.world = world
    trainer.experts.bind(world)
    dense.bind(world)


def _replicated(trainer: Trainer) -> ReplicatedDense:
    assert isinstance(trainer.dense, ReplicatedDense), "sharded parameters come in a fresh trainer"
    return trainer.dense


def _place(trainer: Trainer, publication: Publication, base: Base, common: dict[str, Any]) -> None:
    """Planning goes on where `common` says that it stood, from where experts live now."""
    trainer.placing = placing = Placing(publication, base, trainer.world, trainer.config.reshard_every)
    placing.history.extend(common["history"])
    placing.steps_since_reshard = common["steps_since_reshard"]
    trainer.next_step = common["next_step"]


def _shared(common: dict[str, Any] | None, teacher: int, world: World) -> dict[str, Any]:
    box: list[Any] = [common]
    dist.broadcast_object_list(box, teacher, group=world.snapshots)
    return box[0]
