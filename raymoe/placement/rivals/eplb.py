"""EPLB, DeepSeek's expert-parallelism load balancer: redundant experts for the hottest."""

from __future__ import annotations

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.rivals.replicas import ResidentReplicas, pack, slots_per_rank
from raymoe.placement.state import PlacementState


class Eplb(ResidentReplicas):
    """Every 100 steps: groups of experts are packed onto nodes, each node's redundant experts go one by one to the highest
    load a copy, and copies are packed onto its ranks, heaviest first, equally many on each. Where nodes do not divide
    the groups, or differ in ranks, all of it is done over the whole cluster at once.

    Args:
        num_groups: expert groups that the router picks from; 1: it picks from all experts.
    """

    name = "eplb"
    source = "EPLB (github.com/deepseek-ai/EPLB), hierarchical and global policy"
    assumed = (
        "Made for inference: in training, replicas keep optimizer state and a change every 100 steps moves it. One redundant "
        "expert a rank if extra_slots allows; an expert is on a rank once, and rows are shared evenly among its ranks."
    )
    interval: int | None = 100

    def __init__(self, num_groups: int = 1):
        self.num_groups = num_groups

    def place(self, loads_LE: np.ndarray, state: PlacementState) -> np.ndarray:
        """The balancer's placement; where experts are now plays no part."""
        num_layers, num_experts = loads_LE.shape
        num_groups, cluster = self.num_groups, state.cluster
        if not _divide(num_groups, num_experts, cluster):
            num_groups, num_nodes = 1, 1
        else:
            num_nodes = cluster.num_nodes
        groups_LG = loads_LE.reshape(num_layers, num_groups, -1).sum(axis=2)
        node_LG = pack(groups_LG, np.ones_like(groups_LG), np.zeros(num_nodes, dtype=np.int64)).argmax(axis=2)
        node_LE = np.repeat(node_LG, num_experts // num_groups, axis=1)
        # from here on every node of every layer is a layer of its own
        expert_LE = np.argsort(node_LE, axis=1, kind="stable")
        rank_D = np.argsort(cluster.nodes, kind="stable") if num_nodes > 1 else np.arange(cluster.num_devices)
        node_loads = np.take_along_axis(loads_LE, expert_LE, 1).reshape(num_layers * num_nodes, -1)
        on_node = cluster.num_devices // num_nodes
        counts = _replicated(node_loads, on_node * slots_per_rank(state, 1), on_node)
        placed = pack(node_loads, counts, np.zeros(on_node, dtype=np.int64)).reshape(num_layers, num_nodes, -1, on_node)
        resident = np.zeros(state.base.resident.shape, dtype=np.uint8)
        layer, node, place, turn = np.nonzero(placed)
        resident[
            layer, expert_LE.reshape(num_layers, num_nodes, -1)[layer, node, place], rank_D[node * on_node + turn]
        ] = 1
        return resident


def _divide(num_groups: int, num_experts: int, cluster: ClusterSpec) -> bool:
    on_nodes = cluster.devices_on
    return num_groups % cluster.num_nodes == 0 and num_experts % num_groups == 0 and on_nodes.max() == on_nodes.min()


def _replicated(loads_LE: np.ndarray, total: int, most: int) -> np.ndarray:
    """Copies of each expert, at most ``most``: one, and one more for the highest load a copy until there are ``total``."""
    num_layers, num_experts = loads_LE.shape
    layers = np.arange(num_layers)
    counts = np.ones(loads_LE.shape, dtype=np.int64)
    for _ in range(min(total, most * num_experts) - num_experts):
        counts[layers, np.where(counts < most, loads_LE / counts, -1.0).argmax(axis=1)] += 1
    return counts
