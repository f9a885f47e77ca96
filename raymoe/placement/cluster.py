"""What planning knows about the machines: which rank sits on which node, and how fast bytes move between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np


@dataclass(frozen=True)
class ClusterSpec:
    """The ranks of one epoch and their links. All numbers are whole, so that every rank plans with the same arithmetic.

    Raises:
        ValueError: no ranks, node numbers with a gap, or a bandwidth or latency that is not a whole number in range.
    """

    node_of: tuple[int, ...]
    """Node of every rank, [D]; nodes are numbered 0..N-1 and each has at least one rank."""

    intra_bytes_s: int
    """Bytes per second that one device moves to another on its node."""

    inter_bytes_s: int
    """Bytes per second that one node moves to another; shared by the node's devices."""

    latency_ns: int = 50_000
    """Fixed cost of one collective, in nanoseconds."""

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
        for field, least in (("intra_bytes_s", 1), ("inter_bytes_s", 1), ("latency_ns", 0)):
            value = getattr(self, field)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{field} = {value!r}: give a whole number of at least {least}")
            object.__setattr__(self, field, int(value))

    @classmethod
    def even(
        cls,
        num_nodes: int,
        devices_per_node: int,
        *,
        intra_bytes_s: int,
        inter_bytes_s: int | None = None,
        latency_ns: int = 50_000,
    ) -> ClusterSpec:
        """A cluster of equal nodes, ranks numbered node by node. ``inter_bytes_s`` may be left out for one node.

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
        return cls(nodes, intra_bytes_s, inter_bytes_s, latency_ns)

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
    def members(self) -> np.ndarray:
        """int64 [N, D], read-only: 1 where the rank sits on the node, so that ``members @ x`` sums x per node."""
        members = (self.nodes == np.arange(self.num_nodes)[:, None]).astype(np.int64)
        members.flags.writeable = False
        return members
