"""SYMI: replicas follow the loads from step to step, because optimizer state belongs to no replica."""

from __future__ import annotations

import numpy as np

from raymoe.placement.plan import Plan
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals.loads import measured
from raymoe.placement.rivals.replicas import sliced_base, slots_per_rank
from raymoe.placement.state import PlacementState


class Symi(PolicyDefaults):
    """Copies of an expert in proportion to its load in the last step, at least one, rounded down and corrected one by one
    where they are furthest off; in contiguous slots, s a rank. The optimizer is sliced over all ranks and scatters the
    new parameters to wherever the next step wants them.
    """

    name = "symi"
    source = "SYMI (arXiv 2504.19925), expert placement"
    assumed = (
        "s: the experts a rank has in an even split, and one more if extra_slots allows. Several copies on one rank count as "
        "one, and rows are shared evenly among an expert's ranks; slices are on devices, not in host memory; no token is dropped."
    )
    keeps_whole = False

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """The copies for the last step's loads; nothing hides the scatter, which follows the optimizer's step."""
        loads_LE = measured(history[-1:], state)
        num_layers, num_experts = loads_LE.shape
        num_devices, slots = state.cluster.num_devices, slots_per_rank(state, 1)
        counts = _counts(loads_LE, num_devices * slots)
        expert = np.repeat(np.tile(np.arange(num_experts), num_layers), counts.ravel())
        copies = np.zeros((num_layers, num_experts, num_devices), dtype=np.uint8)
        layers, ranks = np.arange(num_layers)[:, None, None], np.arange(num_devices)[:, None]
        copies[layers, expert.reshape(num_layers, num_devices, slots), ranks] = 1
        base = sliced_base(copies)
        return Plan.of(base, copies, state.workload, layout="sliced", dispatch="even", timing="blocking")


def _counts(loads_LE: np.ndarray, total: int) -> np.ndarray:
    """Copies of each expert, int64 [L, E], ``total`` a layer; compared in 1/(the layer's load) of a copy."""
    layers = np.arange(len(loads_LE))
    load_L = loads_LE.sum(axis=1)
    goal_LE = loads_LE * total
    counts = np.maximum(goal_LE // load_L[:, None], 1)
    over_L = counts.sum(axis=1) - total
    while over_L.any():
        excess_LE = counts * load_L[:, None] - goal_LE
        most_L = np.where(counts > 1, excess_LE, np.iinfo(np.int64).min).argmax(axis=1)
        expert_L = np.where(over_L > 0, most_L, excess_LE.argmin(axis=1))
        counts[layers, expert_L] -= np.sign(over_L)
        over_L -= np.sign(over_L)
    return counts
