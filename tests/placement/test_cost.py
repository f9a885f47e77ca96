from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import Base, ClusterSpec, LayerPlan, Workload, layer_cost
from raymoe.placement.cost import exchange_ns, move_links, travelling
from tests.placement.strategies import cluster_of, layer_plans, routed_rows

PAIR = ClusterSpec.even(1, 2, intra_bytes_s=10**9, latency_ns=7, flops_s=10**9)
NODES = ClusterSpec.even(2, 2, intra_bytes_s=10**9, inter_bytes_s=10**8, latency_ns=0, flops_s=10**9)
LAYER = Workload(expert_bytes=100, row_bytes=10, row_flops=50, attention_ns=60, gradient_bytes=200)


@st.composite
def costed(draw):
    layer, cluster = draw(layer_plans())
    return layer, cluster, draw(routed_rows(layer))


def ep(num_experts: int, num_devices: int) -> LayerPlan:
    owners = np.arange(num_experts) * num_devices // num_experts
    return LayerPlan(owners, Base.of_owners(owners[None], num_devices).resident[0])


def test_expert_parallelism_by_hand():
    # rank 0 keeps 3 rows and sends 5 to rank 1, which sends 1 back and keeps 4: rank 1 computes 9 rows
    cost = layer_cost(ep(2, 2), np.array([[3, 5], [1, 4]]), LAYER, PAIR)
    assert cost.all_to_all_ns == 7 + 5 * 10
    assert cost.compute_ns == 9 * 50
    assert (cost.gather_ns, cost.reduce_ns, cost.exposed_ns) == (0, 0, 0)
    assert cost.moe_ns == 4 * 57 + 3 * 450
    assert cost.ideal_ns == 3 * 6.5 * 50
    assert cost.imbalance == 9 / 6.5
    assert (cost.row_links, cost.copy_links) == ((4 * 60, 0), (0, 0))


def test_a_copy_by_hand():
    # expert 1 is on both ranks: 5 rows stay, expert 0's row still travels; the copy takes 7 + 100 ns there, 7 + 200 back
    plan = LayerPlan(np.array([0, 1]), np.array([[1, 0], [1, 1]], dtype=np.uint8))
    cost = layer_cost(plan, np.array([[3, 5], [1, 4]]), LAYER, PAIR)
    assert cost.all_to_all_ns == 7 + 10
    assert cost.compute_ns == (3 + 1 + 5) * 50
    assert (cost.gather_ns, cost.reduce_ns) == (107, 207)
    assert cost.exposed_ns == (107 - 60) + (207 - 2 * 60)
    assert cost.copy_links == (300, 0)


def test_rematerialising_gathers_again_in_backward():
    plan = LayerPlan(np.array([0, 1]), np.array([[1, 0], [1, 1]], dtype=np.uint8))
    cost = layer_cost(plan, np.array([[3, 5], [1, 4]]), replace(LAYER, rematerialise=True), PAIR)
    assert cost.exposed_ns == (107 - 60) + (207 + 107 - 2 * 60)
    assert cost.copy_links == (400, 0)


def test_recomputing_runs_the_forward_again():
    cost = layer_cost(ep(2, 2), np.array([[3, 5], [1, 4]]), replace(LAYER, recompute=True), PAIR)
    assert cost.moe_ns == 6 * 57 + 4 * 450


@pytest.mark.parametrize(("timing", "hidden"), [("hidden", 60), ("overlapped", 60 + 450), ("blocking", 0)])
def test_what_hides_a_transfer(timing, hidden):
    plan = LayerPlan(np.array([0, 1]), np.array([[1, 0], [1, 1]], dtype=np.uint8))
    cost = layer_cost(plan, np.array([[3, 5], [1, 4]]), LAYER, PAIR, timing=timing)
    assert cost.exposed_ns == max(0, 107 - hidden) + max(0, 207 - 2 * hidden)


def test_cores_that_copy_hide_nothing():
    plan = LayerPlan(np.array([0, 1]), np.array([[1, 0], [1, 1]], dtype=np.uint8))
    cost = layer_cost(plan, np.array([[3, 5], [1, 4]]), LAYER, replace(PAIR, overlap_percent=0))
    assert cost.exposed_ns == 107 + 207


def test_late_copies_are_always_exposed():
    copies = np.array([[1, 1], [1, 1]], dtype=np.uint8)
    late = np.array([[0, 1], [0, 0]], dtype=np.uint8)
    cost = layer_cost(LayerPlan(np.array([0, 1]), copies), np.array([[3, 5], [1, 4]]), LAYER, PAIR, late=late)
    # one copy on time (hidden up to 60), one late; one gradient comes home on each rank
    assert (cost.gather_ns, cost.late_ns, cost.reduce_ns) == (107, 107, 207)
    assert cost.exposed_ns == 107 + (107 - 60) + (207 - 120)


@pytest.mark.parametrize(("fan_out", "out", "into"), [("p2p", 2, 2), ("hierarchical", 1, 1), ("chain", 1, 1)])
def test_fan_outs_by_hand(fan_out, out, into):
    # rank 0's expert goes to all four ranks on two nodes
    plan = LayerPlan(np.array([0]), np.ones((1, 4), dtype=np.uint8))
    cost = layer_cost(plan, np.ones((4, 1), dtype=int), replace(LAYER, fan_out=fan_out), NODES)
    assert cost.gather_ns == max(out, into) * 100 * 10
    assert cost.copy_links[1] == into * (100 + 200)


def test_three_nodes_tell_hierarchical_from_chain():
    plan = LayerPlan(np.array([0]), np.ones((1, 3), dtype=np.uint8))
    cluster = ClusterSpec.even(3, 1, intra_bytes_s=10**9, inter_bytes_s=10**8, latency_ns=0)
    times = [layer_cost(plan, np.ones((3, 1), dtype=int), replace(LAYER, fan_out=word), cluster).gather_ns
             for word in ("hierarchical", "chain")]  # fmt: skip
    assert times == [2000, 1000]


def test_slices_come_from_everywhere():
    # 2 nodes x 2 ranks, each rank takes one expert of 100 bytes: 25 from its neighbour, 50 from the other node
    plan = LayerPlan(np.arange(4), np.eye(4, dtype=np.uint8))
    cost = layer_cost(plan, np.ones((4, 4), dtype=int), LAYER, NODES, layout="sliced")
    assert cost.gather_ns == 2 * 50 * 10
    assert cost.copy_links == (3 * 4 * 25, 3 * 4 * 50)


def test_resident_replicas_sum_their_gradients():
    plan = LayerPlan(np.array([0]), np.ones((1, 2), dtype=np.uint8), np.ones((1, 2), dtype=np.uint8))
    cost = layer_cost(plan, np.ones((2, 1), dtype=int), LAYER, PAIR)
    assert (cost.gather_ns, cost.reduce_ns) == (0, 7 + 200)


def test_tiles_round_every_expert_up():
    cost = layer_cost(ep(4, 2), np.array([[3, 5, 0, 1], [0, 0, 0, 0]]), LAYER, replace(PAIR, tile_rows=4))
    assert cost.compute_ns == (4 + 8) * 50


def test_devices_with_own_nics_do_not_share_them():
    rows = np.array([[0, 0, 8, 8], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    shared = layer_cost(ep(4, 4), rows, LAYER, NODES).all_to_all_ns
    own = layer_cost(ep(4, 4), np.roll(rows, 0), LAYER, replace(NODES, nic_shared=False)).all_to_all_ns
    assert shared == own == 160 * 10
    two = np.array([[0, 0, 8, 0], [0, 0, 0, 8], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert layer_cost(ep(4, 4), two, LAYER, NODES).all_to_all_ns == 160 * 10
    assert layer_cost(ep(4, 4), two, LAYER, replace(NODES, nic_shared=False)).all_to_all_ns == 80 * 10


def test_half_duplex_adds_both_ways():
    rows = np.array([[0, 8], [8, 0]])
    assert layer_cost(ep(2, 2), rows, LAYER, replace(PAIR, full_duplex=False)).all_to_all_ns == 7 + 160
    assert layer_cost(ep(2, 2), rows, LAYER, PAIR).all_to_all_ns == 7 + 80


def test_a_token_travels_once_to_a_rank():
    # 4 tokens of rank 0 take 2 experts each: all take expert 2, two of them expert 3 as well, both on rank 1
    counts = np.zeros((2, 4, 2), dtype=np.int64)
    counts[0, 2, 1], counts[0, 3, 1], counts[0, 0, 0] = 4, 2, 2
    assert travelling(counts, counts.sum(axis=2), choices=2).tolist() == [[2, 4], [0, 0]]
    assert travelling(counts, counts.sum(axis=2), choices=1).tolist() == [[2, 6], [0, 0]]


@given(case=costed(), choices=st.integers(1, 3))
def test_tokens_lie_between_rows_and_rows_over_choices(case, choices):
    layer, _, rows_DE = case
    counts = np.zeros((*rows_DE.shape, layer.num_devices), dtype=np.int64)
    counts[np.arange(len(rows_DE))[:, None], np.arange(rows_DE.shape[1]), layer.owners] = rows_DE
    tokens = travelling(counts, rows_DE, choices)
    rows = counts.sum(axis=1)
    assert (tokens <= rows).all()
    # independent choices may leave a little less than the least there can be, at most by half a row's rounding
    assert ((tokens > 0) == (rows > 0)).all() or choices > 1


@given(
    case=costed(),
    field=st.sampled_from(["intra_bytes_s", "inter_bytes_s", "flops_s"]),
    timing=st.sampled_from(["hidden", "overlapped", "blocking"]),
)
def test_faster_machines_are_never_slower(case, field, timing):
    layer, cluster, rows_DE = case
    faster = replace(cluster, **{field: 2 * getattr(cluster, field)})
    workload = replace(LAYER, choices=2)
    # computing faster also hides less: what is overlapped with it is left out
    if field == "flops_s" and timing == "overlapped":
        timing = "hidden"
    before, after = (layer_cost(layer, rows_DE, workload, each, timing=timing).moe_ns for each in (cluster, faster))
    assert after <= before


@given(case=costed())
def test_nothing_is_faster_than_even_work_without_transfers(case):
    layer, cluster, rows_DE = case
    cost = layer_cost(layer, rows_DE, LAYER, cluster)
    assert cost.ideal_ns <= cost.moe_ns * (1 + 1e-12)
    assert cost.imbalance >= 1


@given(num_devices=st.integers(1, 30), rows=st.integers(0, 1000))
def test_more_devices_never_raise_the_ideal(num_devices, rows):
    def ideal(devices: int) -> float:
        share = np.zeros((devices, 1), dtype=int)
        share[0] = rows
        return layer_cost(ep(1, devices), share, LAYER, cluster_of(devices)).ideal_ns

    assert ideal(num_devices + 1) <= ideal(num_devices)


def test_no_rows_take_no_time():
    cost = layer_cost(ep(2, 2), np.zeros((2, 2), dtype=int), LAYER, PAIR)
    assert (cost.moe_ns, cost.imbalance) == (0, 1)


def test_one_device_moves_nothing():
    cluster = ClusterSpec.even(1, 1, intra_bytes_s=1)
    cost = layer_cost(ep(3, 1), np.array([[3, 1, 0]]), LAYER, cluster)
    assert (cost.all_to_all_ns, cost.exposed_ns, cost.imbalance) == (0, 0, 1)


def test_moving_homes_takes_parameters_and_state():
    before, after = Base.of_owners(np.array([[0, 1]]), 2), Base.of_owners(np.array([[1, 1]]), 2)
    links = move_links(before, after, replace(LAYER, state_bytes=900), PAIR)
    assert exchange_ns(links, PAIR) == 7 + 1000
    assert not move_links(before, before, LAYER, PAIR).near
