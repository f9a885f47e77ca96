"""FlexMoE: replicas wander from the experts that need them least to those that need them most."""

from __future__ import annotations

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.plan import Base
from raymoe.placement.rivals.replicas import ResidentReplicas, slots_per_rank
from raymoe.placement.state import PlacementState

ROUNDS = 10
"""Changes to a layer at one time, at the most. Source: LAER-MoE's code."""

_NEVER = np.iinfo(np.int64).max


class FlexMoe(ResidentReplicas):
    """Every 50 steps, at most 10 rounds a layer: on each node one copy of the expert with the least load a copy becomes one
    of the expert with the most, and its rank swaps a heavy expert for a light one with the node's idlest rank. A round
    stands if the most loaded rank's load, or its ratio to the least loaded one's, falls; else the layer is done.
    """

    name = "flexmoe"
    source = "FlexMoE (SIGMOD'23) as the code of LAER-MoE (arXiv 2602.11686) has it"
    assumed = (
        "Slots: those of an even split, and as many more as extra_slots allows, twice as many at the most. An expert keeps a "
        "copy on every node where nodes have more slots than experts, else one anywhere; which experts swap is ours."
    )
    interval: int | None = 50

    def start(self, base: Base, state: PlacementState) -> Base:
        """All slots filled: expert after expert, round and round."""
        num_experts, num_devices = base.resident.shape[1:]
        each = slots_per_rank(state)
        slots = np.arange(num_devices * each)
        resident = np.zeros(base.resident.shape, dtype=np.uint8)
        resident[:, slots % num_experts, slots // each] = 1
        return Base(resident.argmax(axis=2), resident)

    def place(self, loads_LE: np.ndarray, state: PlacementState) -> np.ndarray:
        """What the rounds make of the present replicas."""
        layers = zip(state.base.resident, loads_LE, strict=True)
        return np.stack([_improved(held_ED, loads_E, state.cluster) for held_ED, loads_E in layers])


def _improved(held_ED: np.ndarray, loads_E: np.ndarray, cluster: ClusterSpec) -> np.ndarray:
    for _ in range(ROUNDS):
        changed_ED = _changed(held_ED, loads_E, cluster)
        now_D, then_D = _load_per_rank(held_ED, loads_E), _load_per_rank(changed_ED, loads_E)
        # products of loads may not fit an int64
        most, least, new_most, new_least = (int(load) for each in (now_D, then_D) for load in (each.max(), each.min()))
        if not (new_most < most or new_most * least < most * new_least):
            break
        held_ED = changed_ED
    return held_ED


def _load_per_rank(held_ED: np.ndarray, loads_E: np.ndarray) -> np.ndarray:
    return (held_ED * (loads_E // held_ED.sum(axis=1, dtype=np.int64))[:, None]).sum(axis=0)


def _changed(held_ED: np.ndarray, loads_E: np.ndarray, cluster: ClusterSpec) -> np.ndarray:
    """One round: on every node a copy of the coldest expert becomes one of the hottest, where that can be."""
    held_ED = held_ED.copy()
    counts_E = held_ED.sum(axis=1, dtype=np.int64)
    each_E = loads_E // counts_E
    on_node_EN = held_ED @ cluster.members.T
    slots_N = cluster.members @ held_ED.sum(axis=0, dtype=np.int64)
    on_every_node = slots_N.min() > len(loads_E)
    hot = int(np.where(counts_E < cluster.num_devices, each_E, -1).argmax())
    spare_E = (on_node_EN.min(axis=1) if on_every_node else counts_E) - 1
    spare_E[~(held_ED > held_ED[hot]).any(axis=1)] = 0
    cold = int(np.where(spare_E > 0, each_E, _NEVER).argmin())
    if spare_E[cold] <= 0:
        return held_ED
    for node in range(cluster.num_nodes):
        is_target_D = (cluster.nodes == node) & (held_ED[cold] > held_ED[hot])
        if is_target_D.any() and held_ED[cold].sum() > 1:
            load_D = _load_per_rank(held_ED, loads_E)
            target = int(np.where(is_target_D, load_D, _NEVER).argmin())
            held_ED[[cold, hot], target] = 0, 1
            _relieve(target, hot, held_ED, loads_E, cluster)
    return held_ED


def _relieve(target: int, hot: int, held_ED: np.ndarray, loads_E: np.ndarray, cluster: ClusterSpec) -> None:
    """Swaps the target's heaviest other expert for the lightest of its node's idlest rank, if that evens the two out."""
    each_E = loads_E // held_ED.sum(axis=1, dtype=np.int64)
    load_D = _load_per_rank(held_ED, loads_E)
    on_node_D = cluster.nodes == cluster.nodes[target]
    idlest = int(np.where(on_node_D, load_D, _NEVER).argmin())
    goes_E, comes_E = (held_ED[:, a] > held_ED[:, b] for a, b in ((target, idlest), (idlest, target)))
    goes_E[hot] = False
    if not goes_E.any() or not comes_E.any():
        return
    heavy = int(np.where(goes_E, each_E, -1).argmax())
    light = int(np.where(comes_E, each_E, _NEVER).argmin())
    if 0 < each_E[heavy] - each_E[light] < load_D[target] - load_D[idlest]:
        held_ED[[heavy, light], target] = 0, 1
        held_ED[[heavy, light], idlest] = 1, 0
