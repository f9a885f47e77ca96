"""Requests that take too long."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from raymoe.serving.events import Event
from raymoe.serving.openai_api import too_late


async def within(events: AsyncGenerator[Event, None], deadline_s: float) -> AsyncGenerator[Event, None]:
    """The same events, until that many seconds from the first one asked for; closes `events` in every case.

    Raises:
        ApiError: 504, after that.
    """
    until = asyncio.get_running_loop().time() + deadline_s
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(until):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise too_late(deadline_s) from None
            yield event
