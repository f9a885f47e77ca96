"""All prefixes at once against the cost model, one by one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.placement import LOAD_SCALE, ClusterSpec, LayerPlan, Workload, layer_cost
from raymoe.placement.benefit import prefix_times
from raymoe.placement.plan import owned

LAYER = Workload(expert_bytes=3000, row_bytes=10, row_flops=50, attention_ns=9_000, gradient_bytes=6000)


@st.composite
def layers(draw):
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    cluster = ClusterSpec.even(
        nodes,
        per_node,
        intra_bytes_s=10**9,
        inter_bytes_s=draw(st.sampled_from([10**8, 10**9])),
        latency_ns=50,
        flops_s=10**9,
        nic_shared=draw(st.booleans()),
        tile_rows=draw(st.sampled_from([1, 8])),
    )
    num_experts = draw(st.integers(1, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = rng.integers(cluster.num_devices, size=num_experts)
    # every rank routes alike, in whole rows
    each = rng.zipf(1.4, size=num_experts).clip(max=2000) * rng.integers(0, 2, size=num_experts)
    return cluster, owners, each


def modelled(cluster, owners, each, workload, everywhere: np.ndarray, late: np.ndarray | None = None):
    copies = owned(owners, cluster.num_devices)
    copies[everywhere] = 1
    rows_DE = np.tile(each, (cluster.num_devices, 1))
    late_ED = None
    if late is not None:
        late_ED = np.zeros_like(copies)
        late_ED[late] = 1 - owned(owners, cluster.num_devices)[late]
    return layer_cost(LayerPlan(owners, copies), rows_DE, workload, cluster, late=late_ED)


@settings(max_examples=300, deadline=None)
@given(layers(), st.sampled_from(["p2p", "hierarchical", "chain"]), st.booleans())
def test_every_prefix_is_what_the_cost_model_says(layer, fan_out, rematerialise):
    cluster, owners, each = layer
    workload = replace(LAYER, fan_out=fan_out, rematerialise=rematerialise)
    loads = each * cluster.num_devices * LOAD_SCALE
    times = prefix_times(owners[None], loads[None], workload, cluster)
    for t in range(each.size + 1):
        chosen = times.order_LE[0, :t]
        expected = modelled(cluster, owners, each, workload, chosen)
        # leaders on a node do not take their copy by the node's own link, which the closed form charges to them; it may
        # also leave out what a device or node sends beyond what the busiest receives
        assert times.moe_LT[0, t] == pytest.approx(expected.moe_ns, rel=0.01)


@settings(max_examples=200, deadline=None)
@given(layers())
def test_level_prefixes_are_what_the_cost_model_says_of_computation(layer):
    cluster, owners, each = layer
    loads = each * cluster.num_devices * LOAD_SCALE
    # computation alone: the closed form of what travels takes it that nobody's rows fit better than others'
    workload = replace(LAYER, row_bytes=1, expert_bytes=1, gradient_bytes=1, row_flops=10**6)
    times = prefix_times(owners[None], loads[None], workload, cluster, dispatch="level")
    for t in range(each.size + 1):
        copies = owned(owners, cluster.num_devices)
        copies[times.order_LE[0, :t]] = 1
        rows_DE = np.tile(each, (cluster.num_devices, 1))
        expected = layer_cost(LayerPlan(owners, copies), rows_DE, workload, cluster, dispatch="level")
        # whole rows, and tiles, of every expert on its own
        slack_ns = workload.forwards * (each.size + 1) * cluster.tile_rows * workload.row_flops
        assert abs(times.moe_LT[0, t] - expected.moe_ns) <= slack_ns + 0.02 * expected.moe_ns


def test_level_needs_half_the_copies_where_one_rank_owns_all_that_is_asked_for():
    cluster = ClusterSpec.even(1, 2, intra_bytes_s=10**9, latency_ns=50, flops_s=10**9)
    owners, loads = np.repeat([0, 1], 4)[None], np.array([[100] * 4 + [0] * 4]) * LOAD_SCALE
    # nothing to hide copies behind
    workload = replace(LAYER, row_flops=10**6, attention_ns=0)
    best = {
        word: int(prefix_times(owners, loads, workload, cluster, dispatch=word).moe_LT.argmin())
        for word in ("local", "level")
    }
    assert best == {"local": 4, "level": 2}


@given(layers())
def test_no_copies_is_exactly_expert_parallelism(layer):
    cluster, owners, each = layer
    loads = each * cluster.num_devices * LOAD_SCALE
    expected = modelled(cluster, owners, each, LAYER, np.array([], dtype=int))
    assert prefix_times(owners[None], loads[None], LAYER, cluster).moe_LT[0, 0] == pytest.approx(
        expected.moe_ns, rel=1e-9
    )


def test_the_hottest_come_first_and_ties_by_index():
    cluster = ClusterSpec.even(1, 2, intra_bytes_s=10**9)
    order = prefix_times(np.zeros((1, 4), dtype=int), np.array([[3, 9, 3, 0]]), LAYER, cluster).order_LE
    assert order.tolist() == [[1, 0, 2, 3]]


def test_late_copies_come_after_those_that_are_there():
    cluster = ClusterSpec.even(1, 2, intra_bytes_s=10**9, latency_ns=50, flops_s=10**9)
    owners, each = np.array([0, 0, 1, 1]), np.array([5, 400, 3, 60])
    there = np.array([[False, False, True, False]])
    times = prefix_times(owners[None], each[None] * 2 * LOAD_SCALE, LAYER, cluster, everywhere_LE=there)
    assert times.order_LE[0].tolist() == [2, 1, 3, 0]
    assert np.isinf(times.moe_LT[0, 0])
    for t in range(1, 5):
        chosen = times.order_LE[0, :t]
        expected = modelled(cluster, owners, each, LAYER, chosen, late=chosen[1:])
        assert times.moe_LT[0, t] == pytest.approx(expected.moe_ns, rel=0.05)


def test_layers_do_not_mix():
    cluster = ClusterSpec.even(2, 2, intra_bytes_s=10**9, inter_bytes_s=10**8)
    rng = np.random.default_rng(0)
    owners, loads = rng.integers(4, size=(5, 9)), rng.integers(1000, size=(5, 9)) * LOAD_SCALE
    together = prefix_times(owners, loads, LAYER, cluster)
    for layer in range(5):
        alone = prefix_times(owners[layer : layer + 1], loads[layer : layer + 1], LAYER, cluster)
        assert (alone.moe_LT[0] == together.moe_LT[layer]).all()
