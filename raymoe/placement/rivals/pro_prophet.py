"""Pro-Prophet: parameters of the heaviest devices' experts go out, their gradients come back."""

from __future__ import annotations

import numpy as np

from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.plan import Plan, owned
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals.loads import measured
from raymoe.placement.state import PlacementState

BALANCED_PERCENT = 50
"""alpha: the load is even once ranks differ by less than this share of an expert's mean load."""


class ProProphet(PolicyDefaults):
    """From the previous step's loads: the heaviest rank's heaviest expert is copied to all ranks but the n that use it least,
    the layer's time estimated, and so on until the load is even or nothing is left to copy; the first of these copies
    that gave the least time are made.
    """

    name = "pro-prophet"
    source = "Pro-Prophet (arXiv 2411.10003), Algorithm 1 and equation 8"
    assumed = (
        "History tells loads, not ranks: ranks are taken to route alike, so none uses an expert least and n = 0; alpha = 0.5. "
        "The paper has one expert a rank and stops when a rank comes up again; here when its experts have all been copied."
    )

    def needs_costs(self, overlap_degree: int | None) -> bool:
        """Always: it estimates the layer's time."""
        return True

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """The greedy copies, hidden behind attention and expert computation."""
        loads_LE = measured(history[-1:], state)
        order_LK, times_LT = _greedy(loads_LE, state)
        best_L = times_LT.argmin(axis=1)
        copies = owned(state.base.owners, state.cluster.num_devices)
        layer, turn = np.nonzero(np.arange(order_LK.shape[1]) < best_L[:, None])
        copies[layer, order_LK[layer, turn]] = 1
        return Plan.of(state.base, copies, state.workload, timing="overlapped")


def _greedy(loads_LE: np.ndarray, state: PlacementState) -> tuple[np.ndarray, np.ndarray]:
    """Experts in the order in which they would be copied, int64 [L, K], and the layer's time after none, one, two ... of
    them, float64 [L, K + 1], infinite once the search has ended. Loads of ranks are counted in 1/D of ``loads_LE``.
    """
    owners, num_devices = state.base.owners, state.cluster.num_devices
    num_layers, num_experts = loads_LE.shape
    most = min(state.extra_slots, num_experts)
    layers = np.arange(num_layers)
    left_LE = loads_LE.copy()
    owned_LD = (owned(owners, num_devices) * loads_LE[..., None]).sum(axis=1)
    shared_L = np.zeros(num_layers, dtype=np.int64)
    order_LK = np.zeros((num_layers, most), dtype=np.int64)
    times_LT = np.full((num_layers, most + 1), np.inf)
    times_LT[:, 0] = _layer_ns(owned_LD, shared_L, 0, state)
    goes_on_L = np.ones(num_layers, dtype=bool)
    for turn in range(most):
        heaviest_L = owned_LD.argmax(axis=1)
        spread_L = (owned_LD.max(axis=1) - owned_LD.min(axis=1)) * num_experts
        goes_on_L &= 100 * spread_L >= BALANCED_PERCENT * loads_LE.sum(axis=1)
        expert_L = np.where(owners == heaviest_L[:, None], left_LE, 0).argmax(axis=1)
        load_L = np.where(owners[layers, expert_L] == heaviest_L, left_LE[layers, expert_L], 0)
        goes_on_L &= load_L > 0
        if not goes_on_L.any():
            break
        left_LE[layers, expert_L] -= load_L
        owned_LD[layers, heaviest_L] -= load_L
        shared_L += load_L
        order_LK[:, turn] = expert_L
        times_LT[:, turn + 1] = np.where(goes_on_L, _layer_ns(owned_LD, shared_L, turn + 1, state), np.inf)
    return order_LK, times_LT


def _layer_ns(owned_LD: np.ndarray, shared_L: np.ndarray, num_copied: int, state: PlacementState) -> np.ndarray:
    """T = 4 T_a2a + 3 T_fec + what copies and their gradients take beyond expert and other computation: float64 [L].

    Args:
        owned_LD: load of each rank's own experts that are not copied.
        shared_L: load of those that are, of which every rank computes a D-th.
    """
    workload, cluster = state.workload, state.cluster
    parts = LOAD_SCALE * cluster.num_devices
    busiest_L = owned_LD.max(axis=1)
    rows_L = busiest_L * cluster.num_devices + shared_L
    arriving_L = busiest_L * (cluster.num_devices - 1)
    exchange_L = arriving_L * (workload.row_bytes * 1e9 / (parts * cluster.budget_bytes_s))
    compute_L = rows_L * (workload.row_flops * 1e9 / (parts * cluster.flops_s))
    trans_ns = num_copied * workload.expert_bytes * 1e9 / cluster.budget_bytes_s
    agg_ns = num_copied * workload.gradient_bytes * 1e9 / cluster.budget_bytes_s
    window_L = compute_L + workload.attention_ns
    exposed_L = np.maximum(trans_ns - window_L, 0.0) + np.maximum(agg_ns - 2 * window_L, 0.0)
    return 4 * exchange_L + 3 * compute_L + exposed_L
