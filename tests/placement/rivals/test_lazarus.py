import pytest

from raymoe.placement.rivals import Lazarus
from tests.placement.rivals.cases import cluster_of, even_state, history_of, holders, started


@pytest.mark.parametrize(
    ("num_ranks", "extra_slots", "loads", "expected"),
    [
        # 5 x 2 slots; from the coldest on: floor(10 / 100 * 10) = 1 -> 2, floor(40 / 90 * 8) = 3, the last 5.
        # Groups {10 40}, two ranks, and {50}, five, of which three are left: ranks 0 1 and 2 3 4. One copy of 40 is left, and
        # goes to the first rank with a slot; 50's two have only ranks that have it.
        (5, 1, [50, 40, 10], [[2, 3, 4], [0, 1, 2], [0, 1]]),
        # 4 x 3 slots: floor(10 / 100 * 12) = 1 -> 2, floor(10 / 90 * 10) = 1 -> 2, floor(20 / 80 * 8) = 2, the last 6.
        # Groups {10 10 20} on ranks 0 1, {60} on 2 3, and four copies that no rank without one has a slot for
        (4, 2, [60, 20, 10, 10], [[2, 3], [0, 1], [0, 1], [0, 1]]),
        # 4 x 3 slots: floor(40 / 190 * 12) = 2, floor(50 / 150 * 10) = 3, floor(50 / 100 * 7) = 3, the last 4.
        # Groups {40 50 50} on ranks 0 1, {50} on 2 3; the hotter 50 of the first group has its third copy on 2, the other on 3
        (4, 2, [50, 50, 50, 40], [[0, 1, 3], [0, 1, 2], [2, 3], [0, 1]]),
        # 4 x 1 slots for 4 experts: f = 1
        (4, 0, [60, 20, 10, 10], [[3], [2], [0], [1]]),
    ],
)
def test_placement_by_hand(num_ranks, extra_slots, loads, expected):
    state = even_state(cluster_of(num_ranks), len(loads), extra_slots=extra_slots)
    assert holders(Lazarus().reshard(history_of(loads), state).resident[0]) == expected


def test_any_one_rank_may_fail():
    state = started(Lazarus(), even_state(cluster_of(2, 2), 6, extra_slots=2))
    moved = Lazarus().reshard(history_of([500, 90, 3, 2, 1, 1]), state)
    assert (moved.resident[0].sum(axis=1) >= 2).all()
    assert Lazarus().prepare(history_of([1] * 6), state).dispatch == "capacity"
