"""The engines that `bench inference` compares."""

from __future__ import annotations

from typing import Any

import torch

_NONE: dict[str, Any] = {"predictors": ()}
ARMS: dict[str, dict[str, Any]] = {
    "resident": {**_NONE, "expert_memory": "100%"},
    "on-demand": {**_NONE, "expert_memory": "one expert"},
    "global lru": {**_NONE, "eviction": "global_lru"},
    "lru": {**_NONE, "eviction": "lru"},
    "lfu": {**_NONE, "eviction": "lfu"},
    "expected use": _NONE,
    "look-ahead": {"predictors": ("look_ahead",)},
    "path, plec": {"predictors": ("path",), "eviction": "plec"},
    "full": {},
}
"""Options of the engine, by arm."""


def options_of(name: str, budget: int, batch: int, dtype: str = "float32") -> dict[str, Any]:
    """Keyword arguments of `InferenceEngine`, for a budget in percent and so many requests at once."""
    options = {"expert_memory": f"{budget}%", "kv_tokens": 256 * max(batch, 4), "dtype": dtype, **ARMS[name]}
    if options["expert_memory"] == "one expert":
        options["expert_memory"] = 3 * 256 * 128 * getattr(torch, dtype).itemsize
    return options
