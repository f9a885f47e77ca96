"""Sparse materialisation: which experts get copies, and on which ranks, for the next step.

E = experts, D = ranks, t = overlap degree, m = extra slots a rank, Top = the t hottest experts. Whole numbers only, and
every tie is broken by index, because each rank computes this alone and all must arrive at the same placement.

Source: Algorithm 1 of arXiv 2502.02581. Where the paper is silent: shares are proportional within Top, rounded by largest
remainder, and at least 1 and at most D - 1 copies each; a copy goes to the node with the fewest copies of its expert (the
owner counted), then the most free slots; on the node to the rank with the most free slots, then the least projected load;
slots that stay free go to the highest load per copy. An expert that nobody is expected to use gets no copy.
"""

from __future__ import annotations

from fractions import Fraction

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
        _Slots(copies_ED, owners_E, loads_E, extra_slots, cluster).fill(top)
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


class _Slots:
    """Ranks' free slots and projected loads while copies are handed out; writes into the copies it was given."""

    def __init__(
        self, copies_ED: np.ndarray, owners_E: np.ndarray, loads_E: np.ndarray, extra_slots: int, cluster: ClusterSpec
    ) -> None:
        self.copies_ED = copies_ED
        self.loads_E = loads_E
        self.cluster = cluster
        self.free_D = np.full(cluster.num_devices, extra_slots, dtype=np.int64)
        self.projected_D = np.zeros(cluster.num_devices, dtype=np.int64)
        np.add.at(self.projected_D, owners_E, loads_E)

    def fill(self, top: np.ndarray) -> None:
        shares = _shares(self.loads_E[top], int(self.free_D.sum()), self.cluster.num_devices - 1)
        for expert, share in zip(top.tolist(), shares, strict=True):
            self._place(expert, share)
        wanting = sorted(top.tolist())
        while wanting and self.free_D.any():
            expert = max(wanting, key=self._load_per_copy)
            if not self._place(expert, 1):
                wanting.remove(expert)

    def _load_per_copy(self, expert: int) -> Fraction:
        return Fraction(int(self.loads_E[expert]), int(np.count_nonzero(self.copies_ED[expert])))

    def _place(self, expert: int, share: int) -> bool:
        """Gives the expert up to ``share`` more copies; False if no rank could take one."""
        held_D = self.copies_ED[expert].astype(bool)
        ranks = self._choose(held_D, share)
        load, before = int(self.loads_E[expert]), int(held_D.sum())
        after = load // (before + ranks.size)
        self.projected_D[held_D] += after - load // before
        self.projected_D[ranks] += after
        self.free_D[ranks] -= 1
        self.copies_ED[expert, ranks] = 1
        return ranks.size > 0

    def _choose(self, held_D: np.ndarray, share: int) -> np.ndarray:
        """The ranks that picking one by one would pick.

        A node's copies only grow while it is picked from, so its turns have growing keys, and the picks of all nodes
        together are the ``share`` smallest keys: one sort in place of a loop over copies.
        """
        nodes = self.cluster.nodes
        open_ranks = np.flatnonzero((self.free_D > 0) & ~held_D)
        order = np.lexsort((self.projected_D[open_ranks], -self.free_D[open_ranks], nodes[open_ranks]))
        ranks = open_ranks[order]
        node = nodes[ranks]
        turn = np.arange(ranks.size) - np.searchsorted(node, node)
        copies_on_node = (self.cluster.members @ held_D)[node] + turn
        free_on_node = (self.cluster.members @ self.free_D)[node] - turn
        return ranks[np.lexsort((node, -free_on_node, copies_on_node))[:share]]
