"""Locality-first dispatch: which rank computes each routed row. S = routed rows, E = experts, D = ranks.

A copy on the row's own rank takes it; else the copies on its node share its rows; else the copies elsewhere do. Sharing is
round robin in arrival order, one turn a row of the expert, so the shares differ by at most one row. Ranks and experts start
at different copies, else every rank would send its first row to the same one.

Source: dispatch rule of arXiv 2502.02581.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.plan import LayerPlan


class DispatchTable(NamedTuple):
    """Where one rank sends the rows of each expert in one layer and step."""

    ranks_EC: np.ndarray
    """int64 [E, C]: the copies that share the expert's rows, ascending; -1 where there are fewer than C."""

    num_E: np.ndarray
    """int64 [E]: how many copies share, at least 1."""

    start_E: np.ndarray
    """int64 [E]: the copy that takes the first row."""


def locality_first(layer_plan: LayerPlan, rank: int, cluster: ClusterSpec) -> DispatchTable:
    """The nearest copies of every expert, as ``rank`` sees them.

    Raises:
        ValueError: the plan is for another number of ranks than the cluster has, or ``rank`` is not one of them.
    """
    if layer_plan.num_devices != cluster.num_devices or not 0 <= rank < cluster.num_devices:
        raise ValueError(
            f"rank {rank} of a cluster of {cluster.num_devices} cannot dispatch by a plan for {layer_plan.num_devices}"
        )
    holds_ED = layer_plan.copies.astype(bool)
    on_node_ED = holds_ED & (cluster.nodes == cluster.nodes[rank])
    here_ED = holds_ED & (np.arange(cluster.num_devices) == rank)
    share_ED = np.where(on_node_ED.any(axis=1, keepdims=True), on_node_ED, holds_ED)
    share_ED = np.where(here_ED.any(axis=1, keepdims=True), here_ED, share_ED)
    num_E = share_ED.sum(axis=1, dtype=np.int64)
    most = int(num_E.max())
    ranks_EC = np.argsort(~share_ED, axis=1, kind="stable")[:, :most]
    ranks_EC = np.where(np.arange(most) < num_E[:, None], ranks_EC, -1)
    start_E = (rank + np.arange(layer_plan.num_experts, dtype=np.int64)) % num_E
    return DispatchTable(ranks_EC, num_E, start_E)


def assign(expert_index: np.ndarray, table: DispatchTable) -> np.ndarray:
    """The rank of each routed row, without a loop over rows or experts.

    Args:
        expert_index: integers [S], expert of each row in arrival order, in [0, E]; E means "no expert here".

    Returns:
        int64 [S]: rank of each row, -1 for rows without an expert.

    Raises:
        ValueError: not 1-D integers, or an index outside [0, E].
    """
    num_experts = len(table.num_E)
    expert_S = np.asarray(expert_index)
    if expert_S.ndim != 1 or not np.issubdtype(expert_S.dtype, np.integer):
        raise ValueError(f"expert_index must be integers [S], got {expert_S.dtype} {expert_S.shape}")
    if expert_S.size and (expert_S.min() < 0 or expert_S.max() > num_experts):
        raise ValueError(
            f"expert_index goes from {expert_S.min()} to {expert_S.max()}, but there are {num_experts} experts "
            f"(and {num_experts} for rows without one)"
        )
    first_E = np.append(table.ranks_EC[np.arange(num_experts), table.start_E], -1)
    rank_S = first_E[expert_S]
    shared = np.flatnonzero(np.append(table.num_E, 1)[expert_S] > 1)
    if shared.size:
        expert = expert_S[shared]
        turn = (table.start_E[expert] + _arrival(expert, num_experts)) % table.num_E[expert]
        rank_S[shared] = table.ranks_EC[expert, turn]
    return rank_S


def dispatch_rows(expert_index: np.ndarray, layer_plan: LayerPlan, rank: int, cluster: ClusterSpec) -> np.ndarray:
    """``assign`` by the ``locality_first`` table of this rank, in one call."""
    return assign(expert_index, locality_first(layer_plan, rank, cluster))


def _arrival(expert: np.ndarray, num_experts: int) -> np.ndarray:
    """How many earlier rows had the same expert, for each row."""
    # numpy sorts 16-bit integers by radix: several times faster than its stable sort of int64
    keys = expert.astype(np.uint16) if num_experts < 1 << 16 else expert
    order = np.argsort(keys, kind="stable")
    begin_E = np.zeros(num_experts + 1, dtype=np.int64)
    np.cumsum(np.bincount(expert, minlength=num_experts), out=begin_E[1:])
    arrival = np.empty(expert.size, dtype=np.int64)
    arrival[order] = np.arange(expert.size) - begin_E[expert[order]]
    return arrival
