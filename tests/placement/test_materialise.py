"""Algorithm 1: by hand, against a copy-by-copy oracle, and its invariants."""

import numpy as np
import pytest
from hypothesis import given, settings

from raymoe.placement import ClusterSpec, even_owners, materialise, overlap_degree
from tests.placement.strategies import Case, cases, cluster_of


def holders(copies_ED: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in copies_ED]


def run(case: Case) -> np.ndarray:
    return materialise(case.owners_E, case.loads_E, case.t, case.m, case.cluster)


def oracle(case: Case) -> list[list[int]]:
    """One copy at a time, in plain Python, as the listing reads."""
    node_of, num_devices = case.cluster.node_of, case.cluster.num_devices
    loads, experts = case.loads_E.tolist(), range(len(case.loads_E))
    held = {e: {int(case.owners_E[e])} for e in experts}
    top = sorted((e for e in experts if loads[e] > 0), key=lambda e: (-loads[e], e))[: case.t]
    if not top or case.m == 0 or num_devices == 1:
        return [sorted(held[e]) for e in experts]
    if len(top) <= case.m:
        return [list(range(num_devices)) if e in top else sorted(held[e]) for e in experts]

    free = [case.m] * num_devices

    def projected(rank: int) -> int:
        return sum(loads[e] // len(held[e]) for e in experts if rank in held[e])

    def place(expert: int, load_of: dict[int, int]) -> bool:
        open_ranks = [d for d in range(num_devices) if free[d] and d not in held[expert]]
        if not open_ranks:
            return False
        ranks_on = {n: [d for d in range(num_devices) if node_of[d] == n] for n in set(node_of)}
        node = min(
            {node_of[d] for d in open_ranks},
            key=lambda n: (sum(d in held[expert] for d in ranks_on[n]), -sum(free[d] for d in ranks_on[n]), n),
        )
        rank = min((d for d in open_ranks if node_of[d] == node), key=lambda d: (-free[d], load_of[d], d))
        held[expert].add(rank)
        free[rank] -= 1
        return True

    def load_now() -> dict[int, int]:
        return {d: projected(d) for d in range(num_devices)}

    slots, total = num_devices * case.m, sum(loads[e] for e in top)
    quota = {e: loads[e] * slots // total for e in top}
    by_rest = sorted(top, key=lambda e: (-(loads[e] * slots % total), top.index(e)))
    for e in by_rest[: slots - sum(quota.values())]:
        quota[e] += 1
    left, surplus = slots, 0
    for i, e in enumerate(top):
        share = min(max(1, min(quota[e] + surplus, num_devices - 1, left - (len(top) - i - 1))), left)
        surplus = max(0, quota[e] + surplus - share)
        left -= share
        load_of = load_now()
        for _ in range(share):
            place(e, load_of)
    wanting = sorted(top)
    while wanting and any(free):
        # cross-multiplied: load / copies without a float
        best = wanting[0]
        for e in wanting[1:]:
            if loads[e] * len(held[best]) > loads[best] * len(held[e]):
                best = e
        if not place(best, load_now()):
            wanting.remove(best)
    return [sorted(held[e]) for e in experts]


def test_by_hand_hottest_everywhere_when_memory_allows():
    case = Case(cluster_of(2, 2), np.array([0, 1, 2, 3]), np.array([10, 60, 20, 10]), t=2, m=2)
    assert holders(run(case)) == [[0], [0, 1, 2, 3], [0, 1, 2, 3], [3]]


def test_by_hand_memory_bound():
    # 4 slots over Top = {0, 1, 2} by 50 : 30 : 20 -> 2, 1.2, 0.8 -> 2, 1, 1
    # expert 0 (owner 0): node 1 has no copy, its rank 3 is idle; then both nodes have one, node 0 more free slots: rank 1
    # expert 1 (owner 1): node 1 has no copy and only rank 2 is free there; expert 2 takes the last slot, rank 0
    case = Case(cluster_of(2, 2), np.array([0, 1, 2, 3]), np.array([50, 30, 20, 0]), t=3, m=1)
    assert holders(run(case)) == [[0, 1, 3], [1, 2], [0, 2], [3]]


def test_by_hand_surplus_goes_to_the_next_expert():
    # 8 slots over Top by 97 : 2 : 1 -> 8, 0, 0; expert 0 can use 3, expert 1 takes 3 of the surplus, expert 2 the rest,
    # which is on ranks 0 and 1 by then
    case = Case(cluster_of(4), np.array([0, 1, 2, 3]), np.array([97, 2, 1, 0]), t=3, m=2)
    assert holders(run(case)) == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2], [3]]


@settings(max_examples=300, deadline=None)
@given(cases())
def test_places_what_the_listing_places(case):
    assert holders(run(case)) == oracle(case)


@given(cases())
def test_owners_keep_their_experts(case):
    assert (run(case)[np.arange(len(case.owners_E)), case.owners_E] == 1).all()


@given(cases())
def test_no_rank_gets_more_than_its_slots(case):
    extra = run(case).sum(axis=0) - np.bincount(case.owners_E, minlength=case.cluster.num_devices)
    assert extra.max() <= case.m


@given(cases())
def test_only_the_hottest_are_copied(case):
    top = np.argsort(-case.loads_E, kind="stable")[: case.t]
    copied = np.flatnonzero(run(case).sum(axis=1) > 1)
    assert set(copied) <= set(top)


@given(cases())
def test_no_slot_stays_free_that_a_hot_expert_could_use(case):
    copies = run(case)
    top = [e for e in np.argsort(-case.loads_E, kind="stable")[: case.t] if case.loads_E[e]]
    extra = copies.sum(axis=0) - np.bincount(case.owners_E, minlength=case.cluster.num_devices)
    if case.m and case.cluster.num_devices > 1:
        assert copies[top][:, extra < case.m].all()


@given(cases())
def test_repeats_itself(case):
    assert (run(case) == run(case)).all()


@pytest.mark.parametrize(("t", "m", "ranks"), [(0, 4, 4), (4, 0, 4), (4, 4, 1)])
def test_nothing_to_gain_copies_nothing(t, m, ranks):
    owners = even_owners(1, 8, ranks)[0]
    copies = materialise(owners, np.arange(8), t, m, ClusterSpec.even(1, ranks, intra_bytes_s=1))
    assert holders(copies) == [[int(owner)] for owner in owners]


def test_experts_nobody_wants_are_not_copied():
    copies = materialise(np.array([0, 1, 2]), np.zeros(3, dtype=np.int64), 2, 2, cluster_of(3))
    assert holders(copies) == [[0], [1], [2]]


def test_one_expert_goes_everywhere():
    assert holders(materialise(np.array([1]), np.array([7]), 4, 1, cluster_of(2, 1))) == [[0, 1, 2]]


def test_ties_go_to_the_lower_index():
    assert holders(materialise(np.array([0, 1, 1]), np.array([3, 3, 3]), 1, 1, cluster_of(2))) == [[0, 1], [1], [1]]


@pytest.mark.parametrize(
    ("time_ns", "bandwidth", "expert_bytes", "t"),
    [
        (1_800_000, 12_500_000_000, 4_718_592, 4),  # cluster A of the fact sheet
        (1_000_000_000, 10, 10, 1),
        (999_999_999, 10, 10, 0),
        (0, 10, 10, 0),
    ],
)
def test_overlap_degree_is_the_floor(time_ns, bandwidth, expert_bytes, t):
    assert overlap_degree(time_ns, bandwidth, expert_bytes) == t


def test_overlap_degree_refuses_an_empty_expert():
    with pytest.raises(ValueError, match="at least 1 byte"):
        overlap_degree(1, 1, 0)
