import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.rivals.replicas import even_counts, pack, slots_per_rank
from tests.placement.rivals.cases import cluster_of, even_state, holders


def test_slots_are_those_of_an_even_split_and_some():
    # 5 experts on 2 ranks: 3 on the fuller one
    assert [slots_per_rank(even_state(cluster_of(2), 5, extra_slots=m)) for m in (0, 1, 9)] == [3, 4, 5]
    # 8 on 4: 2 each, at most twice that, or what the caller takes at most
    assert [slots_per_rank(even_state(cluster_of(4), 8, extra_slots=m)) for m in (0, 1, 2, 5)] == [2, 3, 4, 4]
    assert [slots_per_rank(even_state(cluster_of(4), 8, extra_slots=m), 1) for m in (0, 1, 2)] == [2, 3, 3]
    assert [slots_per_rank(even_state(cluster_of(4), 8, extra_slots=m), m) for m in (0, 5, 9)] == [2, 7, 8]
    # fewer experts than ranks: one each
    assert [slots_per_rank(even_state(cluster_of(4), 2, extra_slots=m)) for m in (0, 1, 2)] == [1, 2, 2]


def test_even_counts_give_the_first_one_more():
    assert even_counts(3, 8).tolist() == [3, 3, 2]


def test_heaviest_first_to_the_least_loaded():
    # loads a copy 5, 4, 3, 2 on two ranks, two each: 5 -> 0, 4 -> 1, 3 -> 1 (4 < 5), 2 -> 0
    packed = pack(np.array([[5, 4, 3, 2]]), np.ones((1, 4), dtype=np.int64), np.zeros(2, dtype=np.int64))
    assert holders(packed[0]) == [[0], [1], [1], [0]]


def test_copies_of_one_expert_spread_over_nodes():
    # 8 = 4 + 4: rank 0 and then node 1, though rank 1 is as idle; then 1 to the other idle ranks
    packed = pack(np.array([[8, 1, 1]]), np.array([[2, 1, 1]]), np.array([0, 0, 1, 1]))
    assert holders(packed[0]) == [[0, 2], [1], [3]]


def test_a_tie_leaves_the_expert_where_it_is():
    packed = pack(np.array([[3, 3]]), np.ones((1, 2), dtype=np.int64), np.zeros(2, dtype=np.int64), np.array([[1, 0]]))
    assert holders(packed[0]) == [[1], [0]]


def test_a_copy_that_has_only_ranks_with_one_is_left_out():
    # 2 ranks x 3 slots: 20 -> 0, 3 -> 1, 3 -> 1, 3 -> 1 and full; both copies of 0 are for rank 0, which takes one
    packed = pack(np.array([[2, 20, 3, 3, 3]]), np.array([[2, 1, 1, 1, 1]]), np.zeros(2, dtype=np.int64))
    assert holders(packed[0]) == [[0], [0], [1], [1], [1]]


@st.composite
def packings(draw):
    num_experts, num_devices = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    total = draw(st.integers(num_experts, num_experts * num_devices))
    counts = np.ones((3, num_experts), dtype=np.int64)
    for layer_E in counts:
        while layer_E.sum() < total:
            layer_E[rng.choice(np.flatnonzero(layer_E < num_devices))] += 1
    nodes = np.sort(np.append(rng.integers(0, 2, num_devices - 1), 0))
    return rng.integers(0, 50, size=counts.shape), counts, nodes


@given(packings())
def test_every_expert_is_somewhere_and_ranks_are_equally_full(packing):
    loads, counts, nodes = packing
    packed = pack(loads, counts, nodes)
    placed = packed.sum(axis=2)
    assert (placed >= 1).all()
    assert (placed <= counts).all()
    assert packed.sum(axis=1).max() <= -(-int(counts[0].sum()) // nodes.size)
    assert all((pack(loads[i : i + 1], counts[i : i + 1], nodes)[0] == packed[i]).all() for i in range(len(loads)))
