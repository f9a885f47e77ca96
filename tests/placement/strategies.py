"""Random clusters, owners and loads for the property tests of placement."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from raymoe.placement import Base, ClusterSpec, LayerPlan, PlacementState, Workload

WORKLOAD = Workload(expert_bytes=1000, row_bytes=10, row_flops=100)


@dataclass(frozen=True)
class Case:
    """One layer to plan. E and D are drawn apart, so E % D is anything and ranks may own nothing."""

    cluster: ClusterSpec
    owners_E: np.ndarray
    loads_E: np.ndarray
    t: int
    m: int

    def state(self) -> PlacementState:
        base = Base.of_owners(self.owners_E[None], self.cluster.num_devices)
        return PlacementState(base, self.cluster, WORKLOAD, extra_slots=self.m, overlap_degree=self.t)


def cluster_of(*ranks_per_node: int) -> ClusterSpec:
    nodes = tuple(node for node, ranks in enumerate(ranks_per_node) for _ in range(ranks))
    return ClusterSpec(nodes, intra_bytes_s=100, inter_bytes_s=10)


clusters = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda ranks: cluster_of(*ranks))


@st.composite
def cases(draw) -> Case:
    cluster = draw(clusters)
    num_experts = draw(st.integers(1, 12))
    owners = draw(st.lists(st.integers(0, cluster.num_devices - 1), min_size=num_experts, max_size=num_experts))
    # few distinct values make ties, zeros make experts nobody wants
    loads = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 5, 40, 1000]), min_size=num_experts, max_size=num_experts))
    return Case(cluster, np.array(owners), np.array(loads), t=draw(st.integers(0, 14)), m=draw(st.integers(0, 6)))


@st.composite
def layer_plans(draw) -> tuple[LayerPlan, ClusterSpec]:
    """Any placement at all, not only those that a policy makes."""
    cluster = draw(clusters)
    num_experts = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = rng.integers(cluster.num_devices, size=num_experts)
    copies = (rng.random((num_experts, cluster.num_devices)) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))).astype(
        np.uint8
    )
    copies[np.arange(num_experts), owners] = 1
    return LayerPlan(owners, copies), cluster


@st.composite
def routed_rows(draw, layer: LayerPlan, most: int = 60) -> np.ndarray:
    """int64 [D, E], rows that each rank routed; some ranks and experts have none."""
    size = layer.num_devices * layer.num_experts
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, most]), min_size=size, max_size=size))
    return np.array(counts, dtype=np.int64).reshape(layer.num_devices, layer.num_experts)
