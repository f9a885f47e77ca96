import numpy as np
import pytest

from raymoe.placement import Base
from raymoe.placement.rivals import FlexMoe
from tests.placement.rivals.cases import cluster_of, even_state, history_of, holders, started, with_base


def test_starts_with_all_slots_full():
    state = started(FlexMoe(), even_state(cluster_of(4), 4, extra_slots=1))
    assert holders(state.base.resident[0]) == [[0, 2], [0, 2], [1, 3], [1, 3]]
    assert state.base.owners.tolist() == [[0, 0, 1, 1]]
    plan = FlexMoe().prepare(history_of([80, 8, 8, 8]), state)
    assert plan.dispatch == "even"
    # nothing is gathered; two ranks sum each expert's gradient: 100 bytes out and 100 back
    assert plan.bytes == {"sparse_all_gather": 0, "sparse_reduce_scatter": 4 * 200}


@pytest.mark.parametrize("cluster", [cluster_of(4), cluster_of(2, 2)])
def test_rounds_by_hand(cluster):
    """80, 8, 8 and 8 rows on ranks {0 1} {2 3} {0 1} {2 3}: ranks have 44, 8, 44 and 8.

    1. hottest a copy is 0 (40); coldest with a copy to give where 0 is not is 2 (4): rank 1 turns it into 0.
       26.7 + 4 on ranks 0, 1 and 2, 8 + 4 on rank 3: 30.7 < 44.
    2. hottest 0 (26.7); 1 is only where 0 is, 2 has one copy left, so 3: rank 3. 24, 28, 24, 28; 28 < 30.7.
       On its node rank 3 could swap its 2 (8) for the 1 (4) of rank 0, but would only trade places with it.
    3. 0 is everywhere; hottest 2 (8), coldest 1 (4): rank 0. 24, 28, 28, 24: neither 28 nor 28 / 24 falls, the end.
    """
    state = started(FlexMoe(), even_state(cluster, 4, extra_slots=1))
    moved = FlexMoe().reshard(history_of([80, 8, 8, 8]), state)
    assert holders(moved.resident[0]) == [[0, 1, 2, 3], [0, 2], [3], [1]]
    assert moved.owners.tolist() == [[0, 0, 3, 1]]
    assert moved.moved_from(state.base) == 2


def test_a_target_is_relieved_by_a_swap():
    """60, 10, 4, 20 and 12 rows on ranks {0 1} {2 3} {2 4}: ranks have 70, 22 and 14.

    Hottest 0 (60), and only 2 has a copy to give, on the idler of ranks 1 and 2: 30 + 10, 4 + 20 and 30 + 12.
    Rank 2 swaps its 4 (12) for the 2 (4) of rank 1, idlest: 40, 32 and 34. Then nothing has a copy to give.
    """
    resident = np.zeros((1, 5, 3), dtype=np.uint8)
    resident[0, [0, 1, 2, 3, 2, 4], [0, 0, 1, 1, 2, 2]] = 1
    state = with_base(even_state(cluster_of(3), 5), Base(np.array([[0, 0, 1, 1, 2]]), resident))
    moved = FlexMoe().reshard(history_of([60, 10, 4, 20, 12]), state)
    assert holders(moved.resident[0]) == [[0, 2], [0], [2], [1], [1]]


def test_every_node_keeps_a_copy_where_it_can():
    # 4 slots a node for 3 experts: node 0 has {0 1} {2 0}, node 1 {1 2} {0 1}; nothing has a copy to give on both nodes
    state = started(FlexMoe(), even_state(cluster_of(2, 2), 3, extra_slots=1))
    assert holders(state.base.resident[0]) == [[0, 1, 3], [0, 2, 3], [1, 2]]
    assert FlexMoe().reshard(history_of([0, 0, 90]), state) is state.base


def test_even_loads_stay():
    state = started(FlexMoe(), even_state(cluster_of(2, 2), 8, extra_slots=2))
    assert FlexMoe().reshard(history_of([5] * 8), state) is state.base
    assert FlexMoe().reshard(np.zeros((1, 1, 8), dtype=np.int64), state) is state.base
