"""Fully sharded sparse data parallelism: hot experts are materialised on other ranks, step by step.

Source: Hecate (arXiv 2502.02581). ``fssdp-paper`` is its Algorithm 1 with the overlap degree as a hard cap. ``fssdp`` asks
what copies bring: it adds replicas while the modelled time of the layer falls, exposed transfers counted, so it may choose
none, and takes of ``local`` and ``level`` dispatch the one with which that is less; its copies start to travel with the experts
of the layer before, so that those hide them too; it corrects itself once the gate has spoken, and re-shards cold experts over all
layers (Algorithm 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from raymoe.placement.benefit import PrefixTimes, prefix_times
from raymoe.placement.cost import exchange_ns, move_links
from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.materialise import materialise, overlap_degree
from raymoe.placement.plan import Base, Dispatch, LayerPlan, Plan, Timing, owned
from raymoe.placement.policy import PolicyDefaults, expected_loads
from raymoe.placement.sharding import heterogeneous_owners
from raymoe.placement.state import PlacementState
from raymoe.placement.uniform import uniform_moe_ns

CALIBRATION_MARGIN = 0.03
"""A late copy must save this share of the layer's modelled time."""

LEVEL_MARGIN = 0.05
"""``level`` must save this share of the layers' modelled time: it also evens out what ranks that route alike do not differ by,
and the rows that it sends for that are not in the model."""

TIMING: Timing = "overlapped"
"""Copies are asked for before the gates of the layer before have spoken: nothing has to wait for its experts."""

RESHARD_INTERVAL = 100
"""Steps between two re-shardings. Source: arXiv 2502.02581, section 6."""


class FssdpPaper(PolicyDefaults):
    """Algorithm 1 with t = what hides behind attention, whether that many pay or not."""

    name = "fssdp-paper"
    source = "Hecate (arXiv 2502.02581), Algorithms 1 and 2"
    assumed = (
        "rounding and tie-breaks as in raymoe.placement.materialise and sharding; bandwidth of a node's NIC for t; re-sharding "
        "by the mean load of the window; no calibration, which the paper leaves open"
    )
    interval: int | None = RESHARD_INTERVAL

    def needs_costs(self, overlap_degree: int | None) -> bool:
        """To find t."""
        return overlap_degree is None

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """Copies by Algorithm 1, layer by layer. No history, t = 0, m = 0 or one rank: no copies and no communication."""
        loads = expected_loads(history, state)
        degree = paper_degree(state)
        copies = [
            materialise(owners_E, loads_E, degree, state.extra_slots, state.cluster)
            for owners_E, loads_E in zip(state.base.owners, loads, strict=True)
        ]
        return Plan.of(state.base, np.stack(copies), state.workload)

    def reshard(self, history: np.ndarray, state: PlacementState) -> Base:
        """Algorithm 2, whenever its answer differs: what it gains is not asked."""
        loads = expected_loads(history, state)
        if state.cluster.num_devices == 1 or not loads.any():
            return state.base
        degrees_L = np.full(len(loads), min(paper_degree(state), loads.shape[1]))
        owners = heterogeneous_owners(loads, degrees_L, state.cluster, state.base.owners)
        if (owners == state.base.owners).all():
            return state.base
        return Base.of_owners(owners, state.cluster.num_devices)


class FssdpPaperRemat(FssdpPaper):
    """The same with re-materialisation: copies cost the memory of two layers, and a second gather in backward."""

    name = "fssdp-paper-rm"
    rematerialise = True


class Fssdp(PolicyDefaults):
    """The cost-benefit form."""

    name = "fssdp"
    source = "Hecate (arXiv 2502.02581) with a cost-benefit overlap degree of our own"
    interval: int | None = RESHARD_INTERVAL
    calibrates = True
    weighs_dispatch = True

    def needs_costs(self, overlap_degree: int | None) -> bool:
        """Always: it weighs them."""
        return True

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """As many of each layer's hottest experts everywhere as make its modelled time least, if there is memory for
        them; else Algorithm 1 fills the slots if that is faster than fewer experts everywhere.

        Rows stay with the copy on their own rank, or go where there is least to do: what takes less over all layers.
        """
        loads = expected_loads(history, state)
        planned: dict[Dispatch, tuple[float, np.ndarray]] = {
            dispatch: _copies(state, loads, dispatch) for dispatch in _choices(state)
        }
        dispatch = _least(planned)
        return Plan.of(state.base, planned[dispatch][1], state.workload, dispatch=dispatch, timing=TIMING)

    def calibrate(self, layer: int, loads: np.ndarray, plan: Plan, state: PlacementState) -> LayerPlan:
        """Further experts everywhere, late, if the layer's modelled time falls by ``CALIBRATION_MARGIN`` even so."""
        planned = plan.layer(layer)
        if not self.calibrates or state.cluster.num_devices == 1:
            return planned
        everywhere_E = planned.copies.min(axis=1) > 0
        free = state.extra_slots - int(np.max(planned.extra_copies().sum(axis=0)))
        there = int(everywhere_E.sum())
        loads_E = loads.sum(axis=0, dtype=np.int64) * LOAD_SCALE
        times = prefix_times(
            planned.owners[None],
            loads_E[None],
            state.workload,
            state.cluster,
            timing=TIMING,
            dispatch=plan.dispatch,
            everywhere_LE=everywhere_E[None],
        )
        allowed_T = times.moe_LT[0, there : there + max(free, 0) + 1]
        best = int(np.argmin(allowed_T))
        if allowed_T[best] > (1 - CALIBRATION_MARGIN) * allowed_T[0]:
            return planned
        copies = planned.copies.copy()
        copies[times.order_LE[0, : there + best]] = 1
        return LayerPlan(planned.owners, copies, planned.resident)

    def reshard(self, history: np.ndarray, state: PlacementState) -> Base:
        """Algorithm 2, if what the modelled layers gain until the next time is more than moving the experts takes."""
        loads = expected_loads(history, state)
        cluster = state.cluster
        if cluster.num_devices == 1 or not loads.any():
            return state.base
        now_ns, now = _fastest(state, loads)
        owners = heterogeneous_owners(loads, _best(now, state), cluster, state.base.owners)
        moved = Base.of_owners(owners, cluster.num_devices)
        then_ns, _ = _fastest(replace(state, base=moved), loads)
        move_ns = exchange_ns(move_links(state.base, moved, state.workload, cluster), cluster)
        return moved if (now_ns - then_ns) * RESHARD_INTERVAL > move_ns else state.base


class FssdpRemat(Fssdp):
    """The cost-benefit form with re-materialisation."""

    name = "fssdp-rm"
    rematerialise = True


class FssdpKnown(Fssdp):
    """``fssdp`` that is told the step's loads: what its forecast and its late copies cost it."""

    name = "fssdp-known"
    knows_loads = True
    calibrates = False


def paper_degree(state: PlacementState) -> int:
    """``state.overlap_degree``, or what the paper's formula gives for this cluster and layer."""
    if state.overlap_degree is not None:
        return state.overlap_degree
    return overlap_degree(state.workload.attention_ns, state.cluster.budget_bytes_s, state.workload.expert_bytes)


def everywhere(copies_LED: np.ndarray, order_LE: np.ndarray, num_L: np.ndarray) -> np.ndarray:
    """The copies with the first ``num_L`` experts of each layer's order on all ranks; written in place."""
    chosen_LE = np.zeros(order_LE.shape, dtype=bool)
    np.put_along_axis(chosen_LE, order_LE, np.arange(order_LE.shape[1]) < num_L[:, None], 1)
    copies_LED[chosen_LE] = 1
    return copies_LED


def _choices(state: PlacementState) -> tuple[Dispatch, ...]:
    """Ways to find a copy that are weighed against each other."""
    if state.dispatch is None:
        return ("local", "level")
    return (state.dispatch,)


def _times(state: PlacementState, loads: np.ndarray, dispatch: Dispatch) -> PrefixTimes:
    return prefix_times(state.base.owners, loads, state.workload, state.cluster, timing=TIMING, dispatch=dispatch)


def _copies(state: PlacementState, loads: np.ndarray, dispatch: Dispatch) -> tuple[float, np.ndarray]:
    """(modelled time of all layers, copies uint8 [L, E, D])."""
    owners, times = state.base.owners, _times(state, loads, dispatch)
    best_L = _best(times, state)
    best_ns_L = times.moe_LT[np.arange(len(best_L)), best_L]
    copies = everywhere(owned(owners, state.cluster.num_devices), times.order_LE, best_L)
    wanted_L = np.argmin(times.moe_LT, axis=1)
    for layer in np.flatnonzero(wanted_L > best_L).tolist() if state.extra_slots else ():
        degree = _most(state, int(wanted_L[layer]))
        filled = materialise(owners[layer], loads[layer], degree, state.extra_slots, state.cluster)
        many_ns = uniform_moe_ns(owners[layer], filled, loads[layer], state.workload, state.cluster, TIMING, dispatch)
        if many_ns < best_ns_L[layer]:
            copies[layer], best_ns_L[layer] = filled, many_ns
    return float(best_ns_L.sum()), copies


def _fastest(state: PlacementState, loads: np.ndarray) -> tuple[float, PrefixTimes]:
    """(modelled time of all layers with the experts everywhere for which there is memory, times of all their numbers)."""
    found: dict[Dispatch, tuple[float, PrefixTimes]] = {}
    for dispatch in _choices(state):
        times = _times(state, loads, dispatch)
        best_L = _best(times, state)
        found[dispatch] = float(times.moe_LT[np.arange(len(best_L)), best_L].sum()), times
    return found[_least(found)]


def _least(found: Mapping[Dispatch, tuple[float, Any]]) -> Dispatch:
    """Whichever takes less time, with the margin."""
    return min(found, key=lambda dispatch: found[dispatch][0] * (1 + LEVEL_MARGIN * (dispatch == "level")))


def _best(times: PrefixTimes, state: PlacementState) -> np.ndarray:
    """The number of experts everywhere that takes least, within the slots and the cap: int64 [L]."""
    return np.argmin(times.moe_LT[:, : _most(state, state.extra_slots) + 1], axis=1)


def _most(state: PlacementState, wanted: int) -> int:
    return wanted if state.overlap_degree is None else min(wanted, state.overlap_degree)
