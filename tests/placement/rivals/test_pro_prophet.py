import numpy as np
import pytest

from raymoe.placement.rivals import ProProphet
from tests.placement.rivals.cases import cluster_of, even_state, history_of, holders


@pytest.mark.parametrize(
    ("expert_bytes", "attention_ns", "copied"), [(274, 30, True), (276, 30, False), (319, 60, True), (321, 60, False)]
)
def test_cost_formula_by_hand(expert_bytes, attention_ns, copied):
    """100 rows for rank 0's expert, 20 for rank 1's; c = f = 1, and half of an expert's rows come from the other rank.

    none:     4 * 50 + 3 * 100 = 500
    expert 0: 4 * 10 + 3 * (20 + 50) = 250; its X bytes hide behind 70 + A, its gradients behind twice that
    with A = 30: X - 100 + X - 200 < 250, so X < 275; with A = 60: X - 130 + X - 260 < 250, so X < 320
    """
    state = even_state(cluster_of(2), 2, extra_slots=1, expert_bytes=expert_bytes, attention_ns=attention_ns)
    plan = ProProphet().prepare(history_of([100, 20]), state)
    assert holders(plan.copies[0]) == ([[0, 1], [1]] if copied else [[0], [1]])
    assert plan.timing == "overlapped"


@pytest.mark.parametrize(
    ("expert_bytes", "extra_slots", "copied"), [(1, 4, [0, 1, 2]), (1, 1, [0]), (1, 0, []), (70, 4, [0])]
)
def test_greedy_copies_by_hand(expert_bytes, extra_slots, copied):
    """60 and 40 rows for rank 0's experts, 10 and 10 for rank 1's: 100 and 20.

    none: 4 * 50 + 3 * 100 = 500
    0:    40 + 30 and 20 + 30, apart by 20 > half of 120 / 4 rows; 4 * 20 + 3 * 70 = 290
    1:    30 + 20 and 20 + 50, apart by 20; 4 * 10 + 3 * 70 = 250
    2:    50 + 5 and 10 + 55, apart by 10 < 15, the end; 4 * 5 + 3 * 65 = 215
    X = 70 adds 0, then 140 - 70 = 70, then 210 - 65 + 210 - 130 = 225: least after the first
    """
    state = even_state(cluster_of(2), 4, extra_slots=extra_slots, expert_bytes=expert_bytes)
    plan = ProProphet().prepare(history_of([60, 40, 10, 10]), state)
    assert [expert for expert in range(4) if plan.copies[0, expert].all()] == copied


def test_only_the_last_step_counts():
    state = even_state(cluster_of(2), 2, extra_slots=1, expert_bytes=1)
    past = np.array([[[9, 900]], [[9, 900]], [[100, 20]]])
    assert holders(ProProphet().prepare(past, state).copies[0]) == [[0, 1], [1]]
