import numpy as np
import pytest

from raymoe.placement import PlacementState
from raymoe.placement.rivals import FasterMoe, FasterMoeDevice
from tests.placement.rivals.cases import cluster_of, even_state, holders

# every rank routes 100 rows: over ranks the experts have 280, 80, 40 and 0, over experts the ranks have 100 each
EQUAL_RANKS = np.tile([70, 20, 10, 0], (4, 1))


def shadows(policy: FasterMoe, loads: np.ndarray, state: PlacementState) -> list[int]:
    plan = policy.prepare(np.zeros((0, *state.base.owners.shape), dtype=np.int64), state)
    assert plan.timing == "blocking"
    assert (plan.copies == state.base.resident).all()
    return np.flatnonzero(policy.calibrate(0, loads, plan, state).copies.all(axis=1)).tolist()


def latencies(policy: FasterMoe, loads: np.ndarray, order: list[int], state: PlacementState) -> list[float]:
    return policy.latencies(state.base.owners[0], loads, np.array(order), state).tolist()


def test_latencies_by_hand():
    # c = f = 1, so a row takes 3c + 4f = 7; s = 500: 7 * 280, 7 * 80 + s, 7 * 40 + 2s, 7 * 0 + 3s, 4s
    state = even_state(cluster_of(4), 4, extra_slots=4, expert_bytes=500)
    assert latencies(FasterMoe(), EQUAL_RANKS, [0, 1, 2, 3], state) == [1960, 1060, 1280, 1500, 2000]
    assert shadows(FasterMoe(), EQUAL_RANKS, state) == [0]


def test_cheap_experts_are_shadowed_while_it_pays_and_slots_last():
    # s = 100: 1960, 660, 480, 300, 400
    for slots, expected in ((4, [0, 1, 2]), (2, [0, 1]), (0, [])):
        state = even_state(cluster_of(4), 4, extra_slots=slots, expert_bytes=100)
        assert shadows(FasterMoe(), EQUAL_RANKS, state) == expected


def test_the_first_failure_ends_the_search():
    # 700, then 7 * 99 + 100 = 793: over, though two shadows would take 7 + 200
    loads = np.array([[100, 99, 1, 0], [0, 0, 0, 0]])
    assert shadows(FasterMoe(), loads, even_state(cluster_of(2), 4, extra_slots=4, expert_bytes=100)) == []


@pytest.mark.parametrize("policy", [FasterMoe(), FasterMoeDevice()])
def test_ranks_that_route_equally_much_do_not_hide_a_hot_expert(policy):
    # summed over experts, rank 0's 100 rows would look as hot as rank 1's, and 700 + s never pays
    assert 0 in shadows(policy, EQUAL_RANKS, even_state(cluster_of(2, 2), 4, extra_slots=4, expert_bytes=500))


def test_a_shadow_is_late_and_only_that():
    state = even_state(cluster_of(4), 4, extra_slots=4, expert_bytes=500)
    plan = FasterMoe().prepare(np.zeros((0, 1, 4), dtype=np.int64), state)
    assert holders(FasterMoe().calibrate(0, EQUAL_RANKS, plan, state).copies) == [[0, 1, 2, 3], [1], [2], [3]]


def test_device_form_by_hand():
    """Experts 0 and 1 on rank 0, 2 and 3 on rank 1; 16, 5, 5 and 4 rows.

    none:    rank 0 computes 21, 7 of them from rank 1: 63 + 28 = 91; rank 1 9 and 2: 27 + 8 = 35
    0:       rank 0 10 + 5 and 1: 45 + 4; rank 1 9 + 6 and 2: 45 + 8 = 53, + s
    0, 1:    rank 0 10 + 4 and 0: 42; rank 1 15 + 1 and 2: 48 + 8 = 56, + 2s
    0, 1, 2: rank 0 14 + 2 and 0: 48; rank 1 6 + 1 + 3 + 4 and 0: 42; 48 + 3s
    all:     the same, + 4s
    """
    loads = np.array([[10, 4, 2, 0], [6, 1, 3, 4]])
    state = even_state(cluster_of(2), 4, extra_slots=4, expert_bytes=20)
    assert latencies(FasterMoeDevice(), loads, [0, 1, 2, 3], state) == [91, 73, 96, 108, 128]
    assert shadows(FasterMoeDevice(), loads, state) == [0]
    assert shadows(FasterMoeDevice(), loads, even_state(cluster_of(2), 4, extra_slots=4, expert_bytes=38)) == []


def test_device_form_takes_bandwidth_between_nodes():
    # f = 4, s = 80: none 63 + 4 * 4 * 7 = 175; expert 0: 45 + 16 * 1 = 61 or 45 + 16 * 2 = 77, + 80
    loads = np.array([[10, 4, 2, 0], [6, 1, 3, 4]])
    state = even_state(cluster_of(1, 1, inter_bytes_s=250_000_000), 4, extra_slots=4, expert_bytes=20)
    assert latencies(FasterMoeDevice(), loads, [0, 1, 2, 3], state)[:2] == [175, 157]
