"""OpenAI's wire format: the requests we take and the errors we give. Plain data, no server.

Strict at the door: an unknown argument, a wrong type, or one that we do not support yet is an error, never ignored.
"""

import json
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from raymoe.inference.requests import MAX_LOGPROBS, MAX_PRIORITY

_MAX_STOPS = 4

QUEUE_FULL = 429

_RETRY_QUEUE_S = 1
_RETRY_ENGINE_S = 5


class ApiError(Exception):
    """What a client gets as {"error": {message, type, param, code}}."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unavailable(message: str) -> ApiError:
    """503: the same request may succeed later."""
    headers = {"Retry-After": str(_RETRY_ENGINE_S)}
    return ApiError(message, status=503, kind="service_unavailable_error", code="unavailable", headers=headers)


def overloaded() -> ApiError:
    """429: there is no place in the queue right now."""
    return ApiError(
        "too many requests are waiting for an engine; try again later",
        status=QUEUE_FULL,
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(_RETRY_QUEUE_S)},
    )


def too_late(deadline_s: float) -> ApiError:
    """504: the request's time is over."""
    message = f"the request took longer than its deadline of {deadline_s:g} s"
    return ApiError(message, status=504, param="deadline_s", code="deadline_exceeded", kind="timeout_error")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        # "\ud800" alone is valid JSON, and no text; pydantic refuses it where it validates itself
        raise ValueError("half of a surrogate pair is no character") from None
    return value


def _prompts(value: Any) -> tuple[str | list[int], ...]:
    prompts = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    for prompt in prompts:
        is_text = isinstance(prompt, str) and prompt != ""
        if not is_text and not (isinstance(prompt, list) and prompt and all(map(_is_token, prompt))):
            raise ValueError("give a text that is not empty or its token ids, or a list of these")
    return tuple(_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)


Prompts = str | list[int] | list[str] | list[list[int]]


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _stops(value: Any) -> tuple[str, ...]:
    stops = value if isinstance(value, list) else [value]
    if len(stops) > _MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"give one text or a list of up to {_MAX_STOPS}, none of them empty")
    return tuple(map(_text, stops))


def _content(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, or a list of parts {'type': 'text', 'text': ...}")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"raymoe takes parts {{'type': 'text', 'text': ...}} only, got {kind!r}")
    return _text("".join(part["text"] for part in value))


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted for the clients that send it; nothing is padded."""


class _Request(_Part):
    """What both endpoints share."""

    # arguments of OpenAI's API that we do not support yet, and the values of them that ask for nothing
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Not OpenAI's: 0 or left out draws among all tokens."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Not OpenAI's: higher goes first, 0 if left out."""
    routes: bool | None = None
    """Not OpenAI's: tell with each choice which experts its tokens came through."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Not OpenAI's: seconds after which the answer is of no use; the server's own deadline holds as well."""
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    """Choices for each prompt; choice i is drawn with `seed` + i."""
    user: str | None = None
    """Accepted and not used, as are the next two."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: dict[str, Any]) -> dict[str, Any]:
        # null is how clients spell "left out"
        kept = {name: value for name, value in values.items() if value is not None}
        for name, neutral in cls.neutral.items():
            if name in kept and kept.pop(name) not in neutral:
                raise ApiError(f"'{name}' is not supported by raymoe yet; leave it out", param=name, code="unsupported")
        return kept

    @model_validator(mode="after")
    def _streams(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ApiError("'stream_options' is only allowed when 'stream' is true", param="stream_options")
        return self

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Of how many of the likeliest tokens to tell the log-probability, beside the drawn one's; None: of none."""

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> dict[str, Any]:
        """Keyword arguments of `raymoe.inference.SamplingParams`."""
        asked = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "priority": self.priority,
            "stop": self.stop or None,
            "logprobs": self.num_logprobs,
            "routes": self.routes or None,
        }
        return {"max_tokens": max_tokens, **{name: value for name, value in asked.items() if value is not None}}


class CompletionRequest(_Request):
    """POST /v1/completions. A prompt is a string or its token ids; a list of prompts has n choices for each, in their order."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _Request.neutral | {
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: Annotated[tuple[str | list[int], ...], PlainValidator(_prompts, json_schema_input_type=Prompts)]
    echo: bool = False
    """Each choice begins with its prompt."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """How many of the likeliest tokens to tell at each place, beside the one that was drawn."""

    @model_validator(mode="after")
    def _echo_is_text(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ApiError(
                "'echo' together with 'logprobs' is not supported by raymoe yet: it tells none of a prompt's tokens",
                param="echo",
                code="unsupported",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_content)]
    """Parts of a list are joined: chat templates know a message's content as one text."""
    name: str | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _Request.neutral | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError("'top_logprobs' is only allowed when 'logprobs' is true", param="top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                "'max_tokens' and 'max_completion_tokens' differ; give 'max_completion_tokens' only", param="max_tokens"
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class Budgets(_Part):
    """POST /v1/raymoe/budgets: ours. What is left out stays as it is."""

    expert_memory: str | Annotated[int, Field(ge=1)] | None = None
    """As in the configuration: "25%", "512MiB", or bytes."""
    kv_tokens: Annotated[int, Field(ge=1)] | None = None


RequestT = TypeVar("RequestT", bound=_Part)


def parse_request(cls: type[RequestT], body: bytes) -> RequestT:
    """Reads a request body.

    Raises:
        ApiError: 400, with the argument's name in `param`.
    """
    try:
        values = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError("the request body must be a JSON object")
    return check_request(cls, values)


def check_request(cls: type[RequestT], values: dict[str, Any]) -> RequestT:
    """Checks a request's arguments. Raises: ApiError: 400, with the argument's name in `param`."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise _describe(error) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _describe(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in OpenAI's words where it has some."""
    items = error.errors()
    for item in items:
        if item["type"] == "extra_forbidden":
            return ApiError(f"Unrecognized request argument supplied: {_path(item['loc'])}")
    item = items[0]
    name = _path(item["loc"][:1])
    if item["type"] == "missing" and len(item["loc"]) == 1:
        return ApiError(f"you must provide a {name} parameter", param=name, code="missing_required_parameter")
    path, message = _path(item["loc"]), item["msg"].removeprefix("Value error, ")
    return ApiError(f"Invalid value for '{path}': {message}", param=path, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
