"""Re-sharding: experts change homes, parameters and optimizer state together, bit for bit.

R = resident copies that move, N and S as in `pool`.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.placement import Base
from raymoe.training.fssdp import SparseExperts
from raymoe.training.pool import Place
from raymoe.training.world import World

_SLICE_BYTES = 64 << 20
"""Of what a rank sends and receives at once: the memory that a move takes."""


def move_experts(experts: SparseExperts, base: Base) -> int:
    """Brings every expert to where `base` says it lives; all ranks call it with equal arguments.

    A slot that an expert leaves is taken by one that comes; nothing is summed or rounded on the way.

    Returns:
        How many whole experts a rank fetched, over all ranks.
    """
    moves = _moves(experts.base, base)
    before = dict(experts.pool.slots)
    fresh = experts.rehome(base)
    if len(moves):
        for tensor in experts.optimizer.tensors().values():
            _exchange(tensor, moves, before, fresh, experts.world)
        experts.optimizer.refresh(fresh.values())
    return len(moves)


def _moves(before: Base, after: Base) -> np.ndarray:
    """int64 [R, 4]: (layer, expert, from, to), ordered; an expert that has several homes is sent by the first of them."""
    where = np.argwhere(after.resident > before.resident)
    source = before.resident.argmax(axis=2)
    keeps_owner = np.take_along_axis(before.resident, before.owners[..., None], axis=2)[..., 0] > 0
    source = np.where(keeps_owner, before.owners, source)
    layer, expert, target = where.T
    return np.stack([layer, expert, source[layer, expert], target], axis=1)


def _exchange(
    tensor: Tensor, moves: np.ndarray, before: dict[Place, int], after: dict[Place, int], world: World
) -> None:
    """Moves rows of `tensor` [S, numel] from the slots `before` at their old homes to those `after` at the new ones.

    Slice by slice of the columns: what leaves a slot has been packed before what comes is written.
    """
    going = sorted(moves[moves[:, 2] == world.rank].tolist(), key=lambda move: move[3])
    coming = sorted(moves[moves[:, 3] == world.rank].tolist(), key=lambda move: move[2])
    from_slots = torch.tensor([before[layer, expert] for layer, expert, _, _ in going], dtype=torch.int64)
    to_slots = torch.tensor([after[layer, expert] for layer, expert, _, _ in coming], dtype=torch.int64)
    from_slots, to_slots = from_slots.to(tensor.device), to_slots.to(tensor.device)
    most = max(np.bincount(moves[:, 2]).max(), np.bincount(moves[:, 3]).max())
    width = max(1, int(_SLICE_BYTES // (most * tensor.element_size())))
    for first in range(0, tensor.shape[1], width):
        packed = tensor[from_slots, first : first + width]
        received = packed.new_empty(len(coming), packed.shape[1])
        dist.all_to_all_single(
            received,
            packed,
            [sum(move[2] == rank for move in coming) for rank in range(world.size)],
            [sum(move[3] == rank for move in going) for rank in range(world.size)],
            group=world.experts,
        )
        tensor[to_slots, first : first + width] = received
    for move in going:
        world.sent("reshard", move[3], tensor[:1].nbytes)
