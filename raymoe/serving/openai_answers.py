"""OpenAI's wire format: the answers we give. Plain data, no server."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raymoe.inference.requests import TokenRoute
from raymoe.serving.logprobs import Likelihood, TokenText


class Piece(NamedTuple):
    """What one choice says next, or all that it said."""

    text: str
    finish_reason: str | None
    """Set on the last piece: stop or length."""
    likelihoods: list[Likelihood]
    """Of the tokens that begin in the text, if asked for."""
    routes: tuple[tuple[str, TokenRoute], ...] = ()
    """(text, route) of the tokens computed for it, if asked for; a token's text may wait for the next ones."""


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    stood_in_rows: int | None = None
    """Under on_miss: compressed: rows in which vectors stood in for a missing expert; ours, not OpenAI's."""

    def as_json(self) -> dict[str, int]:
        marked = {} if self.stood_in_rows is None else {"stood_in_rows": self.stood_in_rows}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            **marked,
        }


class CompletionAnswer:
    """Builds the bodies of one answer of /v1/completions."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, request_id: str, model: str, *, tells_logprobs: bool = False, tells_usage: bool = False):
        """`tells_usage`: a stream ends with `usage_chunk`; the chunks before it then say that it is not there yet."""
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._tells_logprobs = tells_logprobs
        self._no_usage: dict[str, Any] = {"usage": None} if tells_usage else {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before the first text of a choice, if the endpoint has one."""
        return None

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        told = [
            {
                "index": index,
                **self._text(piece.text),
                "logprobs": self._logprobs(piece.likelihoods) if self._tells_logprobs else None,
                "finish_reason": piece.finish_reason,
                **_routes(piece),
            }
            for index, piece in enumerate(choices)
        ]
        return {**self._head, "object": self.whole_object, "choices": told, "usage": usage.as_json()}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._chunk(index, self._delta(piece.text), piece)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, for those who asked with stream_options.include_usage."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage.as_json()}

    def _chunk(self, index: int, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.likelihoods) if piece.likelihoods else None
        choice = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            **_routes(piece),
        }
        return {**self._head, "object": self.chunk_object, "choices": [choice], **self._no_usage}

    def _logprobs(self, likelihoods: list[Likelihood]) -> dict[str, Any]:
        return {
            "tokens": [one.token.text for one in likelihoods],
            "token_logprobs": [_finite(one.logprob) for one in likelihoods],
            "top_logprobs": [_by_text(one) for one in likelihoods] if any(one.top for one in likelihoods) else None,
            "text_offset": [one.offset for one in likelihoods],
        }

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatAnswer(CompletionAnswer):
    """Builds the bodies of one answer of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, Piece("", None, []))

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, likelihoods: list[Likelihood]) -> dict[str, Any]:
        content = [
            _entry(one.token, one.logprob) | {"top_logprobs": [_entry(token, logprob) for token, logprob in one.top]}
            for one in likelihoods
        ]
        return {"content": content, "refusal": None}


def _routes(piece: Piece) -> dict[str, Any]:
    """Ours, not OpenAI's: `routes`, of each token its text and, layer by layer, [expert, hit | fetched | stood_in]."""
    told = [{"token": route.token, "text": text, "layers": route.layers} for text, route in piece.routes]
    return {"routes": told} if told else {}


def _entry(token: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(logprob), "bytes": token.bytes}


def _by_text(one: Likelihood) -> dict[str, float]:
    """The likeliest tokens and the drawn one; of two with the same text the likelier."""
    found: dict[str, float] = {}
    for token, logprob in [*one.top, (one.token, one.logprob)]:
        found.setdefault(token.text, _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    # JSON has no infinity; this is what OpenAI's API says for tokens that cannot come
    return max(logprob, -9999.0)
