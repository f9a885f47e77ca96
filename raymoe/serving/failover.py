"""Requests that outlive their engine: begun again, or gone on with, at another one."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Literal

from raymoe.serving.events import Event
from raymoe.serving.openai_api import QUEUE_FULL, ApiError, unavailable

OnDeath = Literal["continue", "fail"]

Attempt = Callable[[list[int], dict[str, Any], bool], AsyncGenerator[Event, None]]
"""(prompt_ids, params, up_to) -> events of one engine, see `Engine.generate`; raises EngineLost."""

MOST_DEATHS = 7
"""After that many the request itself may be what kills them."""

_FIRST_WAIT_S = 0.05
_QUEUE_WAIT_S = 0.1


class EngineLost(Exception):
    """The engine that had the request is gone, and the request with it."""


async def surviving(
    attempt: Attempt, prompt_ids: list[int], params: dict[str, Any], up_to: bool, on_death: OnDeath
) -> AsyncGenerator[Event, None]:
    """The events of one request, as if its engine could not die.

    The next engine is given the prompt and what was sent as one prompt. A token is drawn by the request's seed and its position, so
    the tokens that follow are the same (in lower precision but for near ties: a prompt's sums are rounded in another order).

    Args:
        params: with their `seed`.
        on_death: of a request of which something was sent; the others always begin again.

    Raises:
        ApiError: 503: its engines have died too often, or one has and `on_death` is fail.
    """
    sent: list[int] = []
    most: int | None = None
    deaths = 0
    while deaths < MOST_DEATHS:
        rest = params if most is None else params | {"max_tokens": most - len(sent)}
        try:
            async with aclosing(attempt(prompt_ids + sent, rest, up_to and most is None)) as events:
                first = await anext(events)
                if most is None:
                    yield first
                    if first.refusal is not None or first.error is not None:
                        return
                    most = first.max_tokens or params["max_tokens"]
                elif first.refusal is not None or first.error is not None:
                    raise unavailable(f"the engine has died, and no other could go on: {first.refusal or first.error}")
                async for event in events:
                    sent += event.tokens
                    yield event
            return
        except EngineLost:
            if sent and on_death == "fail":
                raise unavailable("the engine that was answering has died (on_engine_death: fail)") from None
            # the next one may have died with it and not be missed yet
            await asyncio.sleep(_FIRST_WAIT_S * 2**deaths)
            deaths += 1
        except ApiError as error:
            # who was let in once is not turned away because others came while its engine died
            if not deaths or error.status != QUEUE_FULL:
                raise
            await asyncio.sleep(_QUEUE_WAIT_S)
    raise unavailable(f"{MOST_DEATHS} engines have died that had this request")
