from dataclasses import replace

import numpy as np
import pytest

from raymoe.placement.rivals import Eplb
from tests.placement.rivals.cases import cluster_of, even_state, history_of, holders, started


def on_ranks(resident_ED: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(resident_E).tolist()) for resident_E in resident_ED.T]


def test_published_example():
    """The README of github.com/deepseek-ai/EPLB: 12 experts in 4 groups, 16 slots on 2 nodes x 4 ranks, and its answer."""
    loads = history_of(
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]
    )
    moved = Eplb(num_groups=4).reshard(loads, even_state(cluster_of(4, 4), 12, num_layers=2))
    published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for layer, slots in enumerate(published):
        assert on_ranks(moved.resident[layer]) == [set(slots[i : i + 2]) for i in range(0, 16, 2)]


@pytest.mark.parametrize("cluster", [cluster_of(2), cluster_of(1, 1)])
def test_global_example_by_hand(cluster):
    # 4 slots for 3 experts: 60 takes the fourth, 30 a copy; 30 -> 0, 30 -> 1, the other 30 -> 0 (tie), 10 -> 1
    moved = Eplb().reshard(history_of([60, 30, 10]), even_state(cluster, 3))
    assert holders(moved.resident[0]) == [[0, 1], [0], [1]]
    assert moved.owners.tolist() == [[0, 0, 1]]


def test_extra_slots_are_one_redundant_expert_a_rank():
    # 8 slots on 4 ranks for 4 experts: 80 takes three more at 80, 40, 26.7 > 8, one a rank; then 8 for the next
    state = started(Eplb(), even_state(cluster_of(4), 4, extra_slots=3))
    moved = Eplb().reshard(history_of([80, 8, 8, 8]), state)
    assert moved.resident[0].sum(axis=1).tolist() == [4, 2, 1, 1]
    assert moved.resident[0].sum(axis=0).tolist() == [2, 2, 2, 2]


def test_groups_that_nodes_do_not_divide_are_balanced_globally():
    loads, state = history_of([9, 5, 3, 1, 1, 1]), even_state(cluster_of(1, 1), 6, extra_slots=1)
    assert (Eplb(3).reshard(loads, state).resident == Eplb(1).reshard(loads, state).resident).all()
    assert (Eplb(2).reshard(loads, state).resident != Eplb(1).reshard(loads, state).resident).any()


def test_hierarchical_replicas_stay_on_the_node_of_their_group():
    """Groups {0 1}, {2 3}, {4 5}, {6 7} of 80, 40, 30 and 10 rows; nodes are ranks 0 2 and 1 3, 6 slots each.

    Nodes: 80 -> 0, 40 -> 1, 30 -> 1 (40 < 80), 10 -> 0. Node 0, 50 30 6 4: 50 takes a slot, then 30, and both are everywhere;
    25 -> rank 0, 25 -> rank 2, 15 -> 0, 15 -> 2, 6 -> 0, 4 -> 2. Node 1, 25 20 15 15: 25, then 20: 15 -> rank 1, 15 -> 3,
    12.5 -> 1, 12.5 -> 3, 10 -> 1, 10 -> 3.
    """
    cluster = replace(cluster_of(2, 2), node_of=(0, 1, 0, 1))
    moved = Eplb(4).reshard(history_of([50, 30, 25, 15, 20, 10, 6, 4]), even_state(cluster, 8, extra_slots=1))
    assert holders(moved.resident[0]) == [[0, 2], [0, 2], [1, 3], [1], [1, 3], [3], [0], [2]]


def test_same_placement_same_base():
    state = started(Eplb(), even_state(cluster_of(2, 2), 6, extra_slots=1))
    assert Eplb().reshard(history_of([5] * 6), state) is state.base
