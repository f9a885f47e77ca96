"""A small client of the completions API: streams one answer and takes its times."""

import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Completion:
    """One streamed answer, as a client saw it."""

    prompt: str
    text: str
    num_tokens: int
    ttft_s: float
    """From sending the request to the first piece of text."""
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s


def complete(
    url: str, model: str, prompt: str, max_tokens: int, on_text: Callable[[str], None] | None = None, **sampling: float
) -> Completion:
    """Asks `url` for a completion over HTTP and reads the server-sent events as they come.

    Args:
        on_text: called with each piece of text.
        sampling: temperature, top_p, seed and the like, as the API names them.

    Raises:
        urllib.error.URLError: no answer, or one that is not 200.
        RuntimeError: the server reported an error inside the stream.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True} | sampling
    body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    ttft_s, pieces, num_tokens = 0.0, [], 0
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        for line in answer:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
            text = "".join(choice["text"] for choice in event["choices"])
            if text:
                ttft_s = ttft_s or time.perf_counter() - started
                pieces.append(text)
                if on_text is not None:
                    on_text(text)
    return Completion(prompt, "".join(pieces), num_tokens, ttft_s, time.perf_counter() - started)


def get_json(url: str) -> dict:
    """GETs a JSON document."""
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        return json.load(answer)
