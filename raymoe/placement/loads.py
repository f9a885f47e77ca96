"""Which experts will be hot next: forecasts from the loads of the last steps. W = steps, L = MoE layers, E = experts."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

LOAD_SCALE = 60
"""A forecast counts in 1/60 of a routed row: the mean of up to 6 samples is then exact, without a float."""

DEFAULT_WINDOW = 5

Forecast = Literal["mean", "last", "exponential"]


def predict(history: np.ndarray, window: int = DEFAULT_WINDOW, forecast: Forecast = "mean") -> np.ndarray:
    """The loads to expect, in integers, so that every rank forecasts the same and ties stay ties.

    Args:
        history: integers [W, L, E], oldest first: routed rows that each expert got from all ranks together.
            W may be anything: fewer than ``window`` samples are taken as they are, none forecasts zeros.
        window: samples to look at, at least 1.
        forecast: ``mean`` of the window; ``last`` sample; ``exponential``: each sample counts half of the next.

    Returns:
        loads, int64 [L, E], in units of 1/``LOAD_SCALE`` rows, rounded down (``mean``: exact for windows of up to 6).

    Raises:
        ValueError: wrong shape or dtype, a negative load, a window below 1 or, for ``exponential``, above 24.

    Source: arXiv 2502.02581, mean of the last w = 5 iterations; SYMI (arXiv 2504.19925), last value.
    """
    history = np.asarray(history)
    if history.ndim != 3 or not np.issubdtype(history.dtype, np.integer):
        raise ValueError(f"history must be integers [W, L, E], got {history.dtype} {history.shape}")
    if forecast not in get_args(Forecast):
        raise ValueError(f"forecast = {forecast!r}: choose one of {', '.join(get_args(Forecast))}")
    if window < 1 or (forecast == "exponential" and window > 24):
        raise ValueError(f"window = {window}: must be at least 1, and at most 24 for an exponential forecast")
    recent = history[-1:] if forecast == "last" else history[-window:]
    if recent.size and recent.min() < 0:
        raise ValueError(f"history holds a negative load ({recent.min()}); loads are counts of routed rows")
    ages = np.arange(len(recent), dtype=np.int64)
    weights = 1 << ages if forecast == "exponential" else np.ones_like(ages)
    total = (recent * weights[:, None, None]).sum(axis=0, dtype=np.int64)
    return total * LOAD_SCALE // max(int(weights.sum()), 1)


def forecast_error(forecast: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """How much of the load the forecast puts on the wrong experts, by layer: float64 [L], from 0 to 1.

    The total-variation distance between the two distributions; 0 where a layer routed nothing.

    Args:
        forecast, loads: integers [L, E], each in any unit.
    """
    shares = [x / np.maximum(x.sum(axis=-1, keepdims=True), 1) for x in (forecast, loads)]
    return np.where(loads.sum(axis=-1) > 0, np.abs(shares[0] - shares[1]).sum(axis=-1) / 2, 0.0)
