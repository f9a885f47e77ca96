"""The time of a layer under any placement if all ranks route alike: the cost model without a matrix of pairs.

E = experts, D = ranks, N = nodes. `benefit` answers faster where copies are everywhere, `cost` knows every rank's counts.
Whole sums, and single float64 operations in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.cost import LinkBytes, collective_links, exchange_ns, exposed
from raymoe.placement.dispatch import level_room, within_nodes
from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.plan import Dispatch, Timing
from raymoe.placement.workload import Workload


def uniform_moe_ns(
    owners_E: np.ndarray,
    copies_ED: np.ndarray,
    loads_E: np.ndarray,
    workload: Workload,
    cluster: ClusterSpec,
    timing: Timing = "hidden",
    dispatch: Dispatch = "local",
) -> float:
    """The layer's step.

    Args:
        owners_E, copies_ED: as in ``LayerPlan``; nothing else is resident.
        loads_E: int64 [E], rows of all ranks in units of 1/``LOAD_SCALE``.
        dispatch: ``level``, or any other word for ``local``.
    """
    num_devices, nodes = cluster.num_devices, cluster.nodes
    on_node_N = cluster.devices_on
    tokens = int(loads_E.sum()) / (LOAD_SCALE * num_devices * workload.choices)
    flows = (_level_flows if dispatch == "level" else _local_flows)(copies_ED, loads_E, cluster)
    tile = cluster.tile_rows
    busiest = np.bincount(flows.rank, weights=np.ceil(flows.rows / tile) * tile, minlength=num_devices).max()
    compute_ns = busiest * workload.row_flops * 1e9 / cluster.flops_s

    near_in_D, near_share = _arriving(flows.rank, flows.near, tokens * (on_node_N[nodes] - 1), workload)
    far_in_D, far_share = _arriving(flows.rank, flows.far, tokens * (num_devices - on_node_N[nodes]), workload)
    near_out_D, far_out_D = flows.near_out_D * near_share, flows.far_out_D * far_share
    links = LinkBytes(*(_bytes(each, workload) for each in (near_out_D, near_in_D, far_out_D, far_in_D)))
    extra_ED = copies_ED.copy()
    extra_ED[np.arange(owners_E.size), owners_E] = 0
    experts = collective_links(owners_E, extra_ED, 1, workload, cluster, "whole")
    gather_ns = exchange_ns(experts.times(workload.expert_bytes), cluster)
    back_ns = exchange_ns(experts.times(workload.gradient_bytes), cluster) + workload.rematerialise * gather_ns
    return (
        workload.exchanges * exchange_ns(links, cluster)
        + workload.forwards * compute_ns
        + exposed(gather_ns, back_ns, compute_ns, workload, cluster, timing)
    )


class _Flows(NamedTuple):
    """Which rows every copy gets, and from where; copies by rank ascending."""

    rank: np.ndarray
    """int64 [copies]."""
    rows: np.ndarray
    """float64 [copies], all that it computes."""
    near: np.ndarray
    """Of them, from other ranks of its node."""
    far: np.ndarray
    """From other nodes."""
    near_out_D: np.ndarray
    """Rows that each rank sends to others on its node."""
    far_out_D: np.ndarray


def _copies(copies_ED: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expert and rank of every copy, by rank ascending."""
    # numpy finds the set ones of booleans several times faster than those of bytes
    expert, rank = np.nonzero(copies_ED.view(np.bool_))
    by_rank = np.argsort(rank, kind="stable")
    return expert[by_rank], rank[by_rank]


def _local_flows(copies_ED: np.ndarray, loads_E: np.ndarray, cluster: ClusterSpec) -> _Flows:
    num_devices, num_nodes, nodes = cluster.num_devices, cluster.num_nodes, cluster.nodes
    on_node_N = cluster.devices_on
    expert, rank = _copies(copies_ED)
    node = nodes[rank]
    rows_E = loads_E / (LOAD_SCALE * num_devices)
    held_EN = np.bincount(expert * num_nodes + node, minlength=rows_E.size * num_nodes).reshape(-1, num_nodes)
    # what one copy takes: from ranks on its node without one, and from nodes without one
    near_EN = rows_E[:, None] * (on_node_N - held_EN) / np.maximum(held_EN, 1)
    far_E = rows_E * np.where(held_EN == 0, on_node_N, 0).sum(axis=1) / held_EN.sum(axis=1)
    near, far = near_EN[expert, node], far_E[expert]
    own_D = np.bincount(rank, weights=rows_E[expert], minlength=num_devices)
    return _Flows(
        rank,
        np.ceil(rows_E[expert] + near + far - 1e-9),
        near,
        far,
        (rows_E[:, None] * (held_EN > 0)).sum(axis=0)[nodes] - own_D,
        (rows_E[:, None] * (held_EN == 0)).sum(axis=0)[nodes],
    )


def _level_flows(copies_ED: np.ndarray, loads_E: np.ndarray, cluster: ClusterSpec) -> _Flows:
    num_devices = cluster.num_devices
    total_E = loads_E // LOAD_SCALE
    expert, rank = _copies(copies_ED)
    # in parts of a row, so that a rank's own share is whole
    room_DE = level_room(total_E, copies_ED) * num_devices
    kept_DE = np.minimum(total_E, room_DE)
    over_DE, free_DE = total_E - kept_DE, room_DE - kept_DE
    sent_DE, taken_DE = within_nodes(over_DE, free_DE, cluster)
    return _Flows(
        rank,
        room_DE[rank, expert] / num_devices,
        taken_DE[rank, expert] / num_devices,
        (free_DE - taken_DE)[rank, expert] / num_devices,
        sent_DE.sum(axis=1) / num_devices,
        (over_DE - sent_DE).sum(axis=1) / num_devices,
    )


def _arriving(
    rank: np.ndarray, rows: np.ndarray, senders_D: np.ndarray, workload: Workload
) -> tuple[np.ndarray, float]:
    """Tokens that come to each rank, float64 [D], and how many they are for each row.

    Args:
        rank, rows: of each copy, by rank ascending, where it is and what rows it is sent.
        senders_D: tokens of those ranks that may send.
    """
    rows_D = np.bincount(rank, weights=rows, minlength=senders_D.size)
    if workload.choices == 1:
        return rows_D, 1.0
    stays = 1.0 - np.minimum(rows / np.maximum(senders_D, 1)[rank], 1.0)
    begins = np.flatnonzero(np.diff(rank, prepend=-1))
    here = rank[begins]
    tokens_D = np.zeros(senders_D.size)
    tokens_D[here] = senders_D[here] * (1.0 - np.multiply.reduceat(stays, begins))
    # accumulate adds in order; a sum of floats may not
    return tokens_D, np.add.accumulate(tokens_D)[-1] / max(np.add.accumulate(rows_D)[-1], 1.0)


def _bytes(tokens_D: np.ndarray, workload: Workload) -> np.ndarray:
    return np.rint(tokens_D * workload.row_bytes).astype(np.int64)
