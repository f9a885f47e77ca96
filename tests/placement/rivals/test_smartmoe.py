import numpy as np

from raymoe.placement import Base
from raymoe.placement.rivals import SmartMoe
from tests.placement.rivals.cases import cluster_of, even_state, history_of, with_base

STATE = even_state(cluster_of(2), 4)


def test_exchange_by_hand():
    # ranks have 16 and 4; 9 stays on 0, 7 -> 1, 3 -> 1 (7 < 9), 1 -> 0, the only room: 10 and 10
    assert SmartMoe().reshard(history_of([9, 7, 3, 1]), STATE).owners.tolist() == [[0, 1, 1, 0]]


def test_loads_count_since_the_last_change_whatever_the_window():
    # the last step alone leaves everything as it is: 7 and nothing
    past = np.array([[[9, 0, 3, 1]], [[0, 7, 0, 0]], *[[[0, 0, 0, 0]]] * 9])
    assert SmartMoe().reshard(past, STATE).owners.tolist() == [[0, 1, 1, 0]]
    assert SmartMoe().reshard(past[1:2], STATE) is STATE.base


def test_ties_stay():
    swapped = with_base(STATE, Base.of_owners(np.array([[1, 1, 0, 0]]), 2))
    assert SmartMoe().reshard(history_of([9, 7, 3, 1]), swapped).owners.tolist() == [[1, 0, 0, 1]]


def test_only_if_the_busiest_rank_gains():
    assert SmartMoe().reshard(history_of([4, 4, 4, 4]), STATE) is STATE.base
    # 9 alone bounds it: 9 + 0 on a rank before and after
    assert SmartMoe().reshard(history_of([9, 0, 3, 1]), STATE) is STATE.base


def test_layers_change_one_by_one():
    state = even_state(cluster_of(2), 4, num_layers=2)
    moved = SmartMoe().reshard(history_of([9, 0, 3, 1], [9, 7, 3, 1]), state)
    assert moved.owners.tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    assert moved.moved_from(state.base) == 2


def test_ranks_have_equally_many_or_one_more():
    # 8 -> 0, 8 -> 1, 8 -> 0 (tie), 1 -> 1, 1 -> 1: 16 and 10, before 24 and 2
    moved = SmartMoe().reshard(history_of([8, 8, 8, 1, 1]), even_state(cluster_of(2), 5))
    assert moved.owners.tolist() == [[0, 1, 0, 1, 1]]
