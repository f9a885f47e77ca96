"""Stop strings and log-probabilities over real HTTP with OpenAI's own client, on a real engine, without Ray."""

import socket
import threading
import time
from typing import Any

import openai
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM

from raymoe.config import ServeConfig
from raymoe.inference import InferenceEngine
from raymoe.inference.text import decoder
from raymoe.serving.answers import Answering
from raymoe.serving.engine import Engine
from raymoe.serving.routes import create_api

PROMPT = "def double"


Deployed: Any = Engine.func_or_class


class LocalEngine(Deployed):
    """The deployment's own class in this process."""

    def __init__(self, engine: InferenceEngine):
        self._engine, self._max_tokens = engine, 200

    async def status(self, history=False):
        return [super().status(history)]


@pytest.fixture(scope="module")
def engine(model_path, tokenizer):
    with InferenceEngine(model_path, max_batch_tokens=64, kv_tokens=2048, decode=decoder(tokenizer)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(model_path, tokenizer, engine):
    config = ServeConfig(model=model_path, max_tokens=200)
    server = uvicorn.Server(
        uvicorn.Config(create_api(Answering(config, tokenizer, LocalEngine(engine))), log_level="error")
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        port = listening.getsockname()[1]
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def greedy_tokens(model_path, tokenizer):
    """Greedy tokens of transformers' own `generate`, without an end token."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def greedy_text(greedy_tokens, tokenizer):
    return decoder(tokenizer)(greedy_tokens)


def complete(client, **arguments):
    return client.completions.create(**({"model": "tiny", "prompt": PROMPT, "temperature": 0} | arguments))


def streamed(client, **arguments):
    parts = list(complete(client, stream=True, **arguments))
    return "".join(part.choices[0].text for part in parts), parts


@pytest.mark.parametrize("at", [1, 5, 9])
def test_text_before_a_stop_string_comes_exactly_once(client, engine, greedy_text, at):
    stop = greedy_text[at : at + 3]
    expected = greedy_text[: greedy_text.index(stop)]
    steps = engine.stats()["steps"]
    whole = complete(client, max_tokens=24, stop=[stop, "never so"])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    # the engine ended it: it computed no more tokens than the answer says
    assert engine.stats()["steps"] - steps == whole.usage.completion_tokens < 24
    text, parts = streamed(client, max_tokens=24, stop=stop)
    assert (text, parts[-1].choices[0].finish_reason) == (expected, "stop")


def test_four_stop_strings_that_do_not_come(client, greedy_text, greedy_tokens):
    whole = complete(client, max_tokens=24, stop=["never", "so", "at", "all!"][:4])
    assert whole.choices[0].text == greedy_text
    assert whole.usage.completion_tokens == len(greedy_tokens)


def test_log_probabilities_of_a_completion(client, tokenizer, greedy_text):
    whole = complete(client, max_tokens=12, logprobs=3)
    told = whole.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    for token, logprob, top, offset in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):
        # greedy: the drawn one is the likeliest
        assert logprob == max(top.values()) < 0
        assert token in top
        if "\N{REPLACEMENT CHARACTER}" not in whole.choices[0].text and len(token) == 1:
            assert whole.choices[0].text[offset] == token
    text, parts = streamed(client, max_tokens=12, logprobs=3)
    assert text == whole.choices[0].text
    parts = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs is not None]
    assert len(parts) > 3
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, name)] == getattr(told, name)


def test_log_probabilities_of_a_chat(client):
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 10,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert 0 < len(content) <= 10
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.logprob <= entry.top_logprobs[0].logprob
    parts = [part.choices[0].logprobs for part in client.chat.completions.create(**asked, stream=True)]
    assert [entry for part in parts if part for entry in part.content] == content


def test_the_bytes_of_an_answers_tokens_are_its_text(client, tokenizer):
    """Also of those that are only part of a character."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 60, "seed": 1}
    choice = client.chat.completions.create(**asked, logprobs=True).choices[0]
    special = set(tokenizer.all_special_tokens)
    spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content if entry.token not in special)
    assert spelled.decode(errors="replace") == choice.message.content


def test_nobody_pays_who_does_not_ask(client):
    assert complete(client, max_tokens=3).choices[0].logprobs is None
    assert all(part.choices[0].logprobs is None for part in complete(client, max_tokens=3, stream=True))


def test_what_a_stop_string_cuts_has_no_log_probability(client, greedy_text):
    stop = greedy_text[5:8]
    choice = complete(client, max_tokens=24, stop=stop, logprobs=0).choices[0]
    assert choice.logprobs.top_logprobs is None
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
    alone = complete(client, max_tokens=24, logprobs=0).choices[0].logprobs
    assert choice.logprobs.tokens == alone.tokens[: len(choice.logprobs.tokens)]
    assert alone.text_offset[len(choice.logprobs.tokens)] >= len(choice.text)


def test_a_stop_string_frees_the_request(client, engine, greedy_text):
    complete(client, max_tokens=24, stop=greedy_text[2:4])
    deadline_s = time.monotonic() + 5
    while engine.stats()["requests_running"]:
        assert time.monotonic() < deadline_s
    assert engine.stats()["requests_cancelled"] == 0
