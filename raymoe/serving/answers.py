"""A request's way through the gateway, without HTTP and without Ray: prompt to tokens, engine, tokens to text."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from raymoe.config import ServeConfig
from raymoe.inference.requests import TokenLogprobs
from raymoe.inference.text import CONTEXT_TOKENS, StopStrings, TextStream, decoder
from raymoe.serving.logprobs import Likelihood, Likelihoods
from raymoe.serving.openai_answers import Usage
from raymoe.serving.openai_api import ApiError, ChatRequest, CompletionRequest, unavailable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, for /v1/completions without max_tokens; a chat answer may go on to the server's limit."""

_LONG_PROMPT_CHARS = 20_000


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


class EngineClient(Protocol):
    """The engines behind the gateway."""

    def generate(self, prompt_ids: list[int], params: dict[str, Any], in_steps: bool) -> AsyncGenerator[Event, None]:
        """Starts a request, see `Engine.generate`; closing the generator cancels it. Raises: ApiError."""
        ...

    async def status(self, history: bool = False) -> list[dict[str, Any]]:
        """`Engine.status` of every engine that answers."""
        ...


class Piece(NamedTuple):
    text: str
    finish_reason: str | None
    """Set on the last piece: stop or length."""
    likelihoods: list[Likelihood]
    """Of the tokens that begin in the text, if asked for."""


class Answer:
    """One accepted request: its text, piece by piece, and what it cost. `close` it, whatever happens."""

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        stream: TextStream,
        stops: tuple[str, ...],
        prompt_tokens: int,
        likelihoods: Likelihoods,
    ):
        self._events = events
        self._stream = stream
        self._stops = StopStrings(stops)
        self._likelihoods = likelihoods
        self._num_decoded = 0
        self._num_sent = 0
        self.usage = Usage(prompt_tokens)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises: ApiError when the engine fails on the way."""
        async for event in self._events:
            reason = event.finish_reason
            if reason in ("error", "cancelled"):
                raise unavailable(event.error or "the engine ended this request")
            self.usage.completion_tokens += len(event.tokens)
            if event.stood_in is not None:
                self.usage.stood_in_rows = event.stood_in
            text = self._decode(event)
            if reason is not None:
                text += self._stream.finish()
            ready, is_stopped = self._stops.push(text)
            if reason is not None and not is_stopped:
                ready += self._stops.finish()
            self._num_sent += len(ready)
            is_whole = reason is not None and not is_stopped
            likelihoods = self._likelihoods.release(None if is_whole else self._num_sent)
            if is_stopped or reason is not None:
                yield Piece(ready, "stop" if is_stopped else reason, likelihoods)
                return
            if ready:
                yield Piece(ready, None, likelihoods)
        raise unavailable("the engine ended this request without a last token")

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

    async def whole(self) -> Piece:
        """All of it in one piece. Raises: as `pieces`."""
        text, reason, likelihoods = "", None, []
        async for piece in self.pieces():
            text, reason = text + piece.text, piece.finish_reason
            likelihoods += piece.likelihoods
        assert reason is not None, "the last piece has a reason"
        return Piece(text, reason, likelihoods)

    async def close(self) -> None:
        """Cancels the engine's request if it is not done."""
        await self._events.aclose()


class Answering:
    """Turns requests of the API into answers."""

    def __init__(self, config: ServeConfig, tokenizer: "PreTrainedTokenizerBase", engine: EngineClient):
        self.model = config.name or config.model.name
        self.engine = engine
        self._config = config
        self._tokenizer = tokenizer
        self._decode = decoder(tokenizer)

    async def start(self, request: CompletionRequest | ChatRequest) -> Answer:
        """Checks a request and has an engine accept it. Raises: ApiError."""
        if request.model != self.model:
            raise ApiError(
                f"The model '{request.model}' does not exist; this server has '{self.model}'",
                status=404,
                param="model",
                code="model_not_found",
            )
        if isinstance(request, ChatRequest):
            asked_tokens = request.limit
            prompt_ids = await self._encode(self._chat_text(request), is_chat=True)
        else:
            asked_tokens = request.max_tokens or min(_DEFAULT_COMPLETION_TOKENS, self._config.max_tokens)
            prompt = request.prompt
            prompt_ids = await self._encode(prompt) if isinstance(prompt, str) else prompt
        self._check_limits(len(prompt_ids), asked_tokens)
        events = self.engine.generate(prompt_ids, request.sampling(asked_tokens), bool(request.stream))
        try:
            first = await anext(events)
            if first.refusal is not None:
                raise ApiError(first.refusal)
            if first.error is not None:
                raise unavailable(first.error)
        except BaseException:
            await events.aclose()
            raise
        stream = TextStream(self._decode, context=prompt_ids[-CONTEXT_TOKENS:])
        return Answer(events, stream, request.stop, len(prompt_ids), Likelihoods(self._tokenizer))

    def _check_limits(self, prompt_tokens: int, asked_tokens: int | None) -> None:
        limits = self._config
        if prompt_tokens > limits.max_prompt_tokens:
            raise ApiError(
                f"the prompt has {prompt_tokens} tokens; this server takes up to {limits.max_prompt_tokens} "
                "(max_prompt_tokens in its configuration)",
                code="context_length_exceeded",
            )
        if asked_tokens is not None and asked_tokens > limits.max_tokens:
            raise ApiError(
                f"max_tokens is {asked_tokens}; this server gives up to {limits.max_tokens} "
                "(max_tokens in its configuration)",
                param="max_tokens",
                code="invalid_value",
            )

    def _chat_text(self, request: ChatRequest) -> str:
        if not self._tokenizer.chat_template:
            raise ApiError(
                f"the model '{self.model}' has no chat template; use /v1/completions",
                param="messages",
                code="unsupported",
            )
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        try:
            return cast(str, self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            # templates are programs of the model's author and refuse what they do not know in their own words
            raise ApiError(f"the model's chat template refuses these messages: {error}", param="messages") from None

    async def _encode(self, text: str, is_chat: bool = False) -> list[int]:
        # a chat template writes its own special tokens
        def encode() -> list[int]:
            return self._tokenizer(text, add_special_tokens=not is_chat)["input_ids"]

        return await asyncio.to_thread(encode) if len(text) > _LONG_PROMPT_CHARS else encode()
