"""Small clusters on which a byte, a FLOP and a nanosecond are the same, and random ones for properties."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from raymoe.placement import Base, ClusterSpec, PlacementState, Policy, Workload, even_owners

NS = 1_000_000_000


def cluster_of(*ranks_per_node: int, inter_bytes_s: int = NS) -> ClusterSpec:
    nodes = tuple(node for node, ranks in enumerate(ranks_per_node) for _ in range(ranks))
    return ClusterSpec(nodes, intra_bytes_s=NS, inter_bytes_s=inter_bytes_s, latency_ns=0, flops_s=NS)


def even_state(
    cluster: ClusterSpec,
    num_experts: int,
    *,
    num_layers: int = 1,
    extra_slots: int = 0,
    expert_bytes: int = 100,
    row_flops: int = 1,
    attention_ns: int = 0,
    rematerialise: bool = False,
) -> PlacementState:
    """Experts split evenly; a row is a byte."""
    base = Base.of_owners(even_owners(num_layers, num_experts, cluster.num_devices), cluster.num_devices)
    workload = Workload(
        expert_bytes, row_bytes=1, row_flops=row_flops, attention_ns=attention_ns, rematerialise=rematerialise
    )
    return PlacementState(base, cluster, workload, extra_slots)


def started(policy: Policy, state: PlacementState) -> PlacementState:
    """The state that the policy's first step finds."""
    return with_base(state, policy.start(state.base, state))


def with_base(state: PlacementState, base: Base) -> PlacementState:
    return PlacementState(base, state.cluster, state.workload, state.extra_slots)


def history_of(*loads: list[int]) -> np.ndarray:
    """One step; a list a layer."""
    return np.array([loads])


def holders(copies_ED: np.ndarray) -> list[list[int]]:
    """The ranks of each expert."""
    return [np.flatnonzero(copies_D).tolist() for copies_D in copies_ED]


@dataclass(frozen=True)
class Case:
    """A step to plan. E and D are drawn apart, so that ranks may own several, one or none."""

    state: PlacementState
    history: np.ndarray
    """int64 [W, L, E], W >= 0."""
    rows: np.ndarray
    """int64 [D, L, E]: what the step then routes."""

    @property
    def most_per_rank(self) -> int:
        """Experts of a layer that a rank has memory for where all ranks have as much."""
        num_experts, num_devices = self.state.base.resident.shape[1:]
        return -(-num_experts // num_devices) + self.state.extra_slots


@st.composite
def cases(draw) -> Case:
    cluster = cluster_of(*draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)), inter_bytes_s=NS // 4)
    # ranks of a node need not be neighbours
    cluster = replace(cluster, node_of=tuple(draw(st.permutations(cluster.node_of))))
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    state = even_state(
        cluster,
        num_experts,
        num_layers=num_layers,
        extra_slots=draw(st.integers(0, 3)),
        expert_bytes=draw(st.sampled_from([1, 50, 100_000])),
        attention_ns=draw(st.sampled_from([0, 200])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # few distinct values make ties, zeros make experts nobody wants
    values = np.array(draw(st.sampled_from([[0], [7], [0, 0, 1, 2, 5, 5, 40, 1000]])))
    history = rng.choice(values, size=(draw(st.integers(0, 3)), num_layers, num_experts))
    rows = rng.choice(values, size=(cluster.num_devices, num_layers, num_experts))
    return Case(state, history, rows)
