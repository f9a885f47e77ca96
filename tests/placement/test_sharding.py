import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import check_owners, even_owners, heterogeneous_owners
from tests.placement.strategies import cluster_of, clusters

sizes = st.integers(1, 40)


@given(st.integers(1, 4), sizes, sizes)
def test_runs_are_contiguous_and_as_equal_as_can_be(num_layers, num_experts, num_devices):
    owners = even_owners(num_layers, num_experts, num_devices)
    assert owners.shape == (num_layers, num_experts)
    assert (np.diff(owners, axis=1) >= 0).all()
    owned = np.bincount(owners[0], minlength=num_devices)
    assert owned.max() - owned.min() <= 1


@given(sizes, sizes)
def test_follows_the_formula(num_experts, num_devices):
    expected = [e * num_devices // num_experts for e in range(num_experts)]
    assert even_owners(1, num_experts, num_devices)[0].tolist() == expected


def test_no_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts = 0"):
        even_owners(1, 0, 2)


def test_uneven_owners_pass():
    owners = np.array([[2, 2, 2, 0], [1, 1, 1, 1]], dtype=np.int32)
    assert check_owners(owners, 3).dtype == np.int64


def test_a_rank_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"owners\[1, 2\] = 3, but the ranks are 0..2"):
        check_owners(np.array([[0, 1, 2], [0, 1, 3]]), 3)


@pytest.mark.parametrize(
    "owners", [np.zeros((1, 2, 3), dtype=int), np.zeros(3), np.zeros((0, 3), dtype=int), np.int64(0)]
)
def test_wrong_arrays_are_refused(owners):
    with pytest.raises(ValueError, match="owners must be integers"):
        check_owners(owners, 2)


@st.composite
def reshardings(draw):
    cluster = draw(clusters)
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loads = rng.zipf(1.6, size=shape).clip(max=10**6) * rng.integers(0, 2, size=shape)
    present = rng.integers(cluster.num_devices, size=shape)
    return loads, rng.integers(0, shape[1] + 1, size=shape[0]), cluster, present


@given(reshardings())
def test_algorithm_2_gives_every_rank_equally_many_experts(case):
    loads, num_copied, cluster, present = case
    owners = heterogeneous_owners(loads, num_copied, cluster, present)
    owned = np.bincount(check_owners(owners, cluster.num_devices).ravel(), minlength=cluster.num_devices)
    assert owned.max() - owned.min() <= 1
    assert (owners == heterogeneous_owners(loads, num_copied, cluster, present)).all()


def test_algorithm_2_by_hand():
    # 2 nodes x 1 rank, 2 slots each. Layer 1 is the heavier in what is not copied: its 9 goes to rank 0, then its 8 to
    # rank 1. Layer 0's hottest will be copied; its 1 goes to rank 0 by the index; the copied one gets the last slot.
    loads = np.array([[50, 1], [9, 8]])
    owners = heterogeneous_owners(loads, np.array([1, 0]), cluster_of(1, 1))
    assert owners.tolist() == [[1, 0], [0, 1]]


def test_nodes_are_filled_before_ranks():
    # node 0 has ranks 0, 1 and node 1 has ranks 2, 3: loads 6, 5, 4, 3 go to nodes 0, 1, 1, 0, each to its idle rank
    owners = heterogeneous_owners(np.array([[6, 5, 4, 3]]), np.array([0]), cluster_of(2, 2))
    assert owners.tolist() == [[0, 2, 3, 1]]


def test_experts_that_may_go_anywhere_stay():
    owners = heterogeneous_owners(np.array([[5, 4, 3, 2]]), np.array([4]), cluster_of(2), np.array([[1, 0, 1, 0]]))
    assert owners.tolist() == [[1, 0, 1, 0]]
