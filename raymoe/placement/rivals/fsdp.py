"""Every expert on every rank in every step, as dense sharded data parallelism has it."""

from __future__ import annotations

import numpy as np

from raymoe.placement.plan import Plan
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.rivals.replicas import sliced_base
from raymoe.placement.state import PlacementState


class Fsdp(PolicyDefaults):
    """Each expert is sliced over all ranks; all ranks put all experts together before a layer, and no row travels."""

    name = "fsdp"
    source = "ZeRO-3 / FSDP (arXiv 1910.02054, 2304.11277), as the dense bound of arXiv 2502.02581, section 2"
    assumed = (
        "Full sharding: parameters are freed after forward and gathered again in backward. "
        "Room for all experts of two layers is taken for granted, whatever extra_slots says."
    )
    rematerialise = True
    keeps_whole = False

    def prepare(self, history: np.ndarray, state: PlacementState) -> Plan:
        """All copies; the history is not looked at."""
        copies = np.ones(state.base.resident.shape, dtype=np.uint8)
        return Plan.of(sliced_base(copies), copies, state.workload, layout="sliced")
