"""SmartMoE: experts change places, none is copied."""

from __future__ import annotations

import numpy as np

from raymoe.placement.plan import Base, Plan, owned
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals.loads import measured
from raymoe.placement.rivals.replicas import pack
from raymoe.placement.state import PlacementState


class SmartMoe(PolicyDefaults):
    """Every 25 steps, layer by layer: the heaviest expert by its mean load since the last change goes to the least loaded
    rank, equally many experts on each, an expert staying on ties; done if the most loaded rank's load falls.
    """

    name = "smartmoe"
    source = "SmartMoE (ATC'23), online placement, and its code"
    assumed = (
        "Without the offline pool of parallel strategies; the optimizer state moves too, which the artifact leaves out. "
        "Where ranks do not divide experts some ranks have one more."
    )
    interval: int | None = 25
    materialises = False

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """No copies."""
        return Plan.of(state.base, state.base.resident, state.workload)

    def reshard(self, history: np.ndarray, state: PlacementState) -> Base:
        """The exchange in those layers where it helps; a mean over all of ``history`` is a sum here."""
        loads_LE = measured(history.sum(axis=0, keepdims=True), state)
        owners, num_devices = state.base.owners, state.cluster.num_devices
        one_node = np.zeros(num_devices, dtype=np.int64)
        packed = pack(loads_LE, np.ones_like(loads_LE), one_node, owners).argmax(axis=2)
        helps_L = _busiest(packed, loads_LE, num_devices) < _busiest(owners, loads_LE, num_devices)
        if not helps_L.any():
            return state.base
        return Base.of_owners(np.where(helps_L[:, None], packed, owners), num_devices)


def _busiest(owners: np.ndarray, loads_LE: np.ndarray, num_devices: int) -> np.ndarray:
    return (owned(owners, num_devices) * loads_LE[..., None]).sum(axis=1).max(axis=1)
