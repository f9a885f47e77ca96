"""What will be wanted next: predictors of experts behind one interface, how good they are, and whether they pay. No Ray."""

from raymoe.lazy import lazy_exports

_HOMES = {
    "GateLookAhead": "look_ahead",
    "Judge": "judge",
    "PathPredictor": "path_predictor",
    "Predictor": "base",
    "Quality": "quality",
    "QualityCounts": "quality",
    "TokenTable": "token_table",
    "TransitionTable": "transitions",
    "WindowCost": "judge",
    "combine": "quality",
    "predictors_by_name": "selection",
}

__all__ = [*_HOMES]
__getattr__ = lazy_exports(__name__, _HOMES)
