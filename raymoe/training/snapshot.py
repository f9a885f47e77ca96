"""Snapshots in memory: every rank keeps one of its own state, and its buddy another of the part that nobody else has: its experts,
and its shards of the dense parameters if those are sharded.

Two generations take turns, and the older one stays until all ranks have said that the newer one is complete. A buddy on the
same node maps the memory, which outlives its owner; to another node the bytes are sent, behind the training's back.
Lost owners restored from buddies: design of raymoe; the idea of in-memory checkpoints is Gemini's (SOSP 2023).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from raymoe.placement import buddies
from raymoe.training.placing import Commits
from raymoe.training.shadow import Key, Layout, Shadow
from raymoe.training.state import TrainerState
from raymoe.training.world import World

logger = logging.getLogger("raymoe")

_SPARE = 1.05
"""Room for the few more experts that a re-sharding may bring, before memory is taken anew."""


class SnapshotsLost(RuntimeError):
    """No snapshot is complete among the living; names whose part is missing."""


@dataclass(frozen=True)
class Held:
    """A complete snapshot of one worker in the memory of one."""

    member: int
    """Whose state it is."""
    step: int
    """Steps done."""
    epoch: int
    members: tuple[int, ...]
    """Of that epoch, in the order of its ranks."""


@dataclass(frozen=True)
class FromSnapshots:
    """All ranks go back to a snapshot."""

    step: int
    epoch: int
    """In which it was taken."""
    members: tuple[int, ...]
    """Of that epoch, in the order of its ranks."""
    holders: dict[int, int]
    """For every member of that epoch the living one that holds its part; itself where it lives."""


class Snapshots:
    """One a process; lives from epoch to epoch."""

    def __init__(self) -> None:
        self._own: list[Shadow | None] = [None, None]
        self._wards: dict[tuple[int, int], Shadow] = {}
        """By member and generation."""
        self._keys: dict[tuple[int, int], list[int]] = {}
        """What each mapped shadow was mapped from."""
        self._kept: int | None = None
        """The generation that all ranks have."""
        self._pending: tuple[int, Future[None]] | None = None
        self._commits = Commits()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self.last_take_s = 0.0
        """How long training stood still for the last one."""
        self.last_sent_bytes = 0

    @property
    def agreed(self) -> int | None:
        """Steps done at the newest snapshot of this epoch that all ranks have; None: there is none."""
        return self._commits.agreed if self._commits.agreed >= 0 else None

    def attach(self, world: World, epoch: int, commits: Commits) -> None:
        """An epoch begins. What was kept before stays until its first snapshot is complete everywhere.

        Args:
            commits: what ranks agree through in each step.
        """
        self._world, self._epoch, self._commits = world, epoch, commits
        self._pending = None
        of = buddies(world.nodes)
        self._buddy = of[world.rank]
        self._ward_ranks = [rank for rank, buddy in enumerate(of) if buddy == world.rank]

    def restored(self, step: int, epoch: int) -> None:
        """All ranks went back to this snapshot: it stays until there is a newer one."""
        for generation, shadow in enumerate(self._own):
            if shadow is not None and shadow.step == step and shadow.index().epoch == epoch:
                self._kept = generation

    def take(self, state: TrainerState, *, is_agreed: bool = False) -> bool:
        """Takes one, at a step boundary; every rank calls it at the same steps. Sending goes on behind.

        Args:
            is_agreed: somebody has seen all ranks come out of `wait`, so the one before is everywhere.

        Returns:
            False: none was taken, because the one before is not yet everywhere; all ranks find the same.

        Raises:
            RuntimeError: the one before could not be sent.
        """
        if self._pending is not None:
            step, sharing = self._pending
            if sharing.done():
                sharing.result()
            if not is_agreed and self._commits.agreed < step:
                return False
            self._settle()
        started = time.perf_counter()
        generation = 0 if self._kept is None else 1 - self._kept
        step, layout, tensors = self._layout(state)
        shadow = self._memory(generation, layout.num_bytes)
        shadow.write(step, layout, tensors)
        self.last_take_s = time.perf_counter() - started
        self._pending_generation = generation
        self._pending = step, self._thread.submit(self._share, self._world, shadow, generation, step, self._commits)
        return True

    def held(self) -> list[Held]:
        """All complete snapshots in this process' memory."""
        found = []
        for shadow in self._all():
            step = shadow.step
            if step is not None:
                index = shadow.index()
                found.append(Held(index.member, step, index.epoch, index.members))
        return found

    def shadow(self, member: int, step: int, epoch: int) -> Shadow:
        """A snapshot that `held` named."""
        for shadow in self._all():
            if shadow.step == step:
                index = shadow.index()
                if (index.member, index.epoch) == (member, epoch):
                    return shadow
        raise KeyError(f"no snapshot of worker {member} at step {step} of epoch {epoch} is here")

    def num_bytes(self) -> dict[str, int]:
        """Host memory, by whose state it holds; what is mapped belongs to its owner."""
        received = [shadow for key, shadow in self._wards.items() if key not in self._keys]
        return {
            "own snapshots": sum(shadow.num_bytes for shadow in self._own if shadow is not None),
            "others' snapshots": sum(shadow.num_bytes for shadow in received),
        }

    def wait(self) -> None:
        """Returns when the last one is with the buddy. Raises: what broke it."""
        if self._pending is not None:
            self._pending[1].result()

    def _all(self) -> list[Shadow]:
        return [shadow for shadow in [*self._own, *self._wards.values()] if shadow is not None]

    def _settle(self) -> None:
        """The last one is everywhere: what is older may go."""
        self._kept, self._pending = self._pending_generation, None
        wards = {self._world.members[rank] for rank in self._ward_ranks}
        for key in [key for key in self._wards if key[0] not in wards]:
            del self._wards[key]
            self._keys.pop(key, None)

    def _layout(self, state: TrainerState) -> tuple[int, Layout, Mapping[Key, Tensor]]:
        common = state.common()
        step = common["next_step"]
        assert isinstance(step, int)
        experts: dict[Key, Tensor] = {
            ("expert", *place, kind): row for place, rows in state.experts().items() for kind, row in rows.items()
        }
        dense = state.dense()
        shards: dict[Key, Tensor] = {
            ("shard", name): tensor.to_local() for name, tensor in dense.items() if isinstance(tensor, DTensor)
        }
        private: dict[Key, Tensor] = {
            ("dense", name): tensor for name, tensor in dense.items() if not isinstance(tensor, DTensor)
        }
        private |= {("own", name): tensor for name, tensor in state.own().items()}
        world, shared = self._world, experts | shards
        layout = Layout.of(self._epoch, world.members, world.members[world.rank], common, shared, private)
        return step, layout, shared | private

    def _memory(self, generation: int, num_bytes: int) -> Shadow:
        shadow = self._own[generation]
        if shadow is None or shadow.num_bytes < num_bytes:
            if shadow is not None:
                shadow.close()
            shadow = Shadow.of_size(int(num_bytes * _SPARE), is_shared=True)
            self._own[generation] = shadow
        return shadow

    def _share(self, world: World, shadow: Shadow, generation: int, step: int, commits: Commits) -> None:
        """Lets the buddy have what it keeps, takes what the wards give, and says that it is done."""
        size = 6
        told = torch.tensor(
            [os.getpid(), -1 if shadow.descriptor is None else shadow.descriptor, shadow.inode, shadow.index_bytes,
             len(shadow.shared), generation]
        )  # fmt: skip
        heard = {rank: torch.zeros(size, dtype=torch.int64) for rank in self._ward_ranks}
        _exchange(world, {self._buddy: told}, heard)
        answers = {rank: torch.tensor([int(self._map(world, rank, *facts.tolist()))]) for rank, facts in heard.items()}
        answer = torch.ones(1, dtype=torch.int64)
        _exchange(world, answers, {self._buddy: answer})
        sends = {} if answer.item() else {self._buddy: shadow.shared}
        self.last_sent_bytes = sum(map(len, sends.values()))
        coming = {rank: facts.tolist() for rank, facts in heard.items() if not answers[rank].item()}
        receiving = {rank: self._receiver(world.members[rank], facts) for rank, facts in coming.items()}
        works = _post(world, sends, {rank: shadow.shared for rank, shadow in receiving.items()})
        for work in works:
            work.wait()
        for shadow_of_ward in receiving.values():
            shadow_of_ward.finish(step)
        commits.committed = step

    def _map(self, world: World, rank: int, *facts: int) -> bool:
        """Whether the ward's memory can be kept by mapping it."""
        *source, _, _, generation = facts
        pid, descriptor, inode = source
        key = world.members[rank], generation
        if descriptor < 0 or world.nodes[rank] != world.nodes[world.rank]:
            return False
        if self._keys.get(key) != source:
            try:
                self._wards[key] = Shadow.mapped(pid, descriptor, inode)
            except OSError as error:
                logger.debug("snapshot of worker %d is sent, not mapped: %s", key[0], error)
                return False
            self._keys[key] = source
        return True

    def _receiver(self, member: int, facts: list[int]) -> Shadow:
        """Memory for what a ward sends, which counts for nothing until it is whole."""
        *_, index_bytes, shared_bytes, generation = facts
        key = member, generation
        shadow = self._wards.get(key)
        if shadow is None or key in self._keys or shadow.num_bytes < Shadow.needed(shared_bytes):
            self._keys.pop(key, None)
            shadow = self._wards[key] = Shadow.of_size(int(Shadow.needed(shared_bytes) * _SPARE), is_shared=False)
        shadow.expect(index_bytes, shared_bytes)
        return shadow


def snapshot_interval(
    take_s: float, sent_bytes: int, bytes_s: float, overlap_percent: int, step_s: float, share: float
) -> int:
    """Steps between two snapshots, so that they take no more than `share` of the time.

    Args:
        take_s: seconds that training stands still for one.
        sent_bytes: that go to a buddy, at `bytes_s` bytes a second.
        overlap_percent: how much of a transfer goes beside computation and costs nothing.
    """
    cost_s = take_s + sent_bytes / bytes_s * (100 - overlap_percent) / 100
    return max(1, math.ceil(cost_s / (share * step_s)))


def choose_step(held: Mapping[int, Iterable[Held]]) -> FromSnapshots:
    """The newest snapshot that the living hold whole.

    Args:
        held: by member, what each of the living holds.

    Raises:
        SnapshotsLost: there is none; names whose part of the newest one is missing.
    """
    found: dict[tuple[int, int, tuple[int, ...]], dict[int, int]] = {}
    for holder in sorted(held):
        for each in held[holder]:
            holders = found.setdefault((each.step, each.epoch, each.members), {})
            if each.member == holder or each.member not in holders:
                holders[each.member] = holder
    for (step, epoch, members), holders in sorted(found.items(), reverse=True):
        # what all ranks have alike nobody keeps for another
        if set(members) <= holders.keys() and any(member == holder for member, holder in holders.items()):
            return FromSnapshots(step, epoch, members, holders)
    if not found:
        raise SnapshotsLost("nobody alive holds a snapshot")
    (step, _, members), holders = max(found.items())
    lost = sorted(set(members) - holders.keys())
    raise SnapshotsLost(
        f"nobody alive holds the part of worker{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}, lost with "
        f"{'their' if len(lost) > 1 else 'its'} buddy; the newest snapshot is of step {step}"
    )


def _exchange(world: World, sends: dict[Any, Tensor], receives: dict[Any, Tensor]) -> None:
    for work in _post(world, sends, receives):
        work.wait()


def _post(world: World, sends: dict[Any, Tensor], receives: dict[Any, Tensor]) -> list[dist.Work]:
    works = [dist.isend(tensor, rank, group=world.snapshots) for rank, tensor in sends.items() if rank is not None]
    works += [dist.irecv(tensor, rank, group=world.snapshots) for rank, tensor in receives.items() if rank is not None]
    return [work for work in works if work is not None]
