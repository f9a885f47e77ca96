"""The sparse collectives as one uneven all-to-all each way: a single call, at the price of packing."""

import torch
import torch.distributed as dist

from raymoe.training.sparse.moves import Moves, Phase
from raymoe.training.sparse.pending import Pending, Steps, start
from raymoe.training.sparse.transport import Kind, Rows, check_rows
from raymoe.training.world import World


class AllToAll:
    """Packs a row a copy at both ends, so it takes memory for all of a rank's copies at once."""

    name = "a2a"

    def gather(self, moves: Moves, rows: Rows, world: World) -> Pending:
        return _start(moves, rows, world, moves.outward, "sparse_all_gather")

    def reduce(self, moves: Moves, rows: Rows, world: World) -> Pending:
        return _start(moves, rows, world, moves.homeward, "sparse_reduce_scatter")


def _start(moves: Moves, rows: Rows, world: World, phase: Phase, kind: Kind) -> Pending:
    if not moves.num_copies:
        return Pending()
    check_rows(moves, rows)
    return start(_exchange(phase, rows, world, kind), world.device)


def _exchange(phase: Phase, rows: Rows, world: World, kind: Kind) -> Steps:
    # stable sorts: a peer's rows in the order of the experts, so both ends agree, and an expert's copies by rank
    sends = sorted((message for message in phase if message.source == world.rank), key=lambda m: m.destination)
    receives = sorted((message for message in phase if message.destination == world.rank), key=lambda m: m.source)
    numel = next((rows[message.expert].numel() for message in phase), 0)
    like = next((rows[message.expert] for message in phase), torch.empty(0, device=world.device))
    packed = torch.cat([rows[message.expert] for message in sends]) if sends else like.new_empty(0)
    received = like.new_empty(len(receives) * numel)
    for message in sends:
        world.sent(kind, message.destination, rows[message.expert].nbytes)
    work = dist.all_to_all_single(
        received,
        packed,
        _splits([message.source for message in receives], numel, world.size),
        _splits([message.destination for message in sends], numel, world.size),
        group=world.experts,
        async_op=True,
    )
    assert work is not None, "an asynchronous call by a member of the group"
    yield [work]
    for message, row in zip(receives, received.view(len(receives), numel), strict=True):
        if kind == "sparse_all_gather":
            rows[message.expert].copy_(row)
        else:
            rows[message.expert].add_(row)


def _splits(peers: list[int], numel: int, size: int) -> list[int]:
    return [numel * peers.count(peer) for peer in range(size)]
