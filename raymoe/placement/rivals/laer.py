"""LAER-MoE: experts are sliced over all ranks, and each rank puts together the same number of whole ones a layer."""

from __future__ import annotations

import numpy as np

from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.plan import Plan
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals.loads import measured
from raymoe.placement.rivals.replicas import even_counts, pack, sliced_base, slots_per_rank
from raymoe.placement.state import PlacementState


class Laer(PolicyDefaults):
    """Two candidates, from the last step's loads: copies in equal numbers, and copies for the highest load a copy until the
    slots are full. Both are packed, heaviest copy first, onto the nodes with fewest copies and there the least loaded
    rank; the one with the lower 4 sum of communication + 3 maximum of computation is taken.
    """

    name = "laer"
    source = "LAER-MoE (arXiv 2602.11686), expert layout tuner and lite routing, and its code"
    assumed = (
        "C: the experts a rank has in an even split, and as many more as extra_slots allows, twice as many at the most; they are "
        "gathered again in backward, and hide behind experts and attention. Ranks are taken to route alike, as history tells "
        "loads, not ranks; random perturbations of candidates are left out."
    )
    rematerialise = True
    keeps_whole = False

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """The cheaper candidate of each layer, the even one if they are equal."""
        loads_LE = measured(history[-1:], state)
        num_experts, cluster = loads_LE.shape[1], state.cluster
        total = cluster.num_devices * slots_per_rank(state)
        counts = np.broadcast_to(even_counts(num_experts, total), loads_LE.shape), _queued(loads_LE, total, state)
        even, queued = (pack(loads_LE, counts_LE, cluster.nodes) for counts_LE in counts)
        is_even_L = _layer_ns(even, loads_LE, state) <= _layer_ns(queued, loads_LE, state)
        copies = np.where(is_even_L[:, None, None], even, queued)
        return Plan.of(
            sliced_base(copies), copies, state.workload, layout="sliced", dispatch="node", timing="overlapped"
        )


def _queued(loads_LE: np.ndarray, total: int, state: PlacementState) -> np.ndarray:
    """Copies by priority: one on each node if that leaves slots to hand out, else one; then for the highest load a copy one
    more, or, once it has as many as there are nodes, that many more.
    """
    num_layers, num_experts = loads_LE.shape
    num_nodes, num_devices = state.cluster.num_nodes, state.cluster.num_devices
    layers = np.arange(num_layers)
    counts = np.full(loads_LE.shape, num_nodes if num_nodes * num_experts < total else 1, dtype=np.int64)
    left_L = total - counts.sum(axis=1)
    while left_L.any():
        expert_L = np.where(counts < num_devices, loads_LE / counts, -1.0).argmax(axis=1)
        count_L = counts[layers, expert_L]
        more_L = np.where(count_L < num_nodes, 1, num_nodes)
        more_L = np.minimum(np.minimum(more_L, left_L), num_devices - count_L)
        counts[layers, expert_L] += more_L
        left_L -= more_L
    return counts


def _layer_ns(copies: np.ndarray, loads_LE: np.ndarray, state: PlacementState) -> np.ndarray:
    """4 times what all ranks' rows travel, summed, and the busiest rank's computation: float64 [L]."""
    cluster, workload = state.cluster, state.workload
    num_devices, on_nodes = cluster.num_devices, cluster.devices_on
    on_node_LEN = copies @ cluster.members.T
    is_here_LEN = on_node_LEN > 0
    near_L = (loads_LE[..., None] * is_here_LEN * (on_nodes - 1)).sum(axis=(1, 2))
    # senders without a copy on their node share their rows among all copies
    senders_LE = (~is_here_LEN * on_nodes).sum(axis=2)
    far_L = (loads_LE * senders_LE).sum(axis=1)
    from_node_LEN = loads_LE[..., None] * on_nodes // np.maximum(on_node_LEN, 1)
    from_far_LE = loads_LE * senders_LE // copies.sum(axis=2, dtype=np.int64)
    rows_LD = (copies * (from_node_LEN[..., cluster.nodes] + from_far_LE[..., None])).sum(axis=1)
    parts = LOAD_SCALE * num_devices
    exchange_L = near_L * (workload.row_bytes * 1e9 / (parts * cluster.intra_bytes_s))
    exchange_L = exchange_L + far_L * (workload.row_bytes * 1e9 / (parts * cluster.inter_bytes_s))
    compute_L = rows_LD.max(axis=1) * (workload.row_flops * 1e9 / (parts * cluster.flops_s))
    return 4 * exchange_L + workload.forwards * compute_L
