"""Sparse materialisation: which experts get copies, and on which ranks, for the next step.

E = experts, D = ranks, t = overlap degree, m = extra slots a rank, Top = the t hottest experts. Whole numbers only, and
every tie is broken by index, because each rank computes this alone and all must arrive at the same placement.

Source: Algorithm 1 of arXiv 2502.02581. Where the paper is silent: shares are proportional within Top, rounded by largest
remainder, and at least 1 and at most D - 1 copies each. Copies are dealt like cards, hottest expert first, to the ranks in
an order that goes from node to node, so that an expert's copies spread over nodes and every rank gets m; the ranks with
least to do of their own come first. A copy that its owner was dealt is changed for another rank's. An expert that nobody is
expected to use gets no copy.
"""

from __future__ import annotations

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.plan import owned


def overlap_degree(nonmoe_time_ns: int, bandwidth_bytes_s: int, expert_bytes: int) -> int:
    """How many experts can travel while a block without experts computes: t = floor(time * bandwidth / bytes).

    Args:
        nonmoe_time_ns: forward time of the attention block before a MoE layer.
        bandwidth_bytes_s: ``ClusterSpec.budget_bytes_s``, when a collective sends each expert once to each node.
        expert_bytes: parameter bytes of one expert.

    Raises:
        ValueError: a negative time or bandwidth, or an expert without bytes.

    Source: arXiv 2502.02581, overlap degree.
    """
    if nonmoe_time_ns < 0 or bandwidth_bytes_s < 0 or expert_bytes < 1:
        raise ValueError(
            f"overlap degree of {nonmoe_time_ns} ns, {bandwidth_bytes_s} bytes/s, {expert_bytes} bytes: "
            "time and bandwidth must not be negative, and an expert has at least 1 byte"
        )
    return int(nonmoe_time_ns) * int(bandwidth_bytes_s) // (1_000_000_000 * int(expert_bytes))


def materialise(
    owners_E: np.ndarray, loads_E: np.ndarray, overlap_degree: int, extra_slots: int, cluster: ClusterSpec
) -> np.ndarray:
    """Copies of one layer's hot experts, for the loads that are expected.

    Args:
        owners_E: int64 [E], the rank that owns each expert; any split.
        loads_E: int64 [E], expected load in any one unit, not negative; load * D * m must fit an int64.
        overlap_degree: t >= 0. 0 means no copies.
        extra_slots: m >= 0, copies that each rank has room for. 0 means no copies.

    Returns:
        copies, uint8 [E, D]: the owners' entries, and at most m more a rank, of Top experts only.
    """
    num_devices = cluster.num_devices
    copies_ED = owned(owners_E, num_devices)
    num_top = min(overlap_degree, int(np.count_nonzero(loads_E)))
    if num_top == 0 or extra_slots == 0 or num_devices == 1:
        return copies_ED
    top = np.argsort(-loads_E, kind="stable")[:num_top]
    if num_top <= extra_slots:
        copies_ED[top] = 1
    else:
        _deal(copies_ED, top, owners_E, loads_E, extra_slots, cluster)
    return copies_ED


def _shares(loads: np.ndarray, num_slots: int, most: int) -> list[int]:
    """Slots for each load (hottest first): proportional by largest remainder, each within 1..most while slots last."""
    wanted, rest = np.divmod(loads * num_slots, loads.sum())
    wanted[np.argsort(-rest, kind="stable")[: num_slots - int(wanted.sum())]] += 1
    shares, free, surplus = [], num_slots, 0
    for place, quota in enumerate(wanted.tolist()):
        kept_for_rest = len(loads) - place - 1
        share = min(max(1, min(quota + surplus, most, free - kept_for_rest)), free)
        surplus = max(0, quota + surplus - share)
        free -= share
        shares.append(share)
    return shares


def _deal(
    copies_ED: np.ndarray,
    top: np.ndarray,
    owners_E: np.ndarray,
    loads_E: np.ndarray,
    extra_slots: int,
    cluster: ClusterSpec,
) -> None:
    """Writes up to ``extra_slots`` copies of Top experts a rank into ``copies_ED``."""
    num_devices = cluster.num_devices
    shares = _shares(loads_E[top], num_devices * extra_slots, num_devices - 1)
    expert = np.repeat(top, shares)
    # a share is at most D - 1 long, so no rank is dealt the same expert twice
    rank = np.resize(_dealing_order(owners_E, loads_E, cluster), expert.size)
    fits = copies_ED[expert, rank] == 0
    copies_ED[expert[fits], rank[fits]] = 1
    for own, owner in zip(expert[~fits].tolist(), rank[~fits].tolist(), strict=True):
        _change(copies_ED, own, owner, expert, rank, owners_E, cluster.nodes)
    free_D = extra_slots - copies_ED.sum(axis=0, dtype=np.int64) + np.bincount(owners_E, minlength=num_devices)
    for free in np.flatnonzero(free_D > 0).tolist():
        _fill(copies_ED, free, int(free_D[free]), top, loads_E)


def _dealing_order(owners_E: np.ndarray, loads_E: np.ndarray, cluster: ClusterSpec) -> np.ndarray:
    """Ranks in turns over the nodes, each node's with the least load of their own first."""
    own_D = np.zeros(cluster.num_devices, dtype=np.int64)
    np.add.at(own_D, owners_E, loads_E)
    by_node = np.lexsort((own_D, cluster.nodes))
    turn = np.empty(cluster.num_devices, dtype=np.int64)
    turn[by_node] = cluster.place_on_node[np.argsort(cluster.nodes, kind="stable")]
    return np.lexsort((cluster.nodes, turn))


def _change(
    copies_ED: np.ndarray,
    own: int,
    owner: int,
    expert: np.ndarray,
    rank: np.ndarray,
    owners_E: np.ndarray,
    nodes: np.ndarray,
) -> None:
    """Gives ``owner`` another dealt copy, and that copy's rank the expert ``own``: on the same node if one fits there."""
    dealt = (copies_ED[expert, rank] == 1) & (owners_E[expert] != rank)
    fits = dealt & (copies_ED[expert, owner] == 0) & (copies_ED[own, rank] == 0)
    if fits.any():
        other = int(np.argmax(fits * (1 + (nodes[rank] == nodes[owner]))))
        copies_ED[expert[other], rank[other]], copies_ED[expert[other], owner] = 0, 1
        copies_ED[own, rank[other]] = 1


def _fill(copies_ED: np.ndarray, rank: int, num_free: int, top: np.ndarray, loads_E: np.ndarray) -> None:
    """Gives the rank those Top experts it lacks that have the highest load per copy."""
    lacking = np.sort(top[copies_ED[top, rank] == 0])
    per_copy = loads_E[lacking] // copies_ED[lacking].sum(axis=1, dtype=np.int64)
    copies_ED[lacking[np.argsort(-per_copy, kind="stable")[:num_free]], rank] = 1
