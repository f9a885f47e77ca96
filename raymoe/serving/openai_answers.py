"""OpenAI's wire format: the answers we give. Plain data, no server."""

import time
from dataclasses import dataclass
from typing import Any

from raymoe.serving.logprobs import Likelihood, TokenText


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

    def __init__(self, request_id: str, model: str):
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}

    def opening(self) -> dict[str, Any] | None:
        """The chunk before the first text, if the endpoint has one."""
        return None

    def whole(
        self, text: str, finish_reason: str | None, usage: Usage, likelihoods: list[Likelihood] | None = None
    ) -> dict[str, Any]:
        """`likelihoods`: of the answer's tokens; None: nobody asked."""
        choice = {
            "index": 0,
            **self._text(text),
            "logprobs": None if likelihoods is None else self._logprobs(likelihoods),
            "finish_reason": finish_reason,
        }
        return {**self._head, "object": self.whole_object, "choices": [choice], "usage": usage.as_json()}

    def chunk(
        self, text: str, finish_reason: str | None, likelihoods: list[Likelihood] | None = None
    ) -> dict[str, Any]:
        return self._chunk(self._delta(text), finish_reason, likelihoods)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, for those who asked with stream_options.include_usage."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage.as_json()}

    def _chunk(
        self, content: dict[str, Any], finish_reason: str | None, likelihoods: list[Likelihood] | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(likelihoods) if likelihoods else None
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

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

    def opening(self) -> dict[str, Any]:
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

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
