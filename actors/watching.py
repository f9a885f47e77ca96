"""What the keeper watches while an epoch runs: whether workers still answer, and who is about to go."""

import time
from collections.abc import Iterable
from contextlib import suppress

import ray
from ray.exceptions import RayError

from raymoe.actors.orders import EpochOrder, WorkerState
from raymoe.actors.ray_private import draining_nodes
from raymoe.actors.roster import Roster
from raymoe.actors.wishes import Wishes

_BEAT_S = 0.5


class Watching:
    """Asks every worker for its state now and then.

    Args:
        limit_s: a worker that has not answered for so long hangs.
    """

    def __init__(self, limit_s: float, roster: Roster, wishes: Wishes):
        self._limit_s, self._roster, self._wishes = limit_s, roster, wishes
        self.states: dict[int, WorkerState] = {}
        """The last that each one said."""
        self._asked: dict[ray.ObjectRef, tuple[int, float]] = {}
        self._next_s = 0.0
        self._draining: set[str] = set()

    def begin(self, order: EpochOrder) -> None:
        """An epoch begins: what is heard from now on counts."""
        self._asked, self._next_s = {}, 0.0
        self.states = {member: state for member, state in self.states.items() if member in order.members}

    def hung(self, members: Iterable[int]) -> list[int]:
        """Those of the workers that do not answer; asks all of them anew when it is time."""
        now = time.monotonic()
        waiting = list(self._asked)
        for ref in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else []:
            member, _ = self._asked.pop(ref)
            # a death is seen where its work is awaited
            with suppress(RayError):
                self.states[member] = ray.get(ref)
        if now >= self._next_s:
            self._next_s = now + _BEAT_S
            silent = {member for member, _ in self._asked.values()}
            for ref, member in self._roster.call(set(members) - silent, "state").items():
                self._asked[ref] = member, now
            self._draining = draining_nodes()
        return [
            member for member, since in self._asked.values() if now - since > self._limit_s and member in set(members)
        ]

    def leaving(self, order: EpochOrder) -> list[int]:
        """Members that are to go: their node drains, they were told to end, or there are more than wanted."""
        nodes = self._leaving_nodes()
        states = {member: self.states.get(member) for member in order.members}
        gone = [member for member, state in states.items() if state and (state.is_leaving or state.node in nodes)]
        staying = [member for member in order.members if member not in gone]
        return [*gone, *staying[self._wishes.most :]]

    def leave_room(self, members: Iterable[int]) -> bool:
        """Whether others could take the place of one of these: not all of their nodes go too."""
        return any(
            state.node not in self._leaving_nodes()
            for member in members
            if (state := self.states.get(member)) is not None
        )

    def _leaving_nodes(self) -> set[str]:
        return self._draining | self._wishes.leaving_nodes
