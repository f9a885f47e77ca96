"""Policies side by side on one trace, cluster and workload: one row each, simulated.

S = steps, L = MoE layers, E = experts, D = ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.loads import DEFAULT_WINDOW, Forecast
from raymoe.placement.memory import expert_memory
from raymoe.placement.plan import Base, Plan
from raymoe.placement.policy import ExpertParallel, Policy
from raymoe.placement.sharding import even_owners
from raymoe.placement.simulate import Simulation, simulate
from raymoe.placement.state import PlacementState
from raymoe.placement.trace import LoadTrace
from raymoe.placement.workload import Workload

DEFAULT_SKIP = 10
"""Steps at the start that are not counted: histories fill, and policies that move experts have not moved any yet."""

MEMORY_SHARE_PERCENT = 80
"""Of a device's memory, what its experts may take; the rest is for dense parameters, activations and buffers. Ours."""


def compare(
    trace: LoadTrace,
    policies: Sequence[Policy],
    cluster: ClusterSpec,
    workload: Workload,
    *,
    extra_slots: int | None = None,
    window: int = DEFAULT_WINDOW,
    skip: int = DEFAULT_SKIP,
    on_step: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Simulates every policy and says what it brought: ``summarise`` of ``simulate_all``, which have the details."""
    simulations = simulate_all(
        trace, policies, cluster, workload, extra_slots=extra_slots, window=window, on_step=on_step
    )
    return summarise(simulations, trace, policies, cluster, workload, extra_slots=extra_slots, skip=skip)


def with_baseline(policies: Sequence[Policy]) -> list[Policy]:
    """The policies with expert parallelism first, whether it was among them or not: all are read against it."""
    others = [policy for policy in policies if policy.name != ExpertParallel.name]
    return [*([each for each in policies if each.name == ExpertParallel.name] or [ExpertParallel()]), *others]


def simulate_all(
    trace: LoadTrace,
    policies: Sequence[Policy],
    cluster: ClusterSpec,
    workload: Workload,
    *,
    extra_slots: int | None = None,
    window: int = DEFAULT_WINDOW,
    forecast: Forecast = "mean",
    on_step: Callable[[], None] | None = None,
) -> list[Simulation]:
    """One simulation a policy, in the order of ``with_baseline``.

    Args:
        extra_slots: m; None: what ``slots_in_memory`` finds for the policy's schedule and its kind of copies.
        on_step: called after each step of each policy.

    Raises:
        ValueError: a trace that cannot be split over the cluster's ranks.
    """
    trace = trace.for_ranks(cluster.num_devices)
    return [
        simulate(
            trace,
            policy,
            cluster,
            workload,
            extra_slots=_slots(extra_slots, policy, trace, cluster, workload),
            window=window,
            forecast=forecast,
            on_step=on_step,
        )
        for policy in with_baseline(policies)
    ]


def slots_in_memory(
    num_layers: int, num_experts: int, workload: Workload, cluster: ClusterSpec, *, is_resident: bool = False
) -> int:
    """m: copies a layer that fit beside an even share of the experts in ``MEMORY_SHARE_PERCENT`` of a device's memory, from
    0 to ``num_experts``, which is also the answer where the memory is not known. Counted as ``expert_memory`` counts.

    Args:
        is_resident: the copies live there with their optimizer state.
    """
    if cluster.memory_bytes is None:
        return num_experts
    even = even_owners(num_layers, num_experts, cluster.num_devices)
    home = _memory(Base.of_owners(even, cluster.num_devices), None, workload).max()
    # memory is linear in the copies a layer: what a rank takes that owns nothing and has one in each is the price of a slot
    owners, copies = np.zeros((num_layers, 1), dtype=np.int64), np.ones((num_layers, 1, 2), dtype=np.uint8)
    slot = _memory(Base(owners, copies) if is_resident else Base.of_owners(owners, 2), copies, workload)[1]
    free = cluster.memory_bytes * MEMORY_SHARE_PERCENT // 100 - int(home)
    return min(max(free // int(slot), 0), num_experts)


def _memory(base: Base, copies: np.ndarray | None, workload: Workload) -> np.ndarray:
    return expert_memory(Plan.of(base, base.resident if copies is None else copies, workload), workload)


def summarise(
    simulations: Sequence[Simulation],
    trace: LoadTrace,
    policies: Sequence[Policy],
    cluster: ClusterSpec,
    workload: Workload,
    *,
    extra_slots: int | None = None,
    skip: int = DEFAULT_SKIP,
) -> list[dict[str, Any]]:
    """One row a simulation, of the steps after the first ``skip``. Layers and steps in which nothing was routed do not count.

    - policy, is_bound (it was told the loads), rematerialises, interval (of re-sharding, None: never), extra_slots (m)
    - moe_ms, moe_p5_ms, moe_p95_ms: one MoE layer's step without its attention, geometric mean and spread over steps and
      layers; cold_ms: the same mean over the first ``skip`` steps, None if there are none
    - step_ms: all layers and their attention, forward and backward, mean over steps; it is the sum of attention_ms,
      compute_ms, all_to_all_ms, exposed_ms and reshard_ms
    - speedup_over_ep (of moe_ms), step_speedup_over_ep
    - ideal_share: even computation without any transfer, over the time taken; geometric mean
    - imbalance: rows of the busiest device over the mean; mean
    - bytes, near_bytes, far_bytes: moved in a step over all links, within and between nodes, without re-sharding
    - memory_bytes: of experts on the fullest device, over all steps; memory_share: of the device's memory, None if not
      known; fits: whether that leaves the rest its part, None if not known
    - copies: that travelled, a layer and step; forecast_error; plan_ms: measured here, a layer, median over steps

    Raises:
        ValueError: no step is left after ``skip``.
    """
    if not 0 <= skip < trace.num_steps:
        raise ValueError(
            f"skip = {skip}: the trace has {trace.num_steps} steps, and at least one must be left to count"
        )
    trace = trace.for_ranks(cluster.num_devices)
    routed_SL = trace.rows.sum(axis=(1, 3)) > 0
    policies = with_baseline(policies)
    rows = [
        {
            "policy": policy.name,
            "is_bound": policy.knows_loads,
            "rematerialises": policy.rematerialise,
            "interval": policy.interval,
            "extra_slots": _slots(extra_slots, policy, trace, cluster, workload),
            **_summary(simulation, routed_SL, workload, cluster, skip),
        }
        for simulation, policy in zip(simulations, policies, strict=True)
    ]
    for row in rows:
        row["speedup_over_ep"] = _ratio(rows[0]["moe_ms"], row["moe_ms"])
        row["step_speedup_over_ep"] = _ratio(rows[0]["step_ms"], row["step_ms"])
    return rows


def _summary(
    simulation: Simulation, routed_SL: np.ndarray, workload: Workload, cluster: ClusterSpec, skip: int
) -> dict[str, Any]:
    moe_SL = simulation.of("moe_ns")
    counted_SL = routed_SL.copy()
    counted_SL[:skip] = False
    moe = moe_SL[counted_SL]
    links = (simulation.of("row_links") + simulation.of("copy_links"))[skip:].sum(axis=1).mean(axis=0)
    parts = {
        "attention_ms": moe_SL.shape[1] * workload.attention_ns * (1 + workload.backward_window) / 1e6,
        "compute_ms": workload.forwards * _per_step_ms(simulation.of("compute_ns")[skip:]),
        "all_to_all_ms": workload.exchanges * _per_step_ms(simulation.of("all_to_all_ns")[skip:]),
        "exposed_ms": _per_step_ms(simulation.of("exposed_ns")[skip:]),
        "reshard_ms": float(simulation.reshard_ns[skip:].mean()) / 1e6,
    }
    low, high = np.percentile(moe, [5, 95]) / 1e6 if moe.size else (0.0, 0.0)
    memory = cluster.memory_bytes
    return {
        "moe_ms": _geometric_mean(moe) / 1e6,
        "step_ms": sum(parts.values()),
        "ideal_share": _geometric_mean(simulation.of("ideal_ns")[counted_SL] / moe) if moe.size else 1.0,
        "imbalance": float(simulation.of("imbalance")[counted_SL].mean()) if moe.size else 1.0,
        "bytes": round(float(links.sum())),
        "near_bytes": round(float(links[0])),
        "far_bytes": round(float(links[1])),
        "memory_bytes": simulation.memory_bytes,
        "memory_share": simulation.memory_bytes / memory if memory else None,
        "fits": simulation.memory_bytes * 100 <= memory * MEMORY_SHARE_PERCENT if memory else None,
        **parts,
        "moe_p5_ms": float(low),
        "moe_p95_ms": float(high),
        "cold_ms": _geometric_mean(moe_SL[:skip][routed_SL[:skip]]) / 1e6 if skip else None,
        "copies": float(simulation.num_copies[skip:].mean()),
        "forecast_error": float(simulation.forecast_error[skip:].mean()),
        "plan_ms": float(np.median(simulation.plan_ns[skip:])) / moe_SL.shape[1] / 1e6,
    }


def _slots(extra_slots: int | None, policy: Policy, trace: LoadTrace, cluster: ClusterSpec, workload: Workload) -> int:
    if extra_slots is not None:
        return extra_slots
    num_layers, num_experts = trace.num_layers, trace.num_experts
    schedule = workload.with_schedule(rematerialise=policy.rematerialise)
    slots = slots_in_memory(num_layers, num_experts, schedule, cluster)
    even = Base.of_owners(even_owners(num_layers, num_experts, cluster.num_devices), cluster.num_devices)
    start = policy.start(even, PlacementState(even, cluster, schedule, slots))
    if np.count_nonzero(start.resident) == start.owners.size:
        return slots
    return slots_in_memory(num_layers, num_experts, schedule, cluster, is_resident=True)


def _per_step_ms(ns_SL: np.ndarray) -> float:
    return float(ns_SL.sum(axis=1).mean()) / 1e6


def _geometric_mean(values: np.ndarray) -> float:
    """0 if there are no values. None of them is 0: a layer with a row computes."""
    return float(np.exp(np.log(values).mean())) if values.size else 0.0


def _ratio(baseline: float, value: float) -> float:
    """How many times faster; 1 where both take no time."""
    return baseline / value if value else 1.0
