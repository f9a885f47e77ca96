import numpy as np
import pytest

from raymoe.placement.rivals import Laer
from tests.placement.rivals.cases import cluster_of, even_state, history_of, holders


@pytest.mark.parametrize(
    ("row_flops", "expected"),
    [(3, [[0, 2], [1, 3], [1, 3], [0, 2]]), (4, [[0, 1, 2, 3], [2, 3], [0], [1]])],
)
def test_cheaper_candidate_by_hand(row_flops, expected):
    """80, 8, 8 and 8 rows; 2 slots on each of 2 x 2 ranks, between nodes 4 ns a row, within 1.

    Even: 2 copies each. 40 -> ranks 0 and 2, 4 -> 1 and 3, 4 -> 1 and 3, 4 -> 0 and 2. All experts are on both nodes: 1/4 of each
        node's rows goes to its other rank, 52 in all, and rank 0 computes 44. 4 * 52 + 3 * 44 c.
    Queue: one on each node would take all slots, so 1 copy each; 80 takes 1 (40 a copy), then 2 at once, and 8 the last slot.
        20 -> 0, 2, 1 and 3, 8 -> 0, 8 -> 1, 4 -> 2 (20, 20 against 28, 28) and 3, the only slot.
        Within nodes 40 of the 80 and 2 of each 8 travel, between nodes 4 of each 8; rank 0 computes 28.
        4 * (46 + 4 * 12) + 3 * 28 c.
    208 + 132 c < 376 + 84 c up to c = 3.5.
    """
    state = even_state(cluster_of(2, 2, inter_bytes_s=250_000_000), 4, extra_slots=1, row_flops=row_flops)
    past = np.array([[[8, 8, 8, 800]], [[80, 8, 8, 8]]])
    plan = Laer().prepare(past, state)
    assert holders(plan.copies[0]) == expected
    assert (plan.layout, plan.dispatch) == ("sliced", "node")
    assert plan.owners[0].tolist() == [ranks[0] for ranks in expected]


def test_bytes_do_not_depend_on_the_layout():
    # 2 experts on each of 4 ranks, 3/4 of each from the others; 2 x because they are gathered again in backward
    state = even_state(cluster_of(2, 2), 4, extra_slots=1, rematerialise=Laer.rematerialise)
    for loads in ([80, 8, 8, 8], [1, 1, 1, 1]):
        plan = Laer().prepare(history_of(loads), state)
        assert plan.bytes == {"sparse_all_gather": 2 * 8 * 75, "sparse_reduce_scatter": 8 * 75}


def test_no_slots_no_copies():
    plan = Laer().prepare(history_of([80, 8, 8, 8]), even_state(cluster_of(2, 2), 4))
    assert plan.copies.sum() == 4


def test_queue_starts_with_one_copy_a_node_if_that_leaves_slots():
    # 8 slots, 3 experts, 2 nodes: 2 each to begin with, and 80 takes the last 2; from 1 each it would be 4, 3, 1
    state = even_state(cluster_of(2, 2), 3, extra_slots=1, row_flops=1000)
    assert Laer().prepare(history_of([80, 8, 4]), state).copies[0].sum(axis=1).tolist() == [4, 2, 2]
