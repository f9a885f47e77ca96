"""Who sends which expert to whom in one layer and step. E = experts, D = ranks."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


class Message(NamedTuple):
    """One expert's row on its way between two ranks; one of them is the rank whose `Moves` these are."""

    expert: int
    source: int
    destination: int
    turn: int
    """How many messages of the same phase go to the same destination before this one; both ends know it."""


Phase = list[Message]
"""Messages in canonical order that need nothing of one another, only the phases before."""


@dataclass(frozen=True, eq=False)
class Moves:
    """One layer's movement in one step, the same on every rank but for whose messages it lists.

    Messages are in canonical order, (expert, rank), so that both ends of every pair agree without a word.
    """

    owners: np.ndarray
    """int64 [E]: the rank that owns each expert."""
    extra: np.ndarray
    """uint8 [E, D]: 1 where a copy has to come to; never the owner's entry."""
    rank: int
    nodes: tuple[int, ...]
    """Node of each of the D ranks."""

    @classmethod
    def of(cls, owners: np.ndarray, extra: np.ndarray, rank: int, nodes: Sequence[int]) -> "Moves":
        """
        Raises:
            ValueError: shapes or dtypes that do not fit, an owner that is no rank, or a copy for the owner itself.
        """
        owners, extra = np.asarray(owners), np.asarray(extra)
        if owners.ndim != 1 or owners.dtype != np.int64:
            raise ValueError(f"owners must be int64 [E], got {owners.dtype} {list(owners.shape)}")
        if extra.dtype != np.uint8 or extra.shape != (len(owners), len(nodes)):
            raise ValueError(
                f"extra must be uint8 {[len(owners), len(nodes)]} to go with {len(owners)} owners and {len(nodes)} "
                f"ranks, got {extra.dtype} {list(extra.shape)}"
            )
        if not 0 <= rank < len(nodes):
            raise ValueError(f"rank {rank} is not one of the {len(nodes)} ranks that nodes lists")
        wrong = np.flatnonzero((owners < 0) | (owners >= len(nodes)))
        if len(wrong):
            raise ValueError(f"owners[{wrong[0]}] is {owners[wrong[0]]}: there are {len(nodes)} ranks")
        wrong = np.flatnonzero(extra[np.arange(len(owners)), owners])
        if len(wrong):
            expert = wrong[0]
            raise ValueError(f"extra[{expert}, {owners[expert]}] is the owner's entry: it holds its expert anyway")
        return cls(owners, extra, rank, tuple(nodes))

    @cached_property
    def num_copies(self) -> int:
        """Copies in the whole layer, of all ranks; 0: nobody sends anything."""
        return int(np.count_nonzero(self.extra))

    @cached_property
    def received(self) -> list[int]:
        """Experts whose copies come to this rank, ascending."""
        return np.flatnonzero(self.extra[:, self.rank]).tolist()

    @cached_property
    def sent(self) -> list[int]:
        """Experts of this rank of which others get copies, ascending."""
        return np.flatnonzero((self.owners == self.rank) & self.extra.any(axis=1)).tolist()

    @cached_property
    def outward(self) -> Phase:
        """Every copy straight from its owner."""
        return self._mine(self._pairs, self.owners[self._pairs[:, 0]], self._pairs[:, 1])

    @cached_property
    def homeward(self) -> Phase:
        """Every copy's gradient straight to its owner."""
        return self._mine(self._pairs, self._pairs[:, 1], self.owners[self._pairs[:, 0]])

    @cached_property
    def outward_by_node(self) -> list[Phase]:
        """To the owner's node and one leader in each other node, then from the leaders to their nodes."""
        first, second = self._hops
        return [self._mine(hop, hop[:, 1], hop[:, 2]) for hop in (first, second)]

    @cached_property
    def homeward_by_node(self) -> list[Phase]:
        """To the owner from its own node and to the leaders from theirs, then from the leaders to the owner.

        So an owner adds its own node's copies by rank, then the other nodes' sums by node.
        """
        first, second = self._hops
        own_node = self._node_of(first[:, 1]) == self._node_of(first[:, 2])
        near = np.concatenate([first[own_node], second])
        near = near[np.lexsort((near[:, 2], near[:, 0]))]
        far = first[~own_node]
        far = far[np.lexsort((self._node_of(far[:, 2]), far[:, 0]))]
        return [self._mine(hop, hop[:, 2], hop[:, 1]) for hop in (near, far)]

    @cached_property
    def _pairs(self) -> np.ndarray:
        """int64 [copies, 2]: (expert, holder) of every copy."""
        return np.argwhere(self.extra)

    @cached_property
    def _hops(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [., 3] each: (expert, from, to) of the copies that owners send and of those that leaders send on.

        Leader of a remote node's copies: of their holders the one with the fewest experts to lead so far, then the lowest.
        """
        led = [0] * len(self.nodes)
        first, second = [], []
        for expert in np.flatnonzero(self.extra.any(axis=1)).tolist():
            owner = int(self.owners[expert])
            by_node: defaultdict[int, list[int]] = defaultdict(list)
            for holder in np.flatnonzero(self.extra[expert]).tolist():
                by_node[self.nodes[holder]].append(holder)
            first += [(expert, owner, holder) for holder in by_node.pop(self.nodes[owner], [])]
            for _, holders in sorted(by_node.items()):
                leader = min(holders, key=lambda holder: (led[holder], holder))
                led[leader] += 1
                first.append((expert, owner, leader))
                second += [(expert, leader, holder) for holder in holders if holder != leader]
        return np.array(first, np.int64).reshape(-1, 3), np.array(second, np.int64).reshape(-1, 3)

    def _node_of(self, ranks: np.ndarray) -> np.ndarray:
        return np.asarray(self.nodes)[ranks]

    def _mine(self, hops: np.ndarray, source: np.ndarray, destination: np.ndarray) -> Phase:
        """This rank's messages; column 0 of `hops` is the expert."""
        order = np.argsort(destination, kind="stable")
        counts = np.bincount(destination, minlength=len(self.nodes))
        turn = np.empty(len(hops), np.int64)
        turn[order] = np.arange(len(hops)) - np.repeat(np.cumsum(counts) - counts, counts)
        mine = (source == self.rank) | (destination == self.rank)
        columns = np.stack([hops[:, 0], source, destination, turn], axis=1)[mine]
        return [Message(*row) for row in columns.tolist()]
