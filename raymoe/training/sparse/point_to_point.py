"""Transports made of point-to-point messages: straight between owner and copy, or once a node through a leader.

Source: SparseAllGather and SparseReduceScatter of Hecate (arXiv 2502.02581, section 3); the ways through leaders are the
two levels of hierarchical broadcast and reduction.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.training.sparse.moves import Message, Moves, Phase
from raymoe.training.sparse.pending import Pending, Steps, start
from raymoe.training.sparse.transport import Kind, Rows, check_rows
from raymoe.training.world import World

_num_started: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
"""Transfers so far in each group, the same number on all its ranks."""

_NUM_TAGS = 1 << 30


@dataclass(frozen=True)
class PointToPoint:
    """A message a copy, in one batch; where many gradients meet, in several, so that few wait beside their sum."""

    name: str
    outward: Callable[[Moves], list[Phase]]
    homeward: Callable[[Moves], list[Phase]]
    max_temporary_rows: int = 8
    """Gradients under way to one rank at a time, so rows that a reduction may take beside the caller's; at least 2."""

    def __post_init__(self) -> None:
        if self.max_temporary_rows < 2:
            raise ValueError(
                f"max_temporary_rows is {self.max_temporary_rows}; it must be at least 2: one row arrives "
                "while another is added"
            )

    def gather(self, moves: Moves, rows: Rows, world: World) -> Pending:
        return self._start(moves, rows, world, "sparse_all_gather")

    def reduce(self, moves: Moves, rows: Rows, world: World) -> Pending:
        return self._start(moves, rows, world, "sparse_reduce_scatter")

    def _start(self, moves: Moves, rows: Rows, world: World, kind: Kind) -> Pending:
        if not moves.num_copies:
            return Pending()
        check_rows(moves, rows)
        channel = _Channel.open(world, kind)
        if kind == "sparse_all_gather":
            phases = [[phase] for phase in self.outward(moves)]
            steps = _overwrite(phases, rows, channel)
        else:
            # half of the rows arrive while the other half is added
            batch_rows = self.max_temporary_rows // 2
            phases = [_batches(phase, batch_rows) for phase in self.homeward(moves)]
            steps = _add(phases, rows, channel)
        num_batches = sum(bool(batch) for batches in phases for batch in batches)
        return start(steps, world.device, in_background=num_batches > 1)


P2P = PointToPoint("p2p", lambda moves: [moves.outward], lambda moves: [moves.homeward])
HIERARCHICAL = PointToPoint("hierarchical", lambda moves: moves.outward_by_node, lambda moves: moves.homeward_by_node)
"""Each expert crosses to another node once, and each node sends its sum home once."""


def warm_up(world: World) -> None:
    """Lets every rank of the expert group talk to the next; call it on all of them before the first transfer.

    NCCL wants all ranks of a group in its first batch of point-to-point messages (pytorch#74701); plans do not promise that.
    """
    if world.size == 1:
        return
    ours, theirs = (torch.zeros(1, device=world.device) for _ in range(2))
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for work in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, ours, group=world.experts, group_peer=after),
            dist.P2POp(dist.irecv, theirs, group=world.experts, group_peer=before),
        ]
    ):
        work.wait()


@dataclass(frozen=True)
class _Channel:
    """Posts the messages of one transfer. gloo pairs messages by tag, so transfers cannot take each other's; NCCL by order."""

    world: World
    kind: Kind
    tag: int

    @classmethod
    def open(cls, world: World, kind: Kind) -> "_Channel":
        number = _num_started.get(world.experts, 0) + 1
        _num_started[world.experts] = number
        return cls(world, kind, number % _NUM_TAGS)

    def post(self, batch: list[tuple[Message, Tensor]]) -> list[dist.Work]:
        """Starts to send and receive a batch's rows."""
        operations = []
        for message, row in batch:
            is_sent = message.source == self.world.rank
            peer = message.destination if is_sent else message.source
            call = dist.isend if is_sent else dist.irecv
            operations.append(dist.P2POp(call, row, group=self.world.experts, tag=self.tag, group_peer=peer))
            if is_sent:
                self.world.sent(self.kind, peer, row.nbytes)
        return dist.batch_isend_irecv(operations)


def _batches(phase: Phase, batch_rows: int) -> list[Phase]:
    """Cuts a phase so that nobody receives more than `batch_rows` rows in a batch; both ends cut alike.

    Batches have numbers that all ranks agree on, and a rank takes part in its own in their order: the lowest unfinished one
    always has all its ranks, so no two can wait for each other.
    """

    def number(message: Message) -> int:
        return message.turn // batch_rows

    return [list(batch) for _, batch in groupby(sorted(phase, key=number), key=number)]


def _overwrite(phases: list[list[Phase]], rows: Rows, channel: _Channel) -> Steps:
    for batches in phases:
        for batch in batches:
            if batch:
                yield channel.post([(message, rows[message.expert]) for message in batch])


def _add(phases: list[list[Phase]], rows: Rows, channel: _Channel) -> Steps:
    rank = channel.world.rank
    under_way: deque[tuple[list[dist.Work], list[tuple[Tensor, Tensor]], list[Tensor]]] = deque()
    spare: list[Tensor] = []

    def finish_oldest() -> Steps:
        works, sums, temporary = under_way.popleft()
        yield works
        for total, addend in sums:
            total += addend
        spare.extend(temporary)

    for batches in phases:
        for batch in batches:
            if len(under_way) == 2:
                yield from finish_oldest()
            messages, sums = [], []
            for message in batch:
                row = rows[message.expert]
                if message.destination == rank:
                    addend = spare.pop() if spare else torch.empty_like(row)
                    sums.append((row, addend))
                    row = addend
                messages.append((message, row))
            under_way.append((channel.post(messages), sums, [addend for _, addend in sums]))
        # a phase sends what the one before it has summed
        while under_way:
            yield from finish_oldest()
