"""A trace-driven simulator: what a policy would do on a cluster, step by step. Its times are the cost model's.

S = steps, L = MoE layers, E = experts, D = ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.cost import LayerCost, exchange_ns, layer_cost, move_links
from raymoe.placement.loads import DEFAULT_WINDOW, LOAD_SCALE, Forecast, forecast_error, predict
from raymoe.placement.memory import expert_memory
from raymoe.placement.plan import Base
from raymoe.placement.policy import Policy
from raymoe.placement.sharding import even_owners
from raymoe.placement.state import PlacementState
from raymoe.placement.trace import LoadTrace
from raymoe.placement.workload import Workload

_KEPT_HISTORY = 128


@dataclass(frozen=True)
class Simulation:
    """One policy on one trace. Times in nanoseconds; every number is simulated."""

    policy: str
    layers: list[list[LayerCost]]
    """By step and layer."""
    reshard_ns: np.ndarray
    """float64 [S]: moving experts to new homes, before the step."""
    reshard_bytes: np.ndarray
    """int64 [S]: what that moves."""
    memory_bytes: int
    """Of experts on the fullest device, over all steps."""
    num_copies: np.ndarray
    """int64 [S, L]: copies that were made, late ones included."""
    forecast_error: np.ndarray
    """float64 [S, L]: share of the load that the forecast put on the wrong experts."""
    plan_ns: np.ndarray
    """float64 [S]: measured time of planning and calibrating all layers, on this machine."""

    def of(self, field: str) -> np.ndarray:
        """A field of the layers' costs as an array, float64 [S, L] or [S, L, 2]."""
        return np.array([[getattr(cost, field) for cost in step] for step in self.layers], dtype=np.float64)


def simulate(
    trace: LoadTrace,
    policy: Policy,
    cluster: ClusterSpec,
    workload: Workload,
    *,
    extra_slots: int,
    window: int = DEFAULT_WINDOW,
    overlap_degree: int | None = None,
    forecast: Forecast = "mean",
    on_step: Callable[[], None] | None = None,
) -> Simulation:
    """Runs the policy over all steps of the trace, from a cold start: the first step has no history.

    Args:
        trace: its ranks are re-split if the cluster has another number of them.
        extra_slots: m, copies a layer that a device has memory for.
        overlap_degree: t; None: what the policy itself finds.
        forecast: how a policy that looks at a window makes one load of it.
        on_step: called after each step, for a progress bar.

    Raises:
        ValueError: a trace that cannot be split over the cluster's ranks.
    """
    trace = trace.for_ranks(cluster.num_devices)
    workload = workload.with_schedule(rematerialise=policy.rematerialise)
    loads_SLE = trace.rows.sum(axis=1)
    num_steps, num_layers, num_experts = loads_SLE.shape
    even = Base.of_owners(even_owners(num_layers, num_experts, cluster.num_devices), cluster.num_devices)

    def state_of(base: Base, since: int) -> PlacementState:
        return PlacementState(base, cluster, workload, extra_slots, overlap_degree, window, forecast, since)

    base = policy.start(even, state_of(even, 0))
    layers: list[list[LayerCost]] = []
    reshard_ns, plan_ns = np.zeros(num_steps), np.zeros(num_steps)
    reshard_bytes = np.zeros(num_steps, dtype=np.int64)
    num_copies = np.zeros((num_steps, num_layers), dtype=np.int64)
    errors = np.zeros((num_steps, num_layers))
    memory_bytes, changed = 0, 0
    for step in range(num_steps):
        if policy.interval and step and step % policy.interval == 0:
            past = loads_SLE[max(changed, step - _KEPT_HISTORY) : step]
            moved = policy.reshard(past, state_of(base, step - changed))
            if moved is not base:
                links = move_links(base, moved, workload, cluster)
                reshard_ns[step], reshard_bytes[step] = exchange_ns(links, cluster), links.near + links.far
                base, changed = moved, step
        past = loads_SLE[step : step + 1] if policy.knows_loads else loads_SLE[max(0, step - window) : step]
        state = state_of(base, step - changed)
        started = time.perf_counter_ns()
        plan = policy.prepare(past, state)
        layer_plans = [policy.calibrate(layer, trace.rows[step, :, layer], plan, state) for layer in range(num_layers)]
        plan_ns[step] = time.perf_counter_ns() - started
        layers.append(
            [
                layer_cost(
                    layer_plan,
                    trace.rows[step, :, layer],
                    workload,
                    cluster,
                    layout=plan.layout,
                    dispatch=plan.dispatch,
                    timing=plan.timing,
                    late=(layer_plan.copies > plan.copies[layer]).astype(np.uint8),
                )
                for layer, layer_plan in enumerate(layer_plans)
            ]
        )
        placed = replace(plan, copies=np.stack([each.copies for each in layer_plans]))
        memory_bytes = max(memory_bytes, int(expert_memory(placed, workload).max()))
        num_copies[step] = [int(np.count_nonzero(each.extra_copies())) for each in layer_plans]
        errors[step] = forecast_error(predict(past, window, forecast), loads_SLE[step] * LOAD_SCALE)
        if on_step is not None:
            on_step()
    return Simulation(policy.name, layers, reshard_ns, reshard_bytes, memory_bytes, num_copies, errors, plan_ns)
