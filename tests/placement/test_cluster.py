import pickle

import numpy as np
import pytest

from raymoe.placement import ClusterSpec


def test_even_cluster_numbers_ranks_node_by_node():
    cluster = ClusterSpec.even(2, 3, intra_bytes_s=100, inter_bytes_s=10)
    assert (cluster.node_of, cluster.num_devices, cluster.num_nodes) == ((0, 0, 0, 1, 1, 1), 6, 2)


def test_members_sum_per_node():
    cluster = ClusterSpec((0, 1, 0), intra_bytes_s=1, inter_bytes_s=1)
    assert (cluster.members @ np.array([1, 10, 100])).tolist() == [101, 10]


def test_one_node_needs_no_bandwidth_between_nodes():
    assert ClusterSpec.even(1, 4, intra_bytes_s=100).budget_bytes_s == 100


def test_several_nodes_are_bound_by_the_link_between_them():
    assert ClusterSpec.even(2, 4, intra_bytes_s=100, inter_bytes_s=10).budget_bytes_s == 10


def test_survives_pickling_after_use():
    cluster = ClusterSpec.even(2, 2, intra_bytes_s=100, inter_bytes_s=10)
    assert cluster.members.shape == (2, 4)
    assert pickle.loads(pickle.dumps(cluster)) == cluster


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"node_of": ()}, "at least one rank"),
        ({"node_of": (0, 2)}, "no rank sits on node 1"),
        ({"node_of": (-1, 0)}, "numbered 0..N-1"),
        ({"intra_bytes_s": 0}, "intra_bytes_s = 0"),
        ({"inter_bytes_s": 1.5}, "inter_bytes_s = 1.5"),
        ({"latency_ns": -1}, "latency_ns = -1"),
        ({"flops_s": 0}, "flops_s = 0"),
        ({"memory_bytes": 0}, "memory_bytes = 0"),
        ({"overlap_percent": 101}, "at most 100"),
    ],
)
def test_refuses_what_cannot_be(fields, said):
    good = {"node_of": (0, 0), "intra_bytes_s": 100, "inter_bytes_s": 10}
    with pytest.raises(ValueError, match=said):
        ClusterSpec(**(good | fields))


def test_several_nodes_without_a_link_are_refused():
    with pytest.raises(ValueError, match="need inter_bytes_s"):
        ClusterSpec.even(2, 2, intra_bytes_s=100)


def test_no_nodes_are_refused():
    with pytest.raises(ValueError, match="0 nodes x 2 devices"):
        ClusterSpec.even(0, 2, intra_bytes_s=100)
