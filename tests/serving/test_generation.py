"""Stop strings and log-probabilities over real HTTP with OpenAI's own client, on a real engine, without Ray."""

import asyncio
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
        self._engine = engine

    async def status(self, history=False):
        return [super().status(history)]

    def metrics_endpoints(self):
        return []


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


def test_choices_are_drawn_apart_and_again(client):
    """Choice i is what `seed` + i alone gives, streamed or not."""
    asked = {"prompt": [PROMPT, "return"], "max_tokens": 8, "temperature": 1.0}
    alone = [
        complete(client, **asked | {"prompt": one}, seed=3 + i).choices[0].text
        for one in asked["prompt"]
        for i in (0, 1)
    ]
    assert alone[0] != alone[1]
    whole = complete(client, **asked, n=2, seed=3)
    assert [choice.text for choice in whole.choices] == alone
    said = [""] * 4
    *parts, last = complete(client, **asked, n=2, seed=3, stream=True, stream_options={"include_usage": True})
    for part in parts:
        said[part.choices[0].index] += part.choices[0].text
    assert said == alone
    assert last.usage == whole.usage


def test_the_asynchronous_client(client, greedy_text):
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=60) as session:
            asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
            whole = await session.completions.create(**asked, echo=True)
            stream = await session.completions.create(**asked, stream=True)
            return whole.choices[0].text, "".join([part.choices[0].text async for part in stream])

    assert asyncio.run(ask()) == (PROMPT + greedy_text, greedy_text)


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
