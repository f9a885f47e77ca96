import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import (
    LOAD_SCALE,
    Base,
    ClusterSpec,
    PlacementState,
    Policy,
    even_owners,
    materialise,
    policy,
    policy_names,
)
from tests.placement.strategies import WORKLOAD, cases

CLUSTER = ClusterSpec.even(2, 2, intra_bytes_s=100, inter_bytes_s=10)
HISTORY = np.array([[[9, 1, 1, 1, 1], [1, 1, 1, 1, 9]]])


def state(t: int | None = 1, m: int = 1, window: int = 5) -> PlacementState:
    return PlacementState(Base.of_owners(even_owners(2, 5, 4), 4), CLUSTER, WORKLOAD, m, t, window)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_answers_the_protocol(name):
    assert isinstance(policy(name), Policy)
    assert policy(name).name == name
    assert policy(name).source


def test_an_unknown_policy_lists_the_known_ones():
    with pytest.raises(ValueError, match="'tutel'; there are: ep, fssdp"):
        policy("tutel")


@given(case=cases())
def test_ep_moves_nothing(case):
    plan = policy("ep").prepare(case.loads_E[None, None], case.state())
    assert plan.copies.sum() == case.owners_E.size
    assert plan.bytes == {"sparse_all_gather": 0, "sparse_reduce_scatter": 0}


def test_paper_copies_each_layers_hottest():
    plan = policy("fssdp-paper").prepare(HISTORY, state())
    assert np.argwhere(plan.copies.sum(axis=2) == 4).tolist() == [[0, 0], [1, 4]]
    assert plan.bytes == {"sparse_all_gather": 6000, "sparse_reduce_scatter": 6000}


@given(case=cases())
def test_paper_is_algorithm_1_on_the_forecast(case):
    plan = policy("fssdp-paper").prepare(np.stack([case.loads_E[None]] * 3), case.state())
    expected = materialise(case.owners_E, case.loads_E * LOAD_SCALE, case.t, case.m, case.cluster)
    assert (plan.copies[0] == expected).all()


@pytest.mark.parametrize("name", policy_names())
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_equal_arguments_give_equal_digests(name, case, seed):
    history = np.random.default_rng(seed).integers(0, 50, size=(4, 1, case.owners_E.size))
    digests = {policy(name).prepare(history.copy(), case.state()).digest() for _ in range(2)}
    assert len(digests) == 1


def test_the_window_bounds_what_is_remembered():
    past = np.array([[[90, 0, 0, 0, 0]] * 2, [[0, 0, 0, 0, 9]] * 2])
    only_last = policy("fssdp-paper").prepare(past, state(window=1))
    assert np.flatnonzero(only_last.copies[0].sum(axis=1) == 4).tolist() == [4]


@pytest.mark.parametrize("name", ["fssdp", "fssdp-paper"])
@pytest.mark.parametrize("nothing", [{"t": 0}, {"m": 0}])
def test_no_budget_no_communication(name, nothing):
    plan = policy(name).prepare(HISTORY, state(**nothing))
    assert plan.bytes["sparse_all_gather"] == 0


@pytest.mark.parametrize("name", ["fssdp", "fssdp-paper"])
def test_no_history_no_communication(name):
    plan = policy(name).prepare(np.zeros((0, 2, 5), dtype=np.int64), state(t=4, m=4))
    assert plan.bytes["sparse_all_gather"] == 0


@pytest.mark.parametrize("name", ["fssdp", "fssdp-paper"])
def test_history_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="history is of 1 layers x 3 experts, the owners are of 2 x 5"):
        policy(name).prepare(np.zeros((1, 1, 3), dtype=np.int64), state())
