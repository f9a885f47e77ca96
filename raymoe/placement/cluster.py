"""What planning knows about the machines: which rank sits on which node, how fast bytes move, how fast devices compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np

_LEAST = {
    "intra_bytes_s": 1,
    "inter_bytes_s": 1,
    "latency_ns": 0,
    "inter_latency_ns": 0,
    "flops_s": 1,
    "memory_bytes": 1,
    "tile_rows": 1,
    "overlap_percent": 0,
}


@dataclass(frozen=True)
class ClusterSpec:
    """The ranks of one epoch and their links. All numbers are whole, so that every rank plans with the same arithmetic.

    Raises:
        ValueError: no ranks, node numbers with a gap, or a number that is not whole or not in range; names the field.
    """

    node_of: tuple[int, ...]
    """Node of every rank, [D]; nodes are numbered 0..N-1 and each has at least one rank."""

    intra_bytes_s: int
    """Bytes per second that one device moves to others on its node, each way."""

    inter_bytes_s: int
    """Bytes per second between nodes, each way: of a node if its devices share the NIC, else of a device."""

    latency_ns: int = 50_000
    """Fixed cost of one collective within a node, in nanoseconds."""

    inter_latency_ns: int = 0
    """The same for one that crosses nodes; 0: as within a node."""

    flops_s: int = 1_000_000_000_000
    """FLOP per second that a device reaches on expert GEMMs: measured, or the data sheet's times a share."""

    memory_bytes: int | None = None
    """Memory of a device; None: not known, nothing is bounded by it."""

    nic_shared: bool = True
    """Whether a node's devices share ``inter_bytes_s``."""

    full_duplex: bool = True
    """Whether a link moves its bandwidth both ways at once."""

    tile_rows: int = 1
    """Rows that the grouped GEMM rounds each expert's rows up to."""

    overlap_percent: int = 100
    """How much of the time that devices compute also moves bytes: 100 where NICs and copy engines do it alone, 0 where
    the same cores compute and copy."""

    def __post_init__(self) -> None:
        nodes = tuple(int(node) for node in self.node_of)
        if not nodes:
            raise ValueError("node_of is empty: a cluster needs at least one rank")
        missing = sorted(set(range(max(nodes) + 1)) - set(nodes))
        if min(nodes) < 0 or missing:
            raise ValueError(
                f"node_of = {list(nodes)}: nodes must be numbered 0..N-1 without a gap"
                + (f", but no rank sits on node {missing[0]}" if missing else "")
            )
        object.__setattr__(self, "node_of", nodes)
        object.__setattr__(self, "inter_latency_ns", self.inter_latency_ns or self.latency_ns)
        for field, least in _LEAST.items():
            value = getattr(self, field)
            if field == "memory_bytes" and value is None:
                continue
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{field} = {value!r}: give a whole number of at least {least}")
            object.__setattr__(self, field, int(value))
        if self.overlap_percent > 100:
            raise ValueError(f"overlap_percent = {self.overlap_percent}: at most 100")

    @classmethod
    def even(
        cls,
        num_nodes: int,
        devices_per_node: int,
        *,
        intra_bytes_s: int,
        inter_bytes_s: int | None = None,
        **rest: int | bool | None,
    ) -> ClusterSpec:
        """A cluster of equal nodes, ranks numbered node by node. ``inter_bytes_s`` may be left out for one node.

        Args:
            rest: further fields by name.

        Raises:
            ValueError: a count below 1, or several nodes and no ``inter_bytes_s``.
        """
        if num_nodes < 1 or devices_per_node < 1:
            raise ValueError(f"{num_nodes} nodes x {devices_per_node} devices: both must be at least 1")
        if inter_bytes_s is None:
            if num_nodes > 1:
                raise ValueError(f"{num_nodes} nodes need inter_bytes_s, the bandwidth between them")
            inter_bytes_s = intra_bytes_s
        nodes = tuple(rank // devices_per_node for rank in range(num_nodes * devices_per_node))
        return cls(nodes, intra_bytes_s, inter_bytes_s, **rest)  # pyright: ignore[reportArgumentType]  (fields by name)

    @property
    def num_devices(self) -> int:
        return len(self.node_of)

    @cached_property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1

    @property
    def budget_bytes_s(self) -> int:
        """Bandwidth that bounds what hides behind attention: between nodes if there are several, else between devices.

        Source: arXiv 2502.02581, definition of the overlap degree.
        """
        return self.inter_bytes_s if self.num_nodes > 1 else self.intra_bytes_s

    @cached_property
    def nodes(self) -> np.ndarray:
        """``node_of`` as int64 [D], read-only."""
        nodes = np.array(self.node_of, dtype=np.int64)
        nodes.flags.writeable = False
        return nodes

    @cached_property
    def devices_on(self) -> np.ndarray:
        """int64 [N], read-only: ranks on each node."""
        counts = np.bincount(self.nodes)
        counts.flags.writeable = False
        return counts

    def per_node(self, counts_D: np.ndarray) -> np.ndarray:
        """Sums per node, int64 [N], of whole numbers [D] below 2^53 together."""
        return np.bincount(self.nodes, weights=counts_D).astype(np.int64)

    @cached_property
    def place_on_node(self) -> np.ndarray:
        """int64 [D], read-only: how many lower ranks sit on the same node."""
        places = np.cumsum(self.members, axis=1)[self.nodes, np.arange(self.num_devices)] - 1
        places.flags.writeable = False
        return places

    @cached_property
    def members(self) -> np.ndarray:
        """int64 [N, D], read-only: 1 where the rank sits on the node, so that ``members @ x`` sums x per node."""
        members = (self.nodes == np.arange(self.num_nodes)[:, None]).astype(np.int64)
        members.flags.writeable = False
        return members
