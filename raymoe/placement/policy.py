"""What every placement policy answers: what to copy before a step, after a gate, and where experts live."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from raymoe.placement.loads import predict
from raymoe.placement.plan import Base, LayerPlan, Plan, owned
from raymoe.placement.state import PlacementState


@runtime_checkable
class Policy(Protocol):
    """Pure functions of their arguments: ranks that call them with equal arguments get equal answers.

    L = MoE layers, E = experts, D = ranks, W = steps of history.
    """

    name: str

    source: str
    """Where the algorithm is from."""

    assumed: str
    """What had to be assumed where the source is silent, or does not fit; empty for our own."""

    rematerialise: bool
    """Whether copies are freed after forward and gathered again in backward."""

    calibrates: bool
    """Whether ``calibrate`` may answer anything but the plan: the runtime asks for every rank's rows only then."""

    materialises: bool
    """Whether its plans may hold copies that do not live where they are; without them no slots are kept free."""

    interval: int | None
    """Steps between calls of ``reshard``; None: never."""

    knows_loads: bool
    """Whether it is told the step's loads before the step: a bound, not a policy one can run."""

    weighs_dispatch: bool
    """Whether its plans differ in how rows find a copy."""

    keeps_whole: bool
    """Whether an expert lives whole wherever it lives; where experts are sliced over ranks it can only be simulated."""

    def needs_costs(self, overlap_degree: int | None) -> bool:
        """Whether its plans depend on the times in cluster and workload, so that they must be known first."""
        ...

    def start(self, base: Base, state: PlacementState) -> Base:
        """The base that the policy begins with, given an even split; nothing is charged for coming to it."""
        ...

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """The next step's plan from the loads of the last steps, history int64 [W, L, E], oldest first, W >= 0."""
        ...

    def calibrate(self, layer: int, loads: np.ndarray, plan: Plan, state: PlacementState) -> LayerPlan:
        """The layer's placement once the gate has spoken, loads int64 [D, E] being the rows each rank routed."""
        ...

    def reshard(self, history: np.ndarray, state: PlacementState) -> Base:
        """Where experts live in the steps to come; ``state.base`` itself when nothing should move."""
        ...


class PolicyDefaults:
    """What policies do that keep no replicas, neither calibrate nor re-shard, and gather copies once."""

    assumed = ""
    rematerialise = False
    calibrates = False
    materialises = True
    interval: int | None = None
    knows_loads = False
    weighs_dispatch = False
    keeps_whole = True

    def needs_costs(self, overlap_degree: int | None) -> bool:
        """No: loads alone decide."""
        return False

    def start(self, base: Base, state: PlacementState) -> Base:
        """The even split itself."""
        return base

    def calibrate(self, layer: int, loads: np.ndarray, plan: Plan, state: PlacementState) -> LayerPlan:
        """The plan's layer unchanged."""
        return plan.layer(layer)

    def reshard(self, history: np.ndarray, state: PlacementState) -> Base:
        """The present base: nothing moves."""
        return state.base


class ExpertParallel(PolicyDefaults):
    """Plain expert parallelism: tokens go to the owner, experts stay. The baseline of every comparison."""

    name = "ep"
    source = "GShard (arXiv 2006.16668)"
    materialises = False

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """No copies, nothing moves; the history is not looked at."""
        return Plan.of(state.base, owned(state.base.owners, state.cluster.num_devices), state.workload)


def expected_loads(history: np.ndarray, state: PlacementState) -> np.ndarray:
    """The forecast for a step, int64 [L, E] in units of 1/``LOAD_SCALE`` rows.

    Raises:
        ValueError: history is not [W, L, E] with the L and E of the owners.
    """
    loads, shape = predict(history, state.window, state.forecast), state.base.owners.shape
    if loads.shape != shape:
        raise ValueError(
            f"history is of {loads.shape[0]} layers x {loads.shape[1]} experts, the owners are of {shape[0]} x {shape[1]}"
        )
    return loads
