"""The time of one MoE layer under a placement and a dispatch, forward and backward. D = ranks, N = nodes, E = experts.

    moe = exchanges x all-to-all + forwards x compute + what the sparse collectives leave exposed

An exchange takes its latency and the time of its busiest link; the experts take the busiest device's; transfers hide behind
the attention before the layer, and twice that in backward. Source: cost model of the fact sheets of FSSDP (arXiv
2502.02581), LAER-MoE (arXiv 2602.11686) and Pro-Prophet (arXiv 2411.10003), which agree on its form; latencies, links, tile
rounding and the counting of tokens that travel once are ours.

Rows and bytes are whole; times are float64 nanoseconds, made by single additions, multiplications and divisions in a fixed
order, so that every rank computes the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.dispatch import dispatch_counts
from raymoe.placement.plan import Base, Dispatch, LayerPlan, Layout, Timing
from raymoe.placement.workload import Workload

Ns = float | np.ndarray


@dataclass(frozen=True)
class LinkBytes:
    """What one exchange moves over each link, int64: within a node by device, between nodes by device."""

    near_out: np.ndarray
    near_in: np.ndarray
    far_out: np.ndarray
    far_in: np.ndarray

    @classmethod
    def of_pairs(cls, bytes_DD: np.ndarray, cluster: ClusterSpec) -> LinkBytes:
        """Point-to-point bytes, from x to; a rank's own are free."""
        same_node = cluster.nodes[:, None] == cluster.nodes
        far = np.where(same_node, 0, bytes_DD)
        near = np.where(same_node, bytes_DD, 0)
        np.fill_diagonal(near, 0)
        return cls(near.sum(axis=1), near.sum(axis=0), far.sum(axis=1), far.sum(axis=0))

    def __add__(self, other: LinkBytes) -> LinkBytes:
        return LinkBytes(
            self.near_out + other.near_out,
            self.near_in + other.near_in,
            self.far_out + other.far_out,
            self.far_in + other.far_in,
        )

    def times(self, each: int) -> LinkBytes:
        """Every link's bytes times ``each``."""
        return LinkBytes(self.near_out * each, self.near_in * each, self.far_out * each, self.far_in * each)

    @property
    def near(self) -> int:
        """Bytes that stay within a node, over all devices."""
        return int(self.near_in.sum())

    @property
    def far(self) -> int:
        """Bytes that cross nodes, over all devices."""
        return int(self.far_in.sum())


def exchange_ns(links: LinkBytes, cluster: ClusterSpec) -> float:
    """Time of one exchange: its latency, and its busiest link. Nothing to move takes no time."""
    if not links.near and not links.far:
        return 0.0
    far_out, far_in = links.far_out, links.far_in
    if cluster.nic_shared:
        far_out, far_in = cluster.per_node(far_out), cluster.per_node(far_in)
    near_ns = _busiest(links.near_out, links.near_in, cluster) * 1e9 / cluster.intra_bytes_s
    far_ns = _busiest(far_out, far_in, cluster) * 1e9 / cluster.inter_bytes_s
    return (cluster.inter_latency_ns if links.far else cluster.latency_ns) + max(near_ns, far_ns)


def _busiest(out: np.ndarray, into: np.ndarray, cluster: ClusterSpec) -> int:
    return int((np.maximum(out, into) if cluster.full_duplex else out + into).max())


@dataclass(frozen=True)
class LayerCost:
    """One layer's step under one placement; times in nanoseconds."""

    all_to_all_ns: float
    """One exchange of rows."""

    compute_ns: float
    """One forward of the experts, on the busiest device."""

    gather_ns: float
    """Bringing the planned copies."""

    late_ns: float
    """Bringing the copies that were added after the gate; always exposed."""

    reduce_ns: float
    """Bringing the gradients home."""

    exposed_ns: float
    """What of the transfers, late ones included, nothing hides."""

    moe_ns: float
    """All of the layer's step but its attention."""

    ideal_ns: float
    """The experts computed evenly, without any transfer."""

    imbalance: float
    """Rows of the busiest device over the mean; 1 if there are none."""

    row_links: tuple[int, int]
    """Bytes of rows within nodes and between nodes, over all exchanges of the step."""

    copy_links: tuple[int, int]
    """The same of parameters and gradients."""


def layer_cost(
    layer_plan: LayerPlan,
    rows_DE: np.ndarray,
    workload: Workload,
    cluster: ClusterSpec,
    *,
    layout: Layout = "whole",
    dispatch: Dispatch = "local",
    timing: Timing = "hidden",
    late: np.ndarray | None = None,
) -> LayerCost:
    """What a step takes in one layer.

    Args:
        layer_plan: where the experts are once all copies have come.
        rows_DE: int64 [D, E], rows that each rank routed.
        layout, dispatch, timing: as in ``Plan``.
        late: uint8 [E, D], those copies that were only asked for after the gate; None: none.

    Raises:
        ValueError: rows that do not fit the plan.
    """
    rows_DE = np.asarray(rows_DE, dtype=np.int64)
    counts = dispatch_counts(rows_DE, layer_plan, cluster, dispatch)
    row_links = LinkBytes.of_pairs(travelling(counts, rows_DE, workload.choices) * workload.row_bytes, cluster)
    all_to_all_ns = exchange_ns(row_links, cluster)

    rows_ED = counts.sum(axis=0)
    tile = cluster.tile_rows
    busiest = int((-(-rows_ED // tile) * tile).sum(axis=0).max())
    compute_ns = busiest * workload.row_flops * 1e9 / cluster.flops_s

    owners_E = layer_plan.owners
    extra = layer_plan.extra_copies() if layout == "whole" else layer_plan.copies
    late = np.zeros_like(extra) if late is None else late
    gather = collective_links(owners_E, extra & ~late & 1, workload.expert_bytes, workload, cluster, layout)
    late_gather = collective_links(owners_E, late, workload.expert_bytes, workload, cluster, layout)
    reduce = collective_links(owners_E, extra, workload.gradient_bytes, workload, cluster, layout)
    if layout == "whole":
        reduce = reduce + _replica_sums(layer_plan, workload, cluster)
    gather_ns, late_ns, reduce_ns = (exchange_ns(links, cluster) for links in (gather, late_gather, reduce))
    back_ns = reduce_ns + workload.rematerialise * (gather_ns + late_ns)
    exposed_ns = late_ns + exposed(gather_ns, back_ns, compute_ns, workload, cluster, timing)

    total_rows = int(rows_DE.sum())
    mean = total_rows / cluster.num_devices
    gathers = 2 if workload.rematerialise else 1
    return LayerCost(
        all_to_all_ns=all_to_all_ns,
        compute_ns=compute_ns,
        gather_ns=gather_ns,
        late_ns=late_ns,
        reduce_ns=reduce_ns,
        exposed_ns=exposed_ns,
        moe_ns=workload.exchanges * all_to_all_ns + workload.forwards * compute_ns + exposed_ns,
        ideal_ns=workload.forwards * mean * workload.row_flops * 1e9 / cluster.flops_s,
        imbalance=int(rows_ED.sum(axis=0).max()) / mean if total_rows else 1.0,
        row_links=(workload.exchanges * row_links.near, workload.exchanges * row_links.far),
        copy_links=(
            gathers * (gather.near + late_gather.near) + reduce.near,
            gathers * (gather.far + late_gather.far) + reduce.far,
        ),
    )


def exposed(
    gather_ns: Ns, back_ns: Ns, compute_ns: Ns, workload: Workload, cluster: ClusterSpec, timing: Timing = "hidden"
) -> Any:
    """What nothing hides of a layer's transfers: forward behind its attention, backward behind its attention's backward.

    Args:
        gather_ns: transfers of the forward.
        back_ns: transfers of the backward: gradients, and parameters again if they are re-materialised.
        compute_ns: one forward of the layer's experts; ``overlapped`` transfers hide behind it too.

    Returns:
        A number for numbers, an array for arrays.
    """
    if timing == "blocking":
        return gather_ns + back_ns
    window_ns = workload.attention_ns + (compute_ns if timing == "overlapped" else 0)
    hidden_ns = window_ns * cluster.overlap_percent / 100
    return np.maximum(gather_ns - hidden_ns, 0.0) + np.maximum(back_ns - workload.backward_window * hidden_ns, 0.0)


def travelling(counts: np.ndarray, rows_DE: np.ndarray, choices: int) -> np.ndarray:
    """How many tokens travel from rank to rank, int64 [D, D]: one that goes to a rank for several experts counts once.

    Args:
        counts: int64 [D, E, D], rows from, expert, to.
        choices: K, experts a token takes.

    Routing counts do not say which experts a token took together: they are taken as independent, so of a sender's n tokens
    n (1 - prod_e (1 - rows_e / n)) go to a rank. Exact where a rank serves a single expert.
    """
    if choices == 1:
        return counts.sum(axis=1)
    tokens_D = -(-rows_DE.sum(axis=1) // choices)
    share = counts / np.maximum(tokens_D, 1)[:, None, None]
    stays = np.multiply.reduce(1.0 - np.minimum(share, 1.0), axis=1)
    return np.rint(tokens_D[:, None] * (1.0 - stays)).astype(np.int64)


def move_links(before: Base, after: Base, workload: Workload, cluster: ClusterSpec) -> LinkBytes:
    """What changing the base moves: parameters, master copy and moments of every expert to each rank that is new to it,
    from the lowest rank that has it."""
    new = after.resident > before.resident
    layer, expert, rank = np.nonzero(new)
    holder = before.resident[layer, expert].argmax(axis=1)
    pairs_DD = np.zeros((cluster.num_devices, cluster.num_devices), dtype=np.int64)
    np.add.at(pairs_DD, (holder, rank), workload.expert_bytes + workload.state_bytes)
    return LinkBytes.of_pairs(pairs_DD, cluster)


def collective_links(
    owners_E: np.ndarray, extra_ED: np.ndarray, each: int, workload: Workload, cluster: ClusterSpec, layout: Layout
) -> LinkBytes:
    """Bytes on each link to bring these copies, ``each`` bytes an expert. Gradients take the same ways back.

    A node takes an expert in once (but with ``p2p``), through the copy whose turn it is, so that its NICs share the work;
    within a node copies are passed on, so that no device sends more than it receives.
    """
    nodes, num_devices = cluster.nodes, cluster.num_devices
    expert, rank = np.nonzero(extra_ED.astype(np.bool_))
    copies_D = np.bincount(rank, minlength=num_devices)
    if layout == "sliced":
        node_D, on_node_D = cluster.per_node(copies_D)[nodes], cluster.devices_on[nodes]
        parts = (
            node_D - copies_D,
            copies_D * (on_node_D - 1),
            copies_D.sum() - node_D,
            copies_D * (num_devices - on_node_D),
        )
        return LinkBytes(*(part * each // num_devices for part in parts))
    owner = owners_E[expert]
    crosses = nodes[owner] != nodes[rank]
    if workload.fan_out == "p2p":
        ends = (owner[~crosses], rank[~crosses], owner[crosses], rank[crosses])
        return LinkBytes(*(np.bincount(end, minlength=num_devices) * each for end in ends))
    enters = crosses & _has_turn(expert, nodes[rank], cluster.num_nodes)
    crossings_E = np.bincount(expert[enters], minlength=len(owners_E))
    if workload.fan_out == "chain":
        crossings_E = np.minimum(crossings_E, 1)
    far_out_D = np.bincount(owners_E, weights=crossings_E, minlength=num_devices).astype(np.int64) * each
    far_in_D = np.bincount(rank[enters], minlength=num_devices) * each
    near_D = copies_D * each - far_in_D
    return LinkBytes(near_D, near_D, far_out_D, far_in_D)


def _has_turn(expert: np.ndarray, node: np.ndarray, num_nodes: int) -> np.ndarray:
    """Of copies in the order of expert and rank, those through which their node takes the expert in: one a node."""
    if not expert.size:
        return np.zeros(0, dtype=bool)
    group = expert * num_nodes + node
    order = np.argsort(group, kind="stable")
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(begins, append=group.size)
    place = np.arange(group.size) - np.repeat(begins, sizes)
    has_turn = np.empty(group.size, dtype=bool)
    has_turn[order] = place == expert[order] % np.repeat(sizes, sizes)
    return has_turn


def _replica_sums(layer_plan: LayerPlan, workload: Workload, cluster: ClusterSpec) -> LinkBytes:
    """Ring all-reduces of the gradients of experts that live on several ranks: 2 (r - 1) / r of an expert each way."""
    resident = layer_plan.resident
    assert resident is not None
    resident_ED = resident.astype(np.int64)
    replicas_E = resident_ED.sum(axis=1)
    bytes_E = 2 * (replicas_E - 1) * workload.gradient_bytes // replicas_E
    on_nodes_E = ((cluster.members @ resident_ED.T) > 0).sum(axis=0)
    far_ED = np.where((on_nodes_E > 1)[:, None], resident_ED * bytes_E[:, None], 0)
    # a ring that spans nodes crosses each of its nodes' links once; the device that does is one of them
    share_ED = far_ED // np.maximum((cluster.members @ resident_ED.T).T[:, cluster.nodes], 1)
    near_D = (resident_ED * bytes_E[:, None] - share_ED).sum(axis=0)
    far_D = share_ED.sum(axis=0)
    return LinkBytes(near_D, near_D, far_D, far_D)
