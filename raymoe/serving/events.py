"""What the gateway and its engines say to each other. Plain data, without Ray."""

from collections.abc import AsyncGenerator
from typing import Any, NamedTuple, Protocol

from raymoe.inference.requests import TokenLogprobs, TokenRoute


class Event(NamedTuple):
    """What the engine says about a request. The first event accepts it or turns it down."""

    tokens: list[int]
    """New ones; a stop token is the last of them."""
    finish_reason: str | None = None
    """stop, length, cancelled, error, or None while more will come."""
    refusal: str | None = None
    """Why the request cannot be served; the client can mend it."""
    error: str | None = None
    """Why the engine failed; the client cannot mend it."""
    stop_string: str | None = None
    """The stop string that ended it; the last token is then text."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each token, if asked for."""
    stood_in: int | None = None
    """Of the last event under on_miss: compressed, see `raymoe.inference.Delta`."""
    routes: list[TokenRoute] | None = None
    """One for each token, if asked for."""
    max_tokens: int | None = None
    """Of the event that accepts: as many as there will be at the most."""
    is_engine_dead: bool = False
    """Of an error: the engine's end, not this request's own."""


class EngineClient(Protocol):
    """The engines behind the gateway."""

    def generate(
        self, prompt_ids: list[int], params: dict[str, Any], in_steps: bool, up_to: bool
    ) -> AsyncGenerator[Event, None]:
        """Starts a request, see `Engine.generate`; closing the generator cancels it. Raises: ApiError."""
        ...

    async def status(self, history: bool = False) -> list[dict[str, Any]]:
        """`Engine.status` of every engine that answers."""
        ...

    async def set_budgets(self, budgets: dict[str, Any]) -> None:
        """`Engine.reconfigure` of every engine. Raises: ApiError: 400, a budget that one of them cannot have."""
        ...

    def metrics_endpoints(self) -> list[str]:
        """URLs that Prometheus scrapes."""
        ...
