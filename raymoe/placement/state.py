"""What a policy plans from besides the loads: the same on every rank, as the controller last published it."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.loads import DEFAULT_WINDOW, Forecast
from raymoe.placement.plan import Base, Dispatch
from raymoe.placement.workload import Workload


@dataclass(frozen=True, eq=False)
class PlacementState:
    """The present homes of the experts, the machines, and what a layer costs.

    Raises:
        ValueError: a base that does not fit the cluster, or a number out of range.
    """

    base: Base

    cluster: ClusterSpec

    workload: Workload

    extra_slots: int
    """m: copies a layer that a rank has memory for, besides the experts that live there."""

    overlap_degree: int | None = None
    """t: experts a layer whose copies may travel in one step; None: as many as hide behind attention."""

    window: int = DEFAULT_WINDOW
    """w: steps that the forecast looks at."""

    forecast: Forecast = "mean"
    """How it makes one load of them; see ``raymoe.placement.predict``."""

    steps_since_reshard: int = 0
    """Steps since ``Policy.reshard`` last changed the base."""

    dispatch: Dispatch | None = None
    """How rows will find a copy whatever the plan says; None: as it says."""

    def __post_init__(self) -> None:
        base = self.base
        if base.owners.ndim != 2:
            raise ValueError(f"owners must be [L, E], got {list(base.owners.shape)}")
        if base.resident.shape[-1] != self.cluster.num_devices:
            raise ValueError(
                f"the experts live on {base.resident.shape[-1]} ranks, the cluster has {self.cluster.num_devices}; "
                "owners of another epoch must be re-sharded first"
            )
        for field, least in (("extra_slots", 0), ("window", 1), ("steps_since_reshard", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} = {getattr(self, field)}: must be at least {least}")
        if self.overlap_degree is not None and self.overlap_degree < 0:
            raise ValueError(f"overlap_degree = {self.overlap_degree}: must be at least 0")
