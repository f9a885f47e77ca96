"""A request's way through the gateway, without HTTP and without Ray: prompts to tokens, engines, tokens to text."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from raymoe.config import ServeConfig
from raymoe.inference.text import CONTEXT_TOKENS, TextStream, decoder
from raymoe.serving.choice import Choice
from raymoe.serving.deadline import within
from raymoe.serving.events import EngineClient
from raymoe.serving.logprobs import Likelihoods
from raymoe.serving.openai_answers import Piece, Usage
from raymoe.serving.openai_api import ApiError, ChatRequest, CompletionRequest, unavailable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, for /v1/completions without max_tokens; a chat answer may go on to the server's limit."""

_LONG_PROMPT_CHARS = 20_000

T = TypeVar("T")


class Answer:
    """One accepted request: its choices, and what they cost. `close` it, whatever happens."""

    def __init__(self, choices: list[Choice], usage: Usage):
        self._choices = choices
        self.usage = usage

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(choice, its next piece) as they come. Raises: ApiError when an engine fails on the way."""
        if len(self._choices) == 1:
            async for piece in self._choices[0].pieces():
                yield 0, piece
            return
        inbox: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(maxsize=len(self._choices))

        async def forward(index: int, pieces: AsyncIterator[Piece]) -> None:
            try:
                async for piece in pieces:
                    await inbox.put((index, piece))
                await inbox.put(None)
            except Exception as error:
                await inbox.put(error)

        tasks = [asyncio.create_task(forward(index, choice.pieces())) for index, choice in enumerate(self._choices)]
        try:
            num_open = len(tasks)
            while num_open:
                told = await inbox.get()
                if isinstance(told, Exception):
                    raise told
                if told is None:
                    num_open -= 1
                else:
                    yield told
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def whole(self) -> list[Piece]:
        """Each choice in one piece. Raises: as `pieces`."""
        return await _all_or_none([choice.whole() for choice in self._choices])

    async def close(self) -> None:
        """Cancels what is not done."""
        for choice in self._choices:
            await choice.close()


class Answering:
    """Turns requests of the API into answers."""

    def __init__(self, config: ServeConfig, tokenizer: "PreTrainedTokenizerBase", engine: EngineClient):
        self.model = config.name or config.model.name
        self.engine = engine
        self.config = config
        self._tokenizer = tokenizer
        self._decode = decoder(tokenizer)

    async def start(self, request: CompletionRequest | ChatRequest) -> Answer:
        """Checks a request and has engines accept its choices. Raises: ApiError."""
        if request.model != self.model:
            raise ApiError(
                f"The model '{request.model}' does not exist; this server has '{self.model}'",
                status=404,
                param="model",
                code="model_not_found",
            )
        self._check_choices(request)
        if isinstance(request, ChatRequest):
            asked_tokens = request.limit
            prompts = [await self._encode(self._chat_text(request), is_chat=True)]
        else:
            asked_tokens = request.max_tokens or min(_DEFAULT_COMPLETION_TOKENS, self.config.max_tokens)
            prompts = [await self._encode(one) if isinstance(one, str) else one for one in request.prompt]
        for prompt_ids in prompts:
            self._check_limits(len(prompt_ids), asked_tokens)
        usage = Usage(sum(map(len, prompts)))
        seed = secrets.randbits(62) if request.seed is None else request.seed
        starts = [
            self._begin(request, index, prompt_ids, asked_tokens, seed + choice, usage)
            for index, prompt_ids in enumerate(prompts)
            for choice in range(request.n or 1)
        ]
        return Answer(await _all_or_none(starts, undo=Choice.close), usage)

    async def _begin(
        self,
        request: CompletionRequest | ChatRequest,
        index: int,
        prompt_ids: list[int],
        asked_tokens: int | None,
        seed: int,
        usage: Usage,
    ) -> Choice:
        most = self.config.max_tokens if asked_tokens is None else asked_tokens
        params = request.sampling(most) | {"seed": seed}
        deadline_s = min(request.deadline_s or self.config.deadline_s, self.config.deadline_s)
        up_to = asked_tokens is None
        events = within(self.engine.generate(prompt_ids, params, bool(request.stream), up_to), deadline_s)
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
        echo = ""
        if isinstance(request, CompletionRequest) and request.echo:
            prompt = request.prompt[index]
            echo = prompt if isinstance(prompt, str) else self._decode(prompt)
        return Choice(events, stream, request.stop, Likelihoods(self._tokenizer), usage, echo)

    def _check_choices(self, request: CompletionRequest | ChatRequest) -> None:
        num_prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        wanted = num_prompts * (request.n or 1)
        if wanted > self.config.max_choices:
            raise ApiError(
                f"n times the number of prompts is {wanted}; this server gives up to {self.config.max_choices} choices "
                "a request (max_choices in its configuration)",
                param="prompt" if num_prompts > 1 else "n",
                code="invalid_value",
            )

    def _check_limits(self, prompt_tokens: int, asked_tokens: int | None) -> None:
        limits = self.config
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


async def _all_or_none(
    work: Sequence[Coroutine[Any, Any, T]], undo: Callable[[T], Awaitable[None]] | None = None
) -> list[T]:
    """All results; when one fails the others are cancelled, `undo` is called on what was done, and its error is raised."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            if undo is not None and not isinstance(done, BaseException):
                await undo(done)
        raise
