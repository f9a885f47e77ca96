from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import (
    ClusterSpec,
    DispatchTable,
    LayerPlan,
    LoadTrace,
    Workload,
    assign,
    dispatch_counts,
    policy,
    simulate,
)
from raymoe.placement.generate import generate
from tests.placement.strategies import cluster_of, layer_plans, routed_rows

WORDS = ["local", "node", "even", "capacity", "level"]


def sharers(layer: LayerPlan, e: int, rank: int, cluster: ClusterSpec, word: str) -> list[int]:
    holders = np.flatnonzero(layer.copies[e]).tolist()
    near = [d for d in holders if cluster.node_of[d] == cluster.node_of[rank]]
    if word == "local" and rank in holders:
        return [rank]
    return holders if word == "even" else near or holders


@st.composite
def dispatches(draw):
    layer, cluster = draw(layer_plans())
    return layer, cluster, draw(routed_rows(layer))


@pytest.mark.parametrize("word", ["local", "node", "even"])
@given(case=dispatches())
def test_copies_that_share_take_turns(word, case):
    layer, cluster, rows_DE = case
    counts = dispatch_counts(rows_DE, layer, cluster, word)
    for rank, e in np.ndindex(*rows_DE.shape):
        near = sharers(layer, e, rank, cluster, word)
        turns = Counter(near[(rank + e + i) % len(near)] for i in range(rows_DE[rank, e]))
        assert counts[rank, e].tolist() == [turns[d] for d in range(cluster.num_devices)]


@pytest.mark.parametrize("word", WORDS)
@given(case=dispatches())
def test_no_row_is_lost_and_all_go_to_holders(word, case):
    layer, cluster, rows_DE = case
    counts = dispatch_counts(rows_DE, layer, cluster, word)
    assert (counts.sum(axis=2) == rows_DE).all()
    assert counts.min() >= 0
    assert (counts.sum(axis=0)[layer.copies == 0] == 0).all()


@pytest.mark.parametrize("word", WORDS)
@given(case=dispatches(), order=st.randoms())
def test_some_senders_are_told_what_all_together_are(word, case, order):
    layer, cluster, rows_DE = case
    ranks = order.sample(range(cluster.num_devices), order.randint(0, cluster.num_devices))
    found = dispatch_counts(rows_DE, layer, cluster, word, ranks)
    assert (found == dispatch_counts(rows_DE, layer, cluster, word)[ranks]).all()


@given(case=dispatches())
def test_capacity_gives_every_copy_the_same(case):
    layer, cluster, rows_DE = case
    given_ED = dispatch_counts(rows_DE, layer, cluster, "capacity").sum(axis=0)
    for e in range(layer.num_experts):
        of_copies = given_ED[e][layer.copies[e] == 1]
        assert of_copies.max() - of_copies.min() <= 1


@given(case=dispatches())
def test_capacity_keeps_what_a_rank_has_room_for(case):
    layer, cluster, rows_DE = case
    counts = dispatch_counts(rows_DE, layer, cluster, "capacity")
    for rank, e in np.ndindex(*rows_DE.shape):
        if layer.copies[e, rank]:
            taken = counts[:, e, rank].sum()
            assert counts[rank, e, rank] == min(rows_DE[rank, e], taken)


@given(case=dispatches())
def test_level_evens_out_what_ranks_compute_as_far_as_copies_everywhere_allow(case):
    layer, cluster, rows_DE = case
    computed_D = dispatch_counts(rows_DE, layer, cluster, "level").sum(axis=(0, 1))
    everywhere = layer.copies.min(axis=1) == 1
    if cluster.num_devices == 1 or not rows_DE[:, everywhere].sum():
        return
    elsewhere = LayerPlan(layer.owners[~everywhere], layer.copies[~everywhere]) if not everywhere.all() else None
    fixed_D = np.zeros(cluster.num_devices, dtype=np.int64)
    if elsewhere is not None:
        fixed_D = dispatch_counts(rows_DE[:, ~everywhere], elsewhere, cluster, "level").sum(axis=(0, 1))
    # water poured on what is fixed: those below the surface end level, but for whole rows of each expert at both of its cuts
    level = max(computed_D[computed_D > fixed_D], default=0)
    slack = 2 * int(everywhere.sum()) + 1
    assert (computed_D >= fixed_D).all()
    assert (computed_D >= min(level, computed_D.max()) - slack).all()


def test_level_by_hand():
    # rank 0 owns experts 0 and 1; 1 is everywhere. 12 rows of 0 and 20 of 1, as many from each rank: level is at 16
    layer = LayerPlan(np.array([0, 0]), np.array([[1, 0], [1, 1]], dtype=np.uint8))
    counts = dispatch_counts(np.array([[6, 10], [6, 10]]), layer, cluster_of(2), "level")
    assert counts[:, 0].tolist() == [[6, 0], [6, 0]]
    # rank 0 takes 4 of its own, and sends 6 to rank 1
    assert counts[:, 1].tolist() == [[4, 6], [0, 10]]


def test_capacity_stays_on_the_node_where_it_can():
    # ranks 0 and 3 route 4 rows each; ranks 1 and 2, one on each node, hold copies and take 4 each
    layer = LayerPlan(np.array([1]), np.array([[0, 1, 1, 0]], dtype=np.uint8))
    rows = np.array([[4], [0], [0], [4]])
    counts = dispatch_counts(rows, layer, cluster_of(2, 2), "capacity")
    assert counts[0, 0].tolist() == [0, 4, 0, 0]
    assert counts[3, 0].tolist() == [0, 0, 4, 0]


@given(case=dispatches(), seed=st.integers(0, 2**32 - 1))
def test_assigned_rows_are_those_that_were_counted(case, seed):
    layer, cluster, rows_DE = case
    experts = np.repeat(np.arange(layer.num_experts + 1), [*rows_DE[0], 3])
    np.random.default_rng(seed).shuffle(experts)
    counts_ED = DispatchTable(layer, [0], cluster).counts(rows_DE[:1])[0]
    ranks = assign(experts, counts_ED)
    assert (ranks[experts == layer.num_experts] == -1).all()
    for e in range(layer.num_experts):
        assert (np.bincount(ranks[experts == e], minlength=cluster.num_devices) == counts_ED[e]).all()
        assert (np.diff(ranks[experts == e]) >= 0).all()


def test_by_hand():
    # ranks 0, 1 on node 0 and 2, 3 on node 1; rank 0 sends
    copies = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=np.uint8)
    layer = LayerPlan(np.array([0, 1, 2]), copies)
    rows = np.array([0, 1, 2, 2, 0, 2, 3])
    counts_ED = DispatchTable(layer, [0], cluster_of(2, 2)).counts(np.array([[2, 1, 3]]))[0]
    # expert 0 is here; 1 has a copy on this node; 2 is shared by ranks 2 and 3, the odd row starting at (0 + 2) % 2
    assert counts_ED.tolist() == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 1]]
    assert assign(rows, counts_ED).tolist() == [0, 1, 2, 2, 0, 3, -1]


def test_ranks_start_at_different_copies():
    layer = LayerPlan(np.array([2]), np.array([[0, 0, 1, 1]], dtype=np.uint8))
    counts = dispatch_counts(np.ones((4, 1), dtype=int), layer, cluster_of(2, 2))
    assert [int(counts[rank, 0].argmax()) for rank in (0, 1)] == [2, 3]


def test_no_rows():
    assert assign(np.array([], dtype=np.int64), np.zeros((1, 2), dtype=np.int64)).size == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.array([0, 4]), "from 0 to 4, but there are 3 experts"),
        (np.array([-1]), "from -1"),
        (np.zeros(2), "integers"),
        (np.array([1, 1]), "gives expert 1 0 rows, expert_index 2"),
    ],
)
def test_bad_rows_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        assign(rows, np.zeros((3, 2), dtype=np.int64))


def test_a_plan_for_other_ranks_is_refused():
    layer = LayerPlan(np.array([0]), np.ones((1, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"ranks \[0\] of a cluster of 3 cannot dispatch by a plan for 2"):
        DispatchTable(layer, [0], cluster_of(3))


def test_rows_of_another_model_are_refused():
    layer = LayerPlan(np.array([0]), np.ones((1, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"rows are \[2, 3\], the plan is for 2 ranks x 1 experts"):
        dispatch_counts(np.zeros((2, 3), dtype=int), layer, cluster_of(2))


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("preset", ["hot", "smartmoe"])
def test_fssdp_level_leaves_the_busiest_rank_a_tenth_above_the_mean_at_most(num_devices, preset):
    num_experts, choices, steps, rows_each = 16, 8, 24, 4096
    if preset == "hot":
        # all rows on the first half of the experts
        counts = np.zeros((steps, num_devices, 2, num_experts), dtype=np.int64)
        counts[..., : num_experts // 2] = rows_each * choices // (num_experts // 2)
        trace = LoadTrace(counts)
    else:
        trace = generate(
            "smartmoe",
            steps=steps,
            ranks=8,
            layers=2,
            experts=num_experts,
            tokens_per_rank=rows_each,
            choices=choices,
            seed=0,
        ).for_ranks(num_devices)
    cluster = ClusterSpec.even(1, num_devices, intra_bytes_s=2 * 10**9, latency_ns=400_000, flops_s=2 * 10**11)
    workload = Workload(5_000_000, 512, 5_000_000, attention_ns=25_000_000, choices=choices)
    simulated = simulate(trace, policy("fssdp"), cluster, workload, extra_slots=num_experts // num_devices)
    assert simulated.of("imbalance")[8:].mean(axis=1).max() <= 1.10
