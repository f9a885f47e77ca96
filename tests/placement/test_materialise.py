"""Algorithm 1: by hand, against a copy-by-copy oracle, and its invariants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import ClusterSpec, even_owners, materialise, overlap_degree
from tests.placement.strategies import Case, cases, cluster_of


def holders(copies_ED: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in copies_ED]


def run(case: Case) -> np.ndarray:
    return materialise(case.owners_E, case.loads_E, case.t, case.m, case.cluster)


def test_by_hand_hottest_everywhere_when_memory_allows():
    case = Case(cluster_of(2, 2), np.array([0, 1, 2, 3]), np.array([10, 60, 20, 10]), t=2, m=2)
    assert holders(run(case)) == [[0], [0, 1, 2, 3], [0, 1, 2, 3], [3]]


def test_by_hand_memory_bound():
    # 4 slots over Top = {0, 1, 2} by 50 : 30 : 20 -> 2, 1.2, 0.8 -> 2, 1, 1. Ranks own 50, 30, 20 and 0; in turns over the
    # nodes, the idlest first: 1, 3, 0, 2. Expert 0 is dealt 1 and 3, expert 1 rank 0, expert 2 rank 2, its owner, which
    # changes with the copy of expert 0 on its node
    case = Case(cluster_of(2, 2), np.array([0, 1, 2, 3]), np.array([50, 30, 20, 0]), t=3, m=1)
    assert holders(run(case)) == [[0, 1, 2], [0, 1], [2, 3], [3]]


def test_by_hand_surplus_goes_to_the_next_expert():
    # 8 slots over Top by 97 : 2 : 1 -> 8, 0, 0; expert 0 can use 3, expert 1 takes 3 of the surplus, expert 2 the rest,
    # which is on ranks 0 and 1 by then
    case = Case(cluster_of(4), np.array([0, 1, 2, 3]), np.array([97, 2, 1, 0]), t=3, m=2)
    assert holders(run(case)) == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2], [3]]


@st.composite
def memory_bound(draw):
    cluster = cluster_of(*[draw(st.integers(1, 4))] * draw(st.integers(2, 4)))
    num_experts, m = draw(st.integers(6, 16)), draw(st.integers(1, 3))
    loads = np.array(draw(st.lists(st.integers(1, 50), min_size=num_experts, max_size=num_experts)))
    owners = np.arange(num_experts) * cluster.num_devices // num_experts
    return Case(cluster, owners, loads, t=draw(st.integers(m + 1, num_experts)), m=m)


@given(memory_bound())
def test_shares_follow_the_loads(case):
    extra = run(case).sum(axis=1, dtype=np.int64) - 1
    top = np.argsort(-case.loads_E, kind="stable")[: case.t]
    # shares fall with the loads; but an expert that was dealt its own owner lacks a copy where no change was found, and that slot
    # goes to a colder one
    assert (np.diff(extra[top]) <= 2).all()


@given(memory_bound())
def test_copies_spread_over_nodes(case):
    copies = run(case)
    per_node = copies @ case.cluster.members.T
    sizes = case.cluster.devices_on
    for e in np.argsort(-case.loads_E, kind="stable")[: case.t]:
        # a node has more than others only by the owner, by a change, and by a slot that no change found a use for
        lacking = per_node[e] < np.minimum(per_node[e].max() - 3, sizes)
        assert not lacking.any()


@given(cases())
def test_owners_keep_their_experts(case):
    assert (run(case)[np.arange(len(case.owners_E)), case.owners_E] == 1).all()


@given(cases())
def test_no_rank_gets_more_than_its_slots(case):
    extra = run(case).sum(axis=0) - np.bincount(case.owners_E, minlength=case.cluster.num_devices)
    assert extra.max() <= case.m


@given(cases())
def test_only_the_hottest_are_copied(case):
    top = np.argsort(-case.loads_E, kind="stable")[: case.t]
    copied = np.flatnonzero(run(case).sum(axis=1) > 1)
    assert set(copied) <= set(top)


@given(cases())
def test_no_slot_stays_free_that_a_hot_expert_could_use(case):
    copies = run(case)
    top = [e for e in np.argsort(-case.loads_E, kind="stable")[: case.t] if case.loads_E[e]]
    extra = copies.sum(axis=0) - np.bincount(case.owners_E, minlength=case.cluster.num_devices)
    if case.m and case.cluster.num_devices > 1:
        assert copies[top][:, extra < case.m].all()


@given(cases())
def test_repeats_itself(case):
    assert (run(case) == run(case)).all()


@pytest.mark.parametrize(("t", "m", "ranks"), [(0, 4, 4), (4, 0, 4), (4, 4, 1)])
def test_nothing_to_gain_copies_nothing(t, m, ranks):
    owners = even_owners(1, 8, ranks)[0]
    copies = materialise(owners, np.arange(8), t, m, ClusterSpec.even(1, ranks, intra_bytes_s=1))
    assert holders(copies) == [[int(owner)] for owner in owners]


def test_experts_nobody_wants_are_not_copied():
    copies = materialise(np.array([0, 1, 2]), np.zeros(3, dtype=np.int64), 2, 2, cluster_of(3))
    assert holders(copies) == [[0], [1], [2]]


def test_one_expert_goes_everywhere():
    assert holders(materialise(np.array([1]), np.array([7]), 4, 1, cluster_of(2, 1))) == [[0, 1, 2]]


def test_ties_go_to_the_lower_index():
    assert holders(materialise(np.array([0, 1, 1]), np.array([3, 3, 3]), 1, 1, cluster_of(2))) == [[0, 1], [1], [1]]


@pytest.mark.parametrize(
    ("time_ns", "bandwidth", "expert_bytes", "t"),
    [
        (1_800_000, 12_500_000_000, 4_718_592, 4),  # cluster A of the fact sheet
        (1_000_000_000, 10, 10, 1),
        (999_999_999, 10, 10, 0),
        (0, 10, 10, 0),
    ],
)
def test_overlap_degree_is_the_floor(time_ns, bandwidth, expert_bytes, t):
    assert overlap_degree(time_ns, bandwidth, expert_bytes) == t


def test_overlap_degree_refuses_an_empty_expert():
    with pytest.raises(ValueError, match="at least 1 byte"):
        overlap_degree(1, 1, 0)
