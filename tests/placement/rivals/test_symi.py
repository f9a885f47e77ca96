import pytest

from raymoe.placement.rivals import Symi
from tests.placement.rivals.cases import cluster_of, even_state, history_of, holders


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        # goals 4, 2.4, 1.2, 0.4 -> 4, 2, 1, 1: slots 00 00 11 23
        ([50, 30, 15, 5], [[0, 1], [2], [3], [3]]),
        # goals 7.76 and 0.08 -> 7, 1, 1, 1, two too many: the only one with more than one gives them. 00 00 01 23
        ([97, 1, 1, 1], [[0, 1, 2], [2], [3], [3]]),
        # goals 2.8, 2.8, 1.2, 1.2 -> 2, 2, 1, 1, two too few: the furthest below its goal is 0, then 1. 00 01 11 23
        ([35, 35, 15, 15], [[0, 1], [1, 2], [3], [3]]),
    ],
)
def test_counts_and_contiguous_slots_by_hand(loads, expected):
    plan = Symi().prepare(history_of([1, 1, 1, 97], loads)[:, 1:], even_state(cluster_of(2, 2), 4, extra_slots=3))
    assert holders(plan.copies[0]) == expected
    assert plan.owners[0].tolist() == [ranks[0] for ranks in expected]
    assert (plan.layout, plan.dispatch, plan.timing) == ("sliced", "even", "blocking")


def test_the_last_step_decides():
    past = history_of([97, 1, 1, 1], [50, 30, 15, 5]).transpose(1, 0, 2)
    plan = Symi().prepare(past, even_state(cluster_of(4), 4, extra_slots=1))
    assert holders(plan.copies[0]) == [[0, 1], [2], [3], [3]]
