"""Placement policies behind one interface: what to copy before a step, after a gate, and who owns what."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from raymoe.placement.loads import predict
from raymoe.placement.materialise import materialise
from raymoe.placement.plan import LayerPlan, PlacementState, Plan, owned


@runtime_checkable
class Policy(Protocol):
    """Pure functions of their arguments: ranks that call them with equal arguments get equal answers.

    L = MoE layers, E = experts, D = ranks, W = steps of history.
    """

    name: str

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """The next step's plan from the loads of the last steps, history int64 [W, L, E], oldest first, W >= 0."""
        ...

    def calibrate(self, layer: int, loads: np.ndarray, plan: Plan) -> LayerPlan:
        """The layer's placement once the gate has spoken, loads int64 [D, E] being the rows each rank routed."""
        ...

    def reshard(self, history: np.ndarray, state: PlacementState) -> np.ndarray:
        """Owners int64 [L, E] for the steps to come; equal to ``state.owners`` when nothing should move."""
        ...


class _FixedOwners:
    """What policies do that neither calibrate nor re-shard."""

    def calibrate(self, layer: int, loads: np.ndarray, plan: Plan) -> LayerPlan:
        """The plan's layer unchanged: calibration after the gate is off unless the policy overrides it."""
        return plan.layer(layer)

    def reshard(self, history: np.ndarray, state: PlacementState) -> np.ndarray:
        """The present owners: nothing moves."""
        return state.owners


class ExpertParallel(_FixedOwners):
    """Plain expert parallelism: tokens go to the owner, experts stay. The baseline of every comparison."""

    name = "ep"

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """No copies, nothing moves; the history is not looked at."""
        return Plan.whole(state.owners, owned(state.owners, state.cluster.num_devices), state.expert_bytes)


class Fssdp(_FixedOwners):
    """Fully sharded sparse data parallelism: hot experts are materialised where their copies hide behind attention.

    Source: arXiv 2502.02581, Algorithm 1 on the mean load of the last ``state.window`` steps.
    """

    name = "fssdp"

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """Copies by Algorithm 1, layer by layer. No history, t = 0, m = 0 or one rank: no copies and no communication.

        Raises:
            ValueError: history is not [W, L, E] with the L and E of ``state.owners``.
        """
        loads = predict(history, state.window)
        if loads.shape != state.owners.shape:
            raise ValueError(
                f"history is of {loads.shape[0]} layers x {loads.shape[1]} experts, "
                f"the owners are of {state.owners.shape[0]} x {state.owners.shape[1]}"
            )
        copies = np.stack(
            [
                materialise(owners_E, loads_E, state.overlap_degree, state.extra_slots, state.cluster)
                for owners_E, loads_E in zip(state.owners, loads, strict=True)
            ]
        )
        return Plan.whole(state.owners, copies, state.expert_bytes)


_POLICIES: dict[str, Policy] = {p.name: p for p in (ExpertParallel(), Fssdp())}


def policy_names() -> tuple[str, ...]:
    """The names that ``policy`` knows."""
    return tuple(_POLICIES)


def policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: no such policy; the message lists those there are.
    """
    if name not in _POLICIES:
        raise ValueError(f"no placement policy {name!r}; there are: {', '.join(policy_names())}")
    return _POLICIES[name]
