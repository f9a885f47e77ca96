"""Which experts will be hot next: a forecast from the loads of the last steps."""

from __future__ import annotations

import numpy as np

LOAD_SCALE = 60
"""A forecast counts in 1/60 of a routed row: the mean of up to 6 samples is then exact, without a float."""

DEFAULT_WINDOW = 5


def predict(history: np.ndarray, window: int = DEFAULT_WINDOW) -> np.ndarray:
    """The mean load of the last steps, in integers, so that every rank forecasts the same and ties stay ties.

    Args:
        history: integers [W, L, E], oldest first: routed rows that each expert got from all ranks together.
            W may be anything: fewer than ``window`` samples are averaged as they are, none forecasts zeros.
        window: samples to average, at least 1.

    Returns:
        loads, int64 [L, E], in units of 1/``LOAD_SCALE`` rows, rounded down (exact for windows of up to 6).

    Raises:
        ValueError: wrong shape or dtype, a negative load, or a window below 1.

    Source: arXiv 2502.02581, mean of the last w = 5 iterations.
    """
    history = np.asarray(history)
    if history.ndim != 3 or not np.issubdtype(history.dtype, np.integer):
        raise ValueError(f"history must be integers [W, L, E], got {history.dtype} {history.shape}")
    if window < 1:
        raise ValueError(f"window = {window}: must be at least 1")
    recent = history[-window:]
    if recent.size and recent.min() < 0:
        raise ValueError(f"history holds a negative load ({recent.min()}); loads are counts of routed rows")
    total = recent.sum(axis=0, dtype=np.int64)
    return total * LOAD_SCALE // max(len(recent), 1)
