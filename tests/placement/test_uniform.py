import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.placement import LOAD_SCALE, ClusterSpec, Workload, layer_cost
from raymoe.placement.uniform import uniform_moe_ns
from tests.placement.strategies import layer_plans


@pytest.mark.parametrize(("dispatch", "choices"), [("local", 1), ("local", 2), ("level", 1)])
@settings(max_examples=200, deadline=None)
@given(layer_plans(), st.integers(0, 2**32 - 1))
def test_is_the_cost_model_where_ranks_route_alike(dispatch, choices, placed, seed):
    layer, cluster = placed
    cluster = ClusterSpec(cluster.node_of, 10**9, 10**8, latency_ns=50, flops_s=10**9)
    workload = Workload(3000, 10, 50, attention_ns=9_000, choices=choices)
    # rows that every number of copies up to 16 shares without a remainder
    each = np.random.default_rng(seed).integers(0, 3, size=layer.num_experts) * 720_720
    rows_DE = np.tile(each, (layer.num_devices, 1))
    expected = layer_cost(layer, rows_DE, workload, cluster, dispatch=dispatch).moe_ns
    loads = each * layer.num_devices * LOAD_SCALE
    got = uniform_moe_ns(layer.owners, layer.copies, loads, workload, cluster, dispatch=dispatch)
    assert got == pytest.approx(expected, rel=1e-6 if choices == 1 else 0.1)
