"""FasterMoE: popular experts are shadowed on all ranks once the gate has spoken.

c = computing a row, f = moving a row, s = moving an expert, all in nanoseconds.
"""

from __future__ import annotations

import numpy as np

from raymoe.placement.plan import LayerPlan, Plan
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.state import PlacementState


class FasterMoe(PolicyDefaults):
    """Sort experts by rows B_1 >= B_2 >= ..., summed over ranks. Without shadows a layer takes (3c + 4f) B_1; with the k
    hottest on all ranks (3c + 4f) B_{k+1} + k s. Shadow while that falls; the first k that does not help ends it.
    """

    name = "fastermoe"
    source = "FasterMoE (PPoPP'22), dynamic shadowing, and its code in fastmoe"
    assumed = (
        "Bandwidth and FLOP/s are the cluster's instead of the code's constants; no row is left after the last expert. "
        "Rows are summed over ranks; fastmoe at ee3c561 sums over experts, and then never shadows when ranks are equal."
    )
    calibrates = True

    def needs_costs(self, overlap_degree: int | None) -> bool:
        """Always: shadows must pay."""
        return True

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """No copies: the decision waits for the gate, and all it moves is exposed."""
        return Plan.of(state.base, state.base.resident, state.workload, timing="blocking")

    def calibrate(self, layer: int, loads: np.ndarray, plan: Plan, state: PlacementState) -> LayerPlan:
        """Shadows of the hottest experts, within the slots, on the step's own loads."""
        planned = plan.layer(layer)
        order_E = np.argsort(-loads.sum(axis=0), kind="stable")
        latencies = self.latencies(planned.owners, loads, order_E, state)[: state.extra_slots + 1]
        falls = latencies[1:] < latencies[:-1]
        num_shadows = falls.size if falls.all() else int(falls.argmin())
        copies = planned.copies.copy()
        copies[order_E[:num_shadows]] = 1
        return LayerPlan(planned.owners, copies, planned.resident)

    def latencies(
        self, owners_E: np.ndarray, loads_DE: np.ndarray, order_E: np.ndarray, state: PlacementState
    ) -> np.ndarray:
        """float64 [E + 1], nanoseconds: what the policy expects of the layer with the first k of ``order_E`` shadowed."""
        c, f, s = _unit_times(state)
        left_K = np.append(loads_DE.sum(axis=0)[order_E], 0)
        return (3 * c + 4 * f) * left_K + s * np.arange(left_K.size)


class FasterMoeDevice(FasterMoe):
    """The same search by the busiest device: 3c for each row it computes, those of shadowed experts that it routed itself
    included, and 4f for each row that comes to it from other ranks.
    """

    name = "fastermoe-device"
    source = "FasterMoE (PPoPP'22) as in the artifact of SmartMoE (ATC'23)"
    assumed = (
        "The artifact charges a shadow eight times its transfer; once here. Its two maxima are taken on one device."
    )

    def latencies(
        self, owners_E: np.ndarray, loads_DE: np.ndarray, order_E: np.ndarray, state: PlacementState
    ) -> np.ndarray:
        c, f, s = _unit_times(state)
        rows_ED = loads_DE.T[order_E]
        # row e: what its owner computes for others, and gives up once the expert is everywhere
        owner_ED = owners_E[order_E][:, None] == np.arange(loads_DE.shape[0])
        others_ED = owner_ED * (rows_ED.sum(axis=1, keepdims=True) - rows_ED)
        own_ED = rows_ED * ~owner_ED
        arriving_KD = others_ED.sum(axis=0) - _sums_before(others_ED)
        computed_KD = (rows_ED * owner_ED).sum(axis=0) + arriving_KD + _sums_before(own_ED)
        return (3 * c * computed_KD + 4 * f * arriving_KD).max(axis=1) + s * np.arange(len(order_E) + 1)


def _unit_times(state: PlacementState) -> tuple[float, float, float]:
    workload, cluster = state.workload, state.cluster
    bandwidth = cluster.budget_bytes_s
    return (
        workload.row_flops * 1e9 / cluster.flops_s,
        workload.row_bytes * 1e9 / bandwidth,
        workload.expert_bytes * 1e9 / bandwidth,
    )


def _sums_before(values_ED: np.ndarray) -> np.ndarray:
    """Row k: the sum of the first k rows. [E + 1, D]."""
    return np.concatenate([np.zeros_like(values_ED[:1]), np.cumsum(values_ED, axis=0)])
