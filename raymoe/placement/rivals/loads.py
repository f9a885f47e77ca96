"""What rivals plan from: measured loads without the layers that say nothing."""

from __future__ import annotations

import numpy as np

from raymoe.placement.loads import LOAD_SCALE
from raymoe.placement.policy import expected_loads
from raymoe.placement.state import PlacementState


def measured(history: np.ndarray, state: PlacementState) -> np.ndarray:
    """The mean of the last ``state.window`` samples; a layer that routed nothing counts as one row an expert.

    Args:
        history: int64 [W, L, E], W >= 0. The last sample alone is ``history[-1:]``.

    Returns:
        int64 [L, E], in units of 1/``LOAD_SCALE`` rows; every layer has a positive sum.

    Raises:
        ValueError: history is not [W, L, E] with the L and E of the owners.
    """
    loads = expected_loads(history, state)
    return np.where(loads.any(axis=1, keepdims=True), loads, LOAD_SCALE)
