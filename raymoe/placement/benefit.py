"""What copies would bring: the time of every layer with its t hottest experts everywhere, for all t at once.

L = layers, E = experts, D = ranks, N = nodes. Top-t experts are computed where their tokens are; the rest go to their
owners. Adding experts to the rest from the coldest on makes each device's and node's share grow, so the busiest after every
step is one running maximum, and all t together cost little more than one. Ranks are taken to route alike, which they nearly
do (total variation 0.02 on published counts), and what a link sends to be no more than what the busiest receives.

Every rank must come to the same bits: sums are whole, the rest is single float64 operations in a fixed order.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.cost import exposed
from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.plan import Dispatch, Timing
from raymoe.placement.workload import Workload

_COUNTED_RANKS = 128
"""Up to here each rank's share of a collective is counted; beyond, what it can be at the most."""


class PrefixTimes(NamedTuple):
    """Modelled layer times by the number of experts that are everywhere."""

    order_LE: np.ndarray
    """int64 [L, E]: those that are everywhere already, then the others from the hottest on."""

    moe_LT: np.ndarray
    """float64 [L, E + 1], nanoseconds: the layer's step with the first t of ``order_LE`` everywhere; infinite below those
    that are there already."""


def prefix_times(
    owners_LE: np.ndarray,
    loads_LE: np.ndarray,
    workload: Workload,
    cluster: ClusterSpec,
    *,
    timing: Timing = "hidden",
    dispatch: Dispatch = "local",
    everywhere_LE: np.ndarray | None = None,
) -> PrefixTimes:
    """Times of all t.

    Args:
        owners_LE: int64 [L, E].
        loads_LE: int64 [L, E], rows in units of 1/``LOAD_SCALE``.
        timing: what transfers hide behind, as in ``Plan``.
        dispatch: ``level``, or any other word for ``local``.
        everywhere_LE: bool, experts that have been brought everywhere; the others would come late, after the gate, and
            nothing hides them in forward. None: the gate has not spoken, and copies travel behind attention.
    """
    num_layers, num_experts = owners_LE.shape
    is_late = everywhere_LE is not None
    there_LE = everywhere_LE if is_late else np.zeros(owners_LE.shape, dtype=bool)
    order_LE = np.argsort(np.where(there_LE, np.iinfo(np.int64).min, -loads_LE), axis=1, kind="stable")
    hot = _Sorted(order_LE, owners_LE, loads_LE, workload, cluster)
    num_there_L = there_LE.sum(axis=1)
    t = np.arange(num_experts + 1)
    planned_LT = np.minimum(t, num_there_L[:, None]) if is_late else np.broadcast_to(t, (num_layers, num_experts + 1))
    is_level = dispatch == "level" and cluster.num_devices > 1
    compute_LT = hot.level_compute_ns() if is_level else hot.compute_ns()
    exchange_LT = hot.all_to_all_ns() + (hot.levelling_ns() if is_level else 0.0)
    gather_LT = hot.collective_ns(planned_LT, workload.expert_bytes)
    reduce_LT = hot.collective_ns(t[None], workload.gradient_bytes)
    late_LT = hot.collective_ns(t[None], workload.expert_bytes) - gather_LT if is_late else np.zeros_like(gather_LT)
    back_LT = reduce_LT + workload.rematerialise * (gather_LT + late_LT)
    moe_LT = (
        workload.exchanges * exchange_LT
        + workload.forwards * compute_LT
        + late_LT
        + exposed(gather_LT, back_LT, compute_LT, workload, cluster, timing)
    )
    return PrefixTimes(order_LE, np.where(t < num_there_L[:, None], np.inf, moe_LT))


class _Sorted:
    """Experts of every layer in the order in which they would be copied; answers by t, [L, E + 1]."""

    def __init__(
        self,
        order_LE: np.ndarray,
        owners_LE: np.ndarray,
        loads_LE: np.ndarray,
        workload: Workload,
        cluster: ClusterSpec,
    ):
        self.workload, self.cluster, self.order_LE = workload, cluster, order_LE
        self.owners_LE = np.take_along_axis(owners_LE, order_LE, 1)
        self.loads_LE = np.take_along_axis(loads_LE, order_LE, 1)
        self.nodes_LE = cluster.nodes[self.owners_LE]

    def compute_ns(self) -> np.ndarray:
        """One forward of the busiest device: its share of each copied expert, and all of the rest that it owns."""
        cluster, scale = self.cluster, LOAD_SCALE
        tile = cluster.tile_rows
        shared_LE = _tiles(-(-self.loads_LE // (scale * cluster.num_devices)), tile)
        whole_LE = _tiles(-(-self.loads_LE // scale), tile)
        rows_LT = _after(np.cumsum(shared_LE, axis=1)) + self._busiest(_grouped_sums(self.owners_LE, whole_LE))
        return rows_LT * (self.workload.row_flops * 1e9 / cluster.flops_s)

    def level_compute_ns(self) -> np.ndarray:
        """One forward of the busiest device if rows of copied experts even out what devices compute."""
        most_LT = self._owned_rest.max(axis=2)
        mean_L = -(-self.loads_LE.sum(axis=1) // self.cluster.num_devices)
        rows_LT = np.where(np.arange(most_LT.shape[1]) > 0, np.maximum(most_LT, mean_L[:, None]), most_LT)
        tile, scale = self.cluster.tile_rows, LOAD_SCALE
        return _tiles(-(-rows_LT // scale), tile) * (self.workload.row_flops * 1e9 / self.cluster.flops_s)

    def levelling_ns(self) -> np.ndarray:
        """One exchange of the rows that leave their own rank to even devices out: what the fullest has above the mean."""
        cluster, rest = self.cluster, self._owned_rest
        over_LT = rest.max(axis=2) - rest.sum(axis=2) // cluster.num_devices
        over_LT[:, 0] = 0
        slowest = (
            cluster.intra_bytes_s if cluster.num_nodes == 1 else min(cluster.intra_bytes_s, cluster.budget_bytes_s)
        )
        return over_LT * (self.workload.row_bytes * 1e9 / (LOAD_SCALE * slowest))

    @cached_property
    def _owned_rest(self) -> np.ndarray:
        """By t, load of the experts that each device owns and that are not among the first t: int64 [L, E + 1, D]."""
        owned_LED = (self.owners_LE[..., None] == np.arange(self.cluster.num_devices)) * self.loads_LE[..., None]
        so_far = np.zeros((len(owned_LED), owned_LED.shape[1] + 1, owned_LED.shape[2]), dtype=np.int64)
        np.cumsum(owned_LED, axis=1, out=so_far[:, 1:])
        return so_far[:, -1:] - so_far

    def all_to_all_ns(self) -> np.ndarray:
        """One exchange of the rest's rows, a token counted once a rank."""
        cluster = self.cluster
        num_devices, on_node = cluster.num_devices, cluster.devices_on[self.nodes_LE]
        arriving_LE = self._arriving()
        added_LE = arriving_LE - _before_in_group(self.owners_LE, arriving_LE)
        near_LT = self._busiest(arriving_LE * (on_node - 1))
        if cluster.nic_shared:
            far_LT = self._busiest(_grouped_sums(self.nodes_LE, added_LE * (num_devices - on_node)))
        else:
            far_LT = self._busiest(arriving_LE * (num_devices - on_node))
        if not cluster.full_duplex:
            near_LT = near_LT + _rest_sums(added_LE * (on_node - 1)) // num_devices
            links = cluster.num_nodes if cluster.nic_shared else num_devices
            far_LT = far_LT + _rest_sums(added_LE * (num_devices - on_node)) // links
        each = self.workload.row_bytes * 1e9 / (LOAD_SCALE * num_devices)
        return _link_ns(near_LT * each, far_LT * each, cluster)

    def collective_ns(self, copied_LT: np.ndarray, each: int) -> np.ndarray:
        """Bringing the first ``copied_LT`` experts everywhere, ``each`` bytes an expert."""
        near_LT, far_LT = self._busiest_links
        ns_LT = _link_ns(near_LT * (each * 1e9), far_LT * (each * 1e9), self.cluster)
        return np.take_along_axis(ns_LT, np.broadcast_to(copied_LT, ns_LT.shape), axis=1)

    @cached_property
    def _busiest_links(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts that the busiest device's and the busiest NIC's link carries, by t; as `cost` counts them."""
        cluster, fan_out = self.cluster, self.workload.fan_out
        num_nodes, largest = cluster.num_nodes, int(cluster.devices_on.max())
        owned_LT = _after(np.maximum.accumulate(_scan(self.owners_LE, np.ones_like(self.owners_LE), np.add), axis=1))
        near_LT, entering_LT = self._received()
        combine = np.maximum if cluster.full_duplex else np.add
        near_LT = combine(near_LT, owned_LT * (largest - 1) if fan_out == "p2p" else near_LT)
        if num_nodes == 1:
            return near_LT, np.zeros_like(owned_LT)
        if cluster.nic_shared:
            homed_LEN = self.nodes_LE[..., None] == np.arange(num_nodes)
            far_in_LT, far_out_LT = _most(~homed_LEN), _most(homed_LEN)
            if fan_out == "p2p":
                far_in_LT = far_in_LT * largest
        else:
            far_in_LT, far_out_LT = entering_LT, owned_LT
        crossings = {
            "p2p": int(cluster.num_devices - cluster.devices_on.min()),
            "hierarchical": num_nodes - 1,
            "chain": 1,
        }
        return near_LT, combine(far_in_LT, far_out_LT * crossings[fan_out])

    def _received(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts that the busiest device receives from its node and, by its own NIC, from others; by t.

        Over many ranks these are bounds: all t, and all that enter a node in the device's turn.
        """
        cluster = self.cluster
        if cluster.num_devices > _COUNTED_RANKS:
            turns = np.arange(int(cluster.devices_on.max()))
            entering_LT = _most(self.order_LE[..., None] % turns.size == turns)
            t = np.arange(self.owners_LE.shape[1] + 1)
            return np.broadcast_to(t, entering_LT.shape), entering_LT
        owned_LED = self.owners_LE[..., None] == np.arange(cluster.num_devices)
        away_LED = self.nodes_LE[..., None] != cluster.nodes
        if self.workload.fan_out != "p2p":
            # experts take turns in entering a node through its devices
            away_LED &= self.order_LE[..., None] % cluster.devices_on[cluster.nodes] == cluster.place_on_node
        return _most(~(owned_LED | away_LED)), _most(away_LED)

    def _arriving(self) -> np.ndarray:
        """Tokens that come to the expert's owner for it and for the colder ones it owns, over all senders: int64 [L, E]."""
        total_L = self.loads_LE.sum(axis=1)
        choices = self.workload.choices
        if choices == 1:
            return _grouped_sums(self.owners_LE, self.loads_LE)
        chance_LE = np.minimum(self.loads_LE * choices / np.maximum(total_L, 1)[:, None], 1.0)
        none_LE = _grouped_products(self.owners_LE, 1.0 - chance_LE)
        return np.rint(total_L[:, None] / choices * (1.0 - none_LE)).astype(np.int64)

    def _busiest(self, of_group_LE: np.ndarray) -> np.ndarray:
        """The largest group's value by t, from each group's value once the expert has been added."""
        largest = np.maximum.accumulate(of_group_LE[:, ::-1], axis=1)[:, ::-1]
        return np.concatenate([largest, np.zeros_like(largest[:, :1])], axis=1)


def _link_ns(near: np.ndarray, far: np.ndarray, cluster: ClusterSpec) -> np.ndarray:
    latency = np.where(far > 0, cluster.inter_latency_ns, cluster.latency_ns)
    moving = np.maximum(near / cluster.intra_bytes_s, far / cluster.inter_bytes_s)
    return np.where(moving > 0, latency + moving, 0.0)


def _tiles(rows: np.ndarray, tile: int) -> np.ndarray:
    return -(-rows // tile) * tile


def _after(so_far_LE: np.ndarray) -> np.ndarray:
    """By number of experts taken: nothing first, then the running values."""
    return np.concatenate([np.zeros_like(so_far_LE[:, :1]), so_far_LE], axis=1)


def _rest_sums(values_LE: np.ndarray) -> np.ndarray:
    """By t, the sum over the experts that are not among the first t."""
    so_far = _after(np.cumsum(values_LE, axis=1))
    return so_far[:, -1:] - so_far


def _most(carried_LEG: np.ndarray) -> np.ndarray:
    """By t, the largest count over the last axis of the first t experts: int64 [L, E + 1]."""
    return _after(np.cumsum(carried_LEG, axis=1, dtype=np.int32).max(axis=2).astype(np.int64))


def _grouped_sums(groups_LE: np.ndarray, values_LE: np.ndarray) -> np.ndarray:
    """Of each expert and those behind it in its group."""
    return _scan(groups_LE[:, ::-1], values_LE[:, ::-1], np.add)[:, ::-1]


def _grouped_products(groups_LE: np.ndarray, values_LE: np.ndarray) -> np.ndarray:
    return _scan(groups_LE[:, ::-1], values_LE[:, ::-1], np.multiply)[:, ::-1]


def _before_in_group(groups_LE: np.ndarray, values_LE: np.ndarray) -> np.ndarray:
    """The value of the next expert behind in the same group; 0 for the last."""
    order, groups = _by_group(groups_LE)
    values = np.take_along_axis(values_LE, order, 1)
    following = np.zeros_like(values)
    following[:, :-1] = np.where(groups[:, 1:] == groups[:, :-1], values[:, 1:], 0)
    return _scatter(order, following)


def _scan(groups_LE: np.ndarray, values_LE: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """Running ``combine`` within each group, in order; a doubling scan, so as many rounds as the largest group's log."""
    order, groups = _by_group(groups_LE)
    values = np.take_along_axis(values_LE, order, 1)
    step = 1
    while step < values.shape[1]:
        same = groups[:, step:] == groups[:, :-step]
        if not same.any():
            break
        values[:, step:] = np.where(same, combine(values[:, step:], values[:, :-step]), values[:, step:])
        step *= 2
    return _scatter(order, values)


def _by_group(groups_LE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(groups_LE, axis=1, kind="stable")
    return order, np.take_along_axis(groups_LE, order, 1)


def _scatter(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    scattered = np.empty_like(values)
    np.put_along_axis(scattered, order, values, 1)
    return scattered
