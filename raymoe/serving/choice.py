"""One choice of an answer: the engine's tokens become text, piece by piece."""

from collections.abc import AsyncGenerator, AsyncIterator

from raymoe.inference.text import StopStrings, TextStream
from raymoe.serving.events import Event
from raymoe.serving.logprobs import Likelihoods
from raymoe.serving.openai_answers import Piece, Usage
from raymoe.serving.openai_api import unavailable


class Choice:
    """One request that an engine has accepted. `close` it, whatever happens."""

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        stream: TextStream,
        stops: tuple[str, ...],
        likelihoods: Likelihoods,
        usage: Usage,
        echo: str = "",
    ):
        """`usage`: of the whole answer, this choice's tokens are added to it. `echo`: what the text begins with."""
        self._events = events
        self._stream = stream
        self._stops = StopStrings(stops)
        self._likelihoods = likelihoods
        self._num_decoded = 0
        self._num_sent = 0
        self._usage = usage
        self._echo = echo

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises: ApiError when the engine fails on the way."""
        if self._echo:
            yield Piece(self._echo, None, [])
        async for event in self._events:
            reason = event.finish_reason
            if reason in ("error", "cancelled"):
                raise unavailable(event.error or "the engine ended this request")
            self._usage.completion_tokens += len(event.tokens)
            if event.stood_in is not None:
                self._usage.stood_in_rows = event.stood_in + (self._usage.stood_in_rows or 0)
            text = self._decode(event)
            if reason is not None:
                text += self._stream.finish()
            ready, is_stopped = self._stops.push(text)
            if reason is not None and not is_stopped:
                ready += self._stops.finish()
            self._num_sent += len(ready)
            is_whole = reason is not None and not is_stopped
            likelihoods = self._likelihoods.release(None if is_whole else self._num_sent)
            routes = tuple((self._likelihoods.text_of(route.token).text, route) for route in event.routes or ())
            if is_stopped or reason is not None:
                yield Piece(ready, "stop" if is_stopped else reason, likelihoods, routes)
                return
            if ready or routes:
                yield Piece(ready, None, likelihoods, routes)
        raise unavailable("the engine ended this request without a last token")

    async def whole(self) -> Piece:
        """All of it in one piece. Raises: as `pieces`."""
        text, reason, likelihoods, routes = "", None, [], ()
        async for piece in self.pieces():
            text, reason = text + piece.text, piece.finish_reason
            likelihoods += piece.likelihoods
            routes += piece.routes
        assert reason is not None, "the last piece has a reason"
        return Piece(text, reason, likelihoods, routes)

    async def close(self) -> None:
        """Cancels the engine's request if it is not done."""
        await self._events.aclose()

    def _decode(self, event: Event) -> str:
        is_ended_by_token = event.finish_reason == "stop" and event.stop_string is None
        tokens = event.tokens[:-1] if is_ended_by_token else event.tokens
        if event.logprobs is None:
            return self._stream.push(tokens)
        text = ""
        for token, told in zip(tokens, event.logprobs, strict=False):
            self._likelihoods.add(told, self._num_decoded)
            new = self._stream.push([token])
            self._num_decoded += len(new)
            text += new
        return text
