"""What holds for every rival, on any cluster and any loads."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from raymoe.placement import (
    Base,
    LayerPlan,
    LoadTrace,
    PlacementState,
    Plan,
    Policy,
    dispatch_counts,
    expert_memory,
    simulate,
)
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals import RIVALS
from raymoe.placement.rivals.replicas import ResidentReplicas
from tests.placement.rivals.cases import Case, cases, cluster_of, even_state, started

NAMES = [
    "fsdp",
    "fastermoe",
    "fastermoe-device",
    "smartmoe",
    "flexmoe",
    "pro-prophet",
    "eplb",
    "laer",
    "symi",
    "lazarus",
]
NAMES += ["fssdp-exhaustive"]
every_rival = pytest.mark.parametrize("rival", RIVALS, ids=NAMES)
some_cases = settings(max_examples=25, deadline=None)


def test_names_and_order():
    assert [rival.name for rival in RIVALS] == NAMES


@every_rival
def test_answers_the_protocol_and_says_where_it_is_from(rival):
    assert isinstance(rival, Policy)
    assert rival.source
    assert rival.assumed
    assert type(rival).__doc__


@every_rival
@some_cases
@given(case=cases())
def test_plans_keep_to_their_slots(rival, case):
    state = started(rival, case.state)
    plan = rival.prepare(case.history, state)
    calibrated = [rival.calibrate(layer, rows, plan, state) for layer, rows in enumerate(case.rows.transpose(1, 0, 2))]
    assert plan.copies.shape == state.base.resident.shape
    if rival.name == "fsdp":
        assert plan.copies.all()
    elif plan.layout == "sliced" or isinstance(rival, ResidentReplicas):
        assert plan.copies.sum(axis=1).max() <= case.most_per_rank
        assert all((each.copies == plan.copies[layer]).all() for layer, each in enumerate(calibrated))
    else:
        assert plan.layer(0).extra_copies().sum(axis=0).max() <= state.extra_slots
        assert max(each.extra_copies().sum(axis=0).max() for each in calibrated) <= state.extra_slots
    if plan.layout == "whole":
        assert (plan.owners == state.base.owners).all()
        assert (plan.copies >= state.base.resident).all()


@every_rival
@some_cases
@given(case=cases())
def test_resharding_keeps_every_expert_and_the_slots(rival, case):
    state = started(rival, case.state)
    moved = rival.reshard(case.history, state)
    assert moved.resident.shape == state.base.resident.shape
    assert moved.resident.sum(axis=1).max() <= case.most_per_rank
    if rival.interval is None:
        assert moved is state.base


@every_rival
@some_cases
@given(case=cases())
def test_equal_arguments_give_equal_answers(rival, case):
    def answers(case: Case) -> tuple:
        state = started(rival, case.state)
        plan = rival.prepare(case.history, state)
        moved = rival.reshard(case.history, state)
        late = rival.calibrate(0, case.rows[:, 0], plan, state)
        return plan.digest(), moved.owners.tobytes(), moved.resident.tobytes(), late.copies.tobytes()

    first = answers(case)
    assert answers(Case(case.state, case.history.copy(), case.rows.copy())) == first


@every_rival
@some_cases
@given(case=cases())
def test_no_history_is_equal_loads(rival, case):
    state = started(rival, case.state)
    nothing, equal = case.history[:0], np.ones((1, *case.history.shape[1:]), dtype=np.int64)
    assert rival.prepare(nothing, state).digest() == rival.prepare(equal, state).digest()
    assert (rival.reshard(nothing, state).resident == rival.reshard(equal, state).resident).all()


@every_rival
def test_one_rank_moves_nothing(rival):
    state = started(rival, even_state(cluster_of(1), 4, extra_slots=2, num_layers=2))
    plan = rival.prepare(np.array([[[9, 1, 0, 0], [0, 0, 1, 9]]]), state)
    late = rival.calibrate(0, np.array([[9, 1, 0, 0]]), plan, state)
    assert not any(plan.bytes.values())
    assert late.copies.shape == (4, 1)
    assert rival.reshard(np.ones((1, 2, 4), dtype=np.int64), state).moved_from(state.base) == 0


@pytest.mark.parametrize(
    "rival", [each for each in RIVALS if each.name not in ("fsdp", "fastermoe", "fastermoe-device")]
)
def test_history_of_another_model_is_refused(rival):
    state = started(rival, even_state(cluster_of(2), 4))
    with pytest.raises(ValueError, match="history is of 1 layers x 3 experts, the owners are of 1 x 4"):
        (rival.reshard if rival.interval else rival.prepare)(np.zeros((1, 1, 3), dtype=np.int64), state)


class Recorder(PolicyDefaults):
    """A rival that re-shards every other step, and keeps what it answered."""

    interval: int | None = 2

    def __init__(self, rival: Policy):
        self.rival = rival
        self.name, self.source, self.assumed = rival.name, rival.source, rival.assumed
        self.rematerialise, self.knows_loads = rival.rematerialise, rival.knows_loads
        self.plans: list[Plan] = []
        self.layer_plans: list[LayerPlan] = []

    def start(self, base: Base, state: PlacementState) -> Base:
        return self.rival.start(base, state)

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        self.plans.append(self.rival.prepare(history, state))
        return self.plans[-1]

    def calibrate(self, layer: int, loads: np.ndarray, plan: Plan, state: PlacementState) -> LayerPlan:
        self.layer_plans.append(self.rival.calibrate(layer, loads, plan, state))
        return self.layer_plans[-1]

    def reshard(self, history: np.ndarray, state: PlacementState) -> Base:
        return self.rival.reshard(history, state)


@every_rival
@pytest.mark.parametrize("num_experts", [3, 10])
def test_simulation_computes_every_routed_row(rival, num_experts):
    rng = np.random.default_rng(3)
    popularity = rng.dirichlet(np.full(num_experts, 0.3), size=2)
    rows = np.array([[[rng.multinomial(500, each) for each in popularity] for _ in range(4)] for _ in range(6)])
    rows[4] = 0
    trace, cluster = LoadTrace(rows), cluster_of(2, 2)
    state = even_state(cluster, num_experts, expert_bytes=300, attention_ns=400)
    recorder = Recorder(rival)
    simulation = simulate(trace, recorder, cluster, state.workload, extra_slots=2)
    assert len(recorder.plans) == 6
    assert len(recorder.layer_plans) == 12
    for index, layer_plan in enumerate(recorder.layer_plans):
        step, layer = divmod(index, 2)
        counts = dispatch_counts(rows[step, :, layer], layer_plan, cluster, recorder.plans[step].dispatch)
        assert (counts.sum(axis=2) == rows[step, :, layer]).all()
        assert (counts * (layer_plan.copies == 0)).sum() == 0
        busiest = int(counts.sum(axis=(0, 1)).max())
        assert simulation.layers[step][layer].compute_ns == busiest
    assert np.isfinite(simulation.of("moe_ns")).all()
    workload = replace(state.workload, rematerialise=rival.rematerialise)
    placed = [
        replace(plan, copies=np.stack([each.copies for each in recorder.layer_plans[2 * step : 2 * step + 2]]))
        for step, plan in enumerate(recorder.plans)
    ]
    assert simulation.memory_bytes == max(int(expert_memory(plan, workload).max()) for plan in placed)
