"""What goes into an engine and what comes out of it: plain data, without torch, for whoever only talks to one."""

import math
import secrets
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
MAX_PRIORITY = 1 << 31

_MAX_SEED = (1 << 64) - 1


class EngineError(RuntimeError):
    """The engine cannot generate any more; every request has been told, and it must be made anew."""


class TokenLogprobs(NamedTuple):
    """What the model thought of one generated token: natural logarithms of its own distribution, before any temperature."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """(token, logprob) of the likeliest tokens, as many as were asked for, likeliest first."""


RouteOutcome = Literal["hit", "fetched", "stood_in"]
"""The expert was in its slot; had to be waited for; or its compressed vectors acted in its place."""


class TokenRoute(NamedTuple):
    """The experts that one generated token came through."""

    token: int
    layers: list[list[tuple[int, RouteOutcome]]]
    """Of each MoE layer, (expert, where it came from), in the router's order."""


@dataclass(frozen=True)
class Delta:
    """What a request got since its last delta."""

    tokens: list[int]
    """A stop token is the last of them, and so is the token that completed a stop string."""
    finish_reason: FinishReason | None = None
    """None: more will come. Exactly one delta of a request has a reason, and it is the last."""
    error: str | None = None
    stop_string: str | None = None
    """The stop string that ended the request; its text is part of the tokens. None where a stop token did."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `tokens`; None if the request did not ask."""
    stood_in: int | None = None
    """On the last delta under on_miss: compressed: rows of the request that vectors stood in for a missing expert."""
    routes: list[TokenRoute] | None = None
    """One for each of `tokens`; None if the request did not ask."""


def _fresh_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for.

    Raises:
        ValueError: a value out of range; names it.
    """

    max_tokens: int = 16
    """Most tokens to generate, at least 1."""
    temperature: float = 1.0
    """0 is greedy; up to 2 as in OpenAI's API."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability, in (0, 1]."""
    top_k: int = 0
    """Draw among that many likeliest tokens; 0: all of them."""
    seed: int = field(default_factory=_fresh_seed)
    """The same prompt, parameters and seed give the same tokens, whatever the batch around them; any 64-bit number."""
    stop_token_ids: tuple[int, ...] | None = None
    """Generation ends with the first of these; None: the model's own end tokens, (): none."""
    stop: tuple[str, ...] = ()
    """Generation ends with the token that completes one of these texts; only engines that were made with `decode` take any."""
    logprobs: int | None = None
    """Tell the log-probability of each token, and of that many likeliest ones at its place, 0 to 20; None: of none."""

    routes: bool = False
    """Tell the experts that each token came through."""
    priority: int = 0
    """Higher goes first: before lower ones into a step, and before them from waiting to being read."""

    def __post_init__(self):
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("top_k", self.top_k, 0, None)
        _check_int("seed", self.seed, -(1 << 63), _MAX_SEED)
        _check_float("temperature", self.temperature, 0.0 <= self.temperature <= 2.0, "from 0 to 2")
        _check_float("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, up to 1")
        for token in self.stop_token_ids or ():
            _check_int("stop_token_ids", token, 0, None)
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop must be a tuple of texts, none of them empty, got {self.stop!r}")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1


def _check_int(name: str, value: int, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")


def _check_float(name: str, value: float, is_inside: bool, bounds: str) -> None:
    # NaN compares false with everything
    if not is_inside or not math.isfinite(value):
        raise ValueError(f"{name} must be a number {bounds}, got {value!r}")
