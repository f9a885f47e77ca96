import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import LayerPlan, assign, dispatch_rows, locality_first
from tests.placement.strategies import cluster_of, layer_plans


def oracle(experts: list[int], layer: LayerPlan, rank: int, cluster) -> list[int]:
    seen: dict[int, int] = {}
    ranks = []
    for e in experts:
        if e == layer.num_experts:
            ranks.append(-1)
            continue
        holders = np.flatnonzero(layer.copies[e]).tolist()
        near = [d for d in holders if cluster.node_of[d] == cluster.node_of[rank]]
        choices = [rank] if rank in holders else near or holders
        ranks.append(choices[(rank + e + seen.get(e, 0)) % len(choices)])
        seen[e] = seen.get(e, 0) + 1
    return ranks


@st.composite
def dispatches(draw):
    layer, cluster = draw(layer_plans())
    rank = draw(st.integers(0, cluster.num_devices - 1))
    experts = draw(st.lists(st.integers(0, layer.num_experts), max_size=40))
    return experts, layer, rank, cluster


@given(dispatches())
def test_matches_the_rule_row_by_row(dispatch):
    experts, layer, rank, cluster = dispatch
    assert dispatch_rows(np.array(experts, dtype=np.int64), layer, rank, cluster).tolist() == oracle(*dispatch)


@given(dispatches())
def test_every_row_goes_to_one_holder(dispatch):
    experts, layer, rank, cluster = dispatch
    ranks = dispatch_rows(np.array(experts, dtype=np.int64), layer, rank, cluster)
    assert ranks.shape == (len(experts),)
    for expert, to in zip(experts, ranks, strict=True):
        assert (to == -1) if expert == layer.num_experts else layer.copies[expert, to]


@given(dispatches())
def test_sharing_copies_get_equal_shares(dispatch):
    experts, layer, rank, cluster = dispatch
    table = locality_first(layer, rank, cluster)
    ranks = assign(np.array(experts, dtype=np.int64), table)
    for e in range(layer.num_experts):
        rows = np.bincount(ranks[np.array(experts, dtype=np.int64) == e], minlength=cluster.num_devices)
        shared = rows[table.ranks_EC[e, : table.num_E[e]]]
        assert shared.max() - shared.min() <= 1


def test_by_hand():
    # ranks 0, 1 on node 0 and 2, 3 on node 1; rank 0 sends
    copies = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=np.uint8)
    layer = LayerPlan(np.array([0, 1, 2]), copies)
    rows = np.array([0, 1, 2, 2, 0, 2, 3])
    # expert 0 is here; 1 has a copy on this node; 2 is shared by ranks 2 and 3, from start (0 + 2) % 2; 3 is no expert
    assert dispatch_rows(rows, layer, 0, cluster_of(2, 2)).tolist() == [0, 1, 2, 3, 0, 2, -1]


def test_ranks_start_at_different_copies():
    layer = LayerPlan(np.array([2]), np.array([[0, 0, 1, 1]], dtype=np.uint8))
    firsts = [int(dispatch_rows(np.array([0]), layer, rank, cluster_of(2, 2))[0]) for rank in (0, 1)]
    assert firsts == [2, 3]


def test_no_rows():
    layer = LayerPlan(np.array([0]), np.array([[1, 1]], dtype=np.uint8))
    assert dispatch_rows(np.array([], dtype=np.int64), layer, 0, cluster_of(2)).size == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.array([0, 4]), "from 0 to 4, but there are 3 experts"),
        (np.array([-1]), "from -1"),
        (np.zeros(2), "integers"),
    ],
)
def test_bad_rows_are_refused(rows, said):
    layer = LayerPlan(np.array([0, 0, 0]), np.ones((3, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=said):
        dispatch_rows(rows, layer, 0, cluster_of(2))


def test_a_plan_for_other_ranks_is_refused():
    layer = LayerPlan(np.array([0]), np.ones((1, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="rank 0 of a cluster of 3 cannot dispatch by a plan for 2"):
        locality_first(layer, 0, cluster_of(3))
