"""What experts take on a device under a plan, in bytes."""

from __future__ import annotations

import numpy as np

from raymoe.placement.plan import Plan
from raymoe.placement.workload import Workload

BUFFERED_LAYERS = 2
"""Layers whose copies, or whose copies' gradients, exist at once when they are freed layer by layer."""


def expert_memory(plan: Plan, workload: Workload) -> np.ndarray:
    """Parameters, gradients, optimizer state and copies of all layers, without activations: int64 [D], bytes.

    Copies stay from forward to backward, their gradients only until their layer's have gone home; re-materialised copies
    exist for two layers at a time, as does what is put together from slices.
    """
    assert plan.resident is not None
    each = workload.expert_bytes + workload.gradient_bytes
    if plan.layout == "sliced":
        num_devices = plan.copies.shape[-1]
        slices = plan.owners.size * (each + workload.state_bytes) // num_devices
        copies_LD = plan.copies.sum(axis=1, dtype=np.int64)
        kept_D = BUFFERED_LAYERS * copies_LD.max(axis=0) if workload.rematerialise else copies_LD.sum(axis=0)
        return slices + kept_D * each
    living_D = plan.resident.sum(axis=(0, 1), dtype=np.int64) * (each + workload.state_bytes)
    copies_LD = (plan.copies > plan.resident).sum(axis=1, dtype=np.int64)
    if workload.rematerialise:
        return living_D + BUFFERED_LAYERS * copies_LD.max(axis=0) * each
    gradients_D = BUFFERED_LAYERS * copies_LD.max(axis=0) * workload.gradient_bytes
    return living_D + copies_LD.sum(axis=0) * workload.expert_bytes + gradients_D
