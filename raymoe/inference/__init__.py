"""The data plane of a serving engine: expert cache and its tiers, sampling, continuous batching. No Ray.

What needs torch is loaded when it is first asked for, so that a process that only talks to an engine stays small.
"""

from importlib import import_module
from typing import Any

from raymoe.inference.requests import Delta, EngineError, SamplingParams

_HEAVY = {
    "CacheCounters": "cache",
    "CacheWindow": "cache",
    "CheckpointTier": "tiers",
    "ExpertCache": "cache",
    "ExpertSource": "tiers",
    "InferenceEngine": "engine",
}

__all__ = [*_HEAVY, "Delta", "EngineError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(import_module(f"{__name__}.{_HEAVY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
