import numpy as np
import pytest
from hypothesis import given, settings

from raymoe.placement import PlacementState, Plan, layer_cost, policy
from raymoe.placement.fssdp import TIMING
from raymoe.placement.rivals import FssdpExhaustive
from tests.placement.rivals.cases import cases, cluster_of, even_state, history_of, holders


@pytest.mark.parametrize(
    ("expert_bytes", "extra_slots", "expected"),
    [(249, 1, [[0, 1], [0, 1]]), (251, 1, [[0], [1]]), (249, 0, [[0], [1]]), (249, 2, [[0, 1], [0, 1]])],
)
def test_best_by_hand(expert_bytes, extra_slots, expected):
    """100 and 20 rows on two ranks without attention: transfers hide behind the experts of a layer, twice that in backward.

    none: 4 * 50 + 3 * 100 = 500; 0: 4 * 10 + 3 * 70 + (X - 70) + (X - 140) = 40 + 2 X; both, as each rank takes one:
    3 * 60 + (X - 60) + (X - 120) = 2 X: X < 250.
    """
    state = even_state(cluster_of(2), 2, extra_slots=extra_slots, expert_bytes=expert_bytes)
    assert holders(FssdpExhaustive().prepare(history_of([100, 20]), state).copies[0]) == expected


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_nothing_that_fssdp_finds_is_faster(case):
    state, num_devices = case.state, case.state.cluster.num_devices
    loads = case.history[:1] * num_devices if case.history.size else case.history

    def moe_ns(plan: Plan, state: PlacementState) -> float:
        rows = np.broadcast_to(loads[0] // num_devices, (num_devices, *loads.shape[1:]))
        layers = range(plan.num_layers)
        costs = (layer_cost(plan.layer(i), rows[:, i], state.workload, state.cluster, timing=TIMING) for i in layers)
        return sum(cost.moe_ns for cost in costs)

    if loads.any(axis=-1).all() and loads.size:
        best = moe_ns(FssdpExhaustive().prepare(loads, state), state)
        for name in ("ep", "fssdp-known", "fssdp-paper"):
            assert best <= moe_ns(policy(name).prepare(loads, state), state)
