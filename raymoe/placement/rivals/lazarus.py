"""Lazarus: replicas of full state by load, placed so that a failure spares as many experts as can be."""

from __future__ import annotations

import numpy as np

from raymoe.placement.rivals.replicas import ResidentReplicas, slots_per_rank
from raymoe.placement.state import PlacementState

FEWEST_COPIES = 2
"""f: an expert survives the loss of one rank. Source: arXiv 2407.04656."""


class Lazarus(ResidentReplicas):
    """Every 200 steps: from the coldest expert on, each takes its share of the slots that are left, f at least. Neighbours
    in popularity, as many as a rank has slots, form a group; as many ranks as its least popular member has copies hold
    the whole group, rank after rank, and the copies that are left fill up the other slots.
    """

    name = "lazarus"
    source = "Lazarus (arXiv 2407.04656), expert allocation, maximum rank overlap placement, Algorithm 1 for tokens"
    assumed = (
        "Slots: those of an even split and all of extra_slots; f falls to 1 where "
        "they are too few. Several copies on one rank count as one; left copies go, hottest expert first, to the emptiest rank."
    )
    interval: int | None = 200
    dispatch = "capacity"

    def place(self, loads_LE: np.ndarray, state: PlacementState) -> np.ndarray:
        """The paper's placement, taking each rank as a node of its own."""
        slots, num_devices = slots_per_rank(state, state.extra_slots), state.cluster.num_devices
        return np.stack([_placed(loads_E.tolist(), slots, num_devices) for loads_E in loads_LE])


def _copies(loads: list[int], total: int) -> list[int]:
    """Copies of each expert, loads ascending: max(floor(load / loads from here on * slots left), f)."""
    fewest = min(FEWEST_COPIES, total // len(loads))
    copies, load_left = [], sum(loads)
    for load in loads:
        copies.append(max(load * total // load_left, fewest))
        total -= copies[-1]
        load_left -= load
    return copies


def _placed(loads: list[int], slots: int, num_devices: int) -> np.ndarray:
    """One layer, uint8 [E, D]."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    copies = _copies([loads[expert] for expert in order], num_devices * slots)
    held = np.zeros((len(loads), num_devices), dtype=np.uint8)
    first = 0
    for begin in range(0, len(order), slots):
        last = min(first + copies[begin], num_devices)
        held[order[begin : begin + slots], first:last] = 1
        first = last
    free = (slots - held.sum(axis=0, dtype=np.int64)).tolist()
    for expert, count in zip(reversed(order), reversed(copies), strict=True):
        for _ in range(count - int(held[expert].sum())):
            ranks = [rank for rank in range(num_devices) if free[rank] and not held[expert, rank]]
            if not ranks:
                break
            rank = max(ranks, key=free.__getitem__)
            held[expert, rank] = 1
            free[rank] -= 1
    return held
