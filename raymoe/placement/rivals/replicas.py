"""Copies in equal slots: how many a rank has, which experts get how many, and which rank takes which.

L = MoE layers, E = experts, D = ranks, N = nodes, R = copies of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from raymoe.placement.plan import Base, Dispatch, Plan
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals.loads import measured
from raymoe.placement.state import PlacementState

_NEVER = np.iinfo(np.int64).max


def slots_per_rank(state: PlacementState, most_extra: int | None = None) -> int:
    """Experts of a layer that each rank has room for: those of the fullest rank of an even split, and extra ones.

    Args:
        most_extra: extra slots that the policy takes if ``state.extra_slots`` allows; None: as many as experts, so that
            slots double at the most.
    """
    num_experts = state.base.owners.shape[1]
    own = -(-num_experts // state.cluster.num_devices)
    return min(own + min(state.extra_slots, own if most_extra is None else most_extra), num_experts)


def even_counts(num_experts: int, total: int) -> np.ndarray:
    """int64 [E]: ``total`` copies in equal numbers, the first experts one more."""
    each, odd = divmod(total, num_experts)
    return each + (np.arange(num_experts) < odd)


def pack(
    loads_LE: np.ndarray, counts_LE: np.ndarray, nodes: np.ndarray, present: np.ndarray | None = None
) -> np.ndarray:
    """Longest processing time first: the copy with most load goes to the least loaded rank, as many copies on each rank.

    A rank takes an expert once, and of the ranks with room only those on nodes with the fewest copies of it are asked; a
    copy that only ranks with one have room for is left out. Ties go to the rank that has the expert, then the index.

    Args:
        loads_LE: int64, shared by an expert's copies.
        counts_LE: int64, at least 1; copies of each expert, the same sum R in every layer, at most D * E.
        nodes: int64 [D]; all the same where nodes do not matter.
        present: int64 [L, E], rank that each expert is on now; None: no preference.

    Returns:
        uint8 [L, E, D], each expert somewhere.
    """
    num_layers, num_experts = loads_LE.shape
    num_devices = nodes.size
    total = int(counts_LE[0].sum())
    room, odd = divmod(total, num_devices)
    each_LE = loads_LE // counts_LE
    order_LE = np.argsort(-each_LE, axis=1, kind="stable")
    repeats = np.take_along_axis(counts_LE, order_LE, 1)
    expert_LR = np.repeat(order_LE.ravel(), repeats.ravel()).reshape(num_layers, total)
    same_node = (nodes[:, None] == nodes).astype(np.int64)
    layers = np.arange(num_layers)
    copies = np.zeros((num_layers, num_experts, num_devices), dtype=np.uint8)
    load_LD = np.zeros((num_layers, num_devices), dtype=np.int64)
    taken_LD = np.zeros_like(load_LD)
    for expert_L in expert_LR.T:
        has_LD = copies[layers, expert_L]
        has_odd_L = (taken_LD > room).sum(axis=1) < odd
        is_open_LD = (taken_LD < room + has_odd_L[:, None]) & (has_LD == 0)
        on_node_LD = np.where(is_open_LD, has_LD @ same_node, _NEVER)
        key_LD = 2 * load_LD
        if present is not None:
            key_LD += np.arange(num_devices) != present[layers, expert_L][:, None]
        rank_L = np.where(on_node_LD == on_node_LD.min(axis=1, keepdims=True), key_LD, _NEVER).argmin(axis=1)
        fits_L = is_open_LD[layers, rank_L]
        copies[layers, expert_L, rank_L] |= fits_L
        taken_LD[layers, rank_L] += fits_L
        load_LD[layers, rank_L] += fits_L * each_LE[layers, expert_L]
    return copies


def sliced_base(copies: np.ndarray) -> Base:
    """A base for a sliced layout, where any holder can speak for the expert: the first one. copies uint8 [L, E, D]."""
    return Base.of_owners(copies.argmax(axis=2), copies.shape[2])


class ResidentReplicas(PolicyDefaults, ABC):
    """Policies whose copies live with their optimizer state where they are, and move every ``interval`` steps."""

    dispatch: Dispatch = "even"
    materialises = False

    @abstractmethod
    def place(self, loads_LE: np.ndarray, state: PlacementState) -> np.ndarray:
        """Where the experts should live for these loads: uint8 [L, E, D]."""

    def start(self, base: Base, state: PlacementState) -> Base:
        """The placement for equal loads."""
        no_history = np.zeros((0, *state.base.owners.shape), dtype=np.int64)
        return _rebased(self.place(measured(no_history, state), state), base)

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """The replicas that live there; nothing is gathered, their gradients are summed."""
        return Plan.of(state.base, state.base.resident, state.workload, dispatch=self.dispatch)

    def reshard(self, history: np.ndarray, state: PlacementState) -> Base:
        """The placement for the mean load of the last steps."""
        resident = self.place(measured(history, state), state)
        return state.base if np.array_equal(resident, state.base.resident) else _rebased(resident, state.base)


def _rebased(resident: np.ndarray, before: Base) -> Base:
    """Owners stay where they still have the expert; else the first holder."""
    stays = np.take_along_axis(resident, before.owners[..., None], axis=2)[..., 0] > 0
    return Base(np.where(stays, before.owners, resident.argmax(axis=2)), resident)
