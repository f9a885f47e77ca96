"""What the best number of experts everywhere would bring, found by trying all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raymoe.placement.cost import layer_cost
from raymoe.placement.fssdp import TIMING
from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.materialise import materialise
from raymoe.placement.plan import LayerPlan, Plan
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals.loads import measured
from raymoe.placement.state import PlacementState


class FssdpExhaustive(PolicyDefaults):
    """Told the step's loads, it costs every layer under Algorithm 1 for all t, everywhere while there are slots for that, and
    takes the t with the least time: what ``fssdp``'s forecast and quick model are measured against.
    """

    name = "fssdp-exhaustive"
    source = "exhaustive search with the simulator's cost model, ours; the placements are Hecate's (arXiv 2502.02581)"
    assumed = "Told loads, not ranks: ranks are taken to route alike."
    knows_loads = True

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """The best t of each layer; of equals the smallest."""
        loads_LE = measured(history[-1:], state)
        layers = zip(state.base.owners, loads_LE, strict=True)
        copies = np.stack([_best(owners_E, loads_E, state) for owners_E, loads_E in layers])
        return Plan.of(state.base, copies, state.workload, timing=TIMING)


def _cost(owners_E: np.ndarray, rows_DE: np.ndarray, state: PlacementState) -> Callable[[np.ndarray], float]:
    def cost(copies_ED: np.ndarray) -> float:
        layer_plan = LayerPlan(owners_E, copies_ED)
        return layer_cost(layer_plan, rows_DE, state.workload, state.cluster, timing=TIMING).moe_ns

    return cost


def _best(owners_E: np.ndarray, loads_E: np.ndarray, state: PlacementState) -> np.ndarray:
    cluster = state.cluster
    each_E, odd_E = np.divmod(loads_E // LOAD_SCALE, cluster.num_devices)
    rows_DE = each_E + (np.arange(cluster.num_devices)[:, None] < odd_E)
    most = loads_E.size if state.overlap_degree is None else min(loads_E.size, state.overlap_degree)
    if not state.extra_slots or cluster.num_devices == 1:
        most = 0
    tried = [materialise(owners_E, loads_E, degree, state.extra_slots, cluster) for degree in range(most + 1)]
    return min(tried, key=_cost(owners_E, rows_DE, state))
