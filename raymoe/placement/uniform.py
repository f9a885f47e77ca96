"""The time of a layer under any placement if all ranks route alike: the cost model without a matrix of pairs.

E = experts, D = ranks, N = nodes. `benefit` answers faster where copies are everywhere, `cost` knows every rank's counts.
Whole sums, and single float64 operations in a fixed order.
"""

from __future__ import annotations

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.cost import LinkBytes, collective_links, exchange_ns, exposed
from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.plan import LayerPlan
from raymoe.placement.workload import Workload


def uniform_moe_ns(layer_plan: LayerPlan, loads_E: np.ndarray, workload: Workload, cluster: ClusterSpec) -> float:
    """The layer's step with ``local`` dispatch and ``hidden`` timing.

    Args:
        loads_E: int64 [E], rows of all ranks in units of 1/``LOAD_SCALE``.
    """
    num_devices, nodes, on_node_N = cluster.num_devices, cluster.nodes, cluster.devices_on
    copies_ED = layer_plan.copies
    rows_E = loads_E / (LOAD_SCALE * num_devices)
    tokens = int(loads_E.sum()) / (LOAD_SCALE * num_devices * workload.choices)
    by_node_ED = copies_ED[:, np.argsort(nodes, kind="stable")]
    held_EN = np.add.reduceat(by_node_ED, np.cumsum(on_node_N) - on_node_N, axis=1, dtype=np.int64)
    # what one copy takes: from ranks on its node without one, and from nodes without one
    near_EN = rows_E[:, None] * (on_node_N - held_EN) / np.maximum(held_EN, 1)
    far_E = rows_E * np.where(held_EN == 0, on_node_N, 0).sum(axis=1) / held_EN.sum(axis=1)
    near_ED, far_ED = copies_ED * near_EN[:, nodes], copies_ED * far_E[:, None]
    rows_ED = np.ceil(copies_ED * rows_E[:, None] + near_ED + far_ED - 1e-9)
    tile = cluster.tile_rows
    busiest = (np.ceil(rows_ED / tile) * tile).sum(axis=0).max()
    compute_ns = busiest * workload.row_flops * 1e9 / cluster.flops_s

    near_in_D, near_share = _arriving(near_ED, tokens * (on_node_N[nodes] - 1), workload)
    far_in_D, far_share = _arriving(far_ED, tokens * (num_devices - on_node_N[nodes]), workload)
    has_ED = (held_EN > 0)[:, nodes]
    near_out_D = (rows_E[:, None] * (has_ED & (copies_ED == 0))).sum(axis=0) * near_share
    far_out_D = (rows_E[:, None] * ~has_ED).sum(axis=0) * far_share
    rows = LinkBytes(*(_bytes(each, workload) for each in (near_out_D, near_in_D, far_out_D, far_in_D)))
    experts = collective_links(layer_plan, layer_plan.extra_copies(), 1, workload, cluster, "whole")
    gather_ns = exchange_ns(experts.times(workload.expert_bytes), cluster)
    back_ns = exchange_ns(experts.times(workload.gradient_bytes), cluster) + workload.rematerialise * gather_ns
    return (
        workload.exchanges * exchange_ns(rows, cluster)
        + workload.forwards * compute_ns
        + exposed(gather_ns, back_ns, compute_ns, workload, cluster)
    )


def _arriving(rows_ED: np.ndarray, senders_D: np.ndarray, workload: Workload) -> tuple[np.ndarray, float]:
    """Tokens that come to each rank, float64 [D], and how many they are for each row. ``senders_D``: tokens of those that
    may send."""
    rows_D = rows_ED.sum(axis=0)
    if workload.choices == 1:
        return rows_D, 1.0
    share_ED = np.minimum(rows_ED / np.maximum(senders_D, 1), 1.0)
    tokens_D = senders_D * (1.0 - np.multiply.reduce(1.0 - share_ED, axis=0))
    # accumulate adds in order; a sum of floats may not
    return tokens_D, np.add.accumulate(tokens_D)[-1] / max(np.add.accumulate(rows_D)[-1], 1.0)


def _bytes(tokens_D: np.ndarray, workload: Workload) -> np.ndarray:
    return np.rint(tokens_D * workload.row_bytes).astype(np.int64)
