"""What the controller publishes to the ranks, and how all of them come to apply it at the same step."""

from dataclasses import dataclass

from raymoe.placement import ClusterSpec, Dispatch, Workload


@dataclass(frozen=True)
class Publication:
    """Placement parameters for the steps to come."""

    version: int
    """From 0 upwards; each publication has a higher one than the last."""
    policy: str
    cluster: ClusterSpec
    """Which rank sits where, and what was measured of links and devices."""
    workload: Workload
    """What a MoE layer costs, as measured."""
    extra_slots: int
    """m: copies a layer that a rank may hold."""
    overlap_degree: int | None = None
    """t: experts a layer that may be copied in a step; None: as many as the policy finds good."""
    window: int = 5
    """Steps whose mean load is the forecast."""
    dispatch: Dispatch | None = None
    """How rows find a copy; None: as the policy says."""
    transport: str = "p2p"
    """How copies travel; see `raymoe.training.sparse`."""
    is_measured: bool = False
    """Whether cluster and workload hold what was measured; until then steps are timed for it."""
    snapshot_every: int = 0
    """Steps between two snapshots in memory; 0: none."""
    is_stop: bool = False
    """The epoch ends before the step at which all ranks hold this."""


class PublicationBox:
    """Publications that have reached this rank.

    Ranks all-reduce the MIN of `newest` in every step; all of them hold every version up to it, so all of them can apply it
    at the next step. `put` may be called from another thread.
    """

    def __init__(self, first: Publication):
        self._held = {first.version: first}
        self.applied = first

    @property
    def newest(self) -> int:
        return max(self._held)

    def put(self, publication: Publication) -> None:
        self._held = {**self._held, publication.version: publication}

    def held(self, version: int) -> Publication:
        """The publication of a version that all ranks hold."""
        return self._held[version]

    def agree(self, version: int) -> None:
        """Applies the publication that all ranks hold."""
        self.applied = self._held[version]
        self._held = {v: publication for v, publication in self._held.items() if v >= version}
