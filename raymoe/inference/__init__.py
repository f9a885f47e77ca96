"""The data plane of a serving engine: expert cache and its tiers, sampling, continuous batching. No Ray.

What needs torch is loaded when it is first asked for, so that a process that only talks to an engine stays small.
"""

from raymoe.inference.requests import Delta, EngineError, SamplingParams, TokenLogprobs
from raymoe.lazy import lazy_exports

_HOMES = {
    "CacheCounters": "counters",
    "CacheWindow": "counters",
    "CheckpointTier": "tiers",
    "ExpertCache": "cache",
    "ExpertSource": "tiers",
    "InferenceEngine": "engine",
}

__all__ = [*_HOMES, "Delta", "EngineError", "SamplingParams", "TokenLogprobs"]
__getattr__ = lazy_exports(__name__, _HOMES)
