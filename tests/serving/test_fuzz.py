"""Bodies that nobody would send: each is answered, in the API's own form, and what is wrong never reaches an engine."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from raymoe.config import ServeConfig
from raymoe.inference import SamplingParams
from raymoe.serving.answers import Answering
from raymoe.serving.openai_api import ChatRequest, CompletionRequest
from raymoe.serving.routes import create_api
from tests.serving.test_routes import ScriptedEngine

PATHS = ("/v1/completions", "/v1/chat/completions")
MAX_TOKENS, MAX_PROMPT, MAX_CHOICES = 50, 20, 3

# any text, halves of surrogate pairs too
texts = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(["\ud800", "a\udfff", "\0", ""])
numbers = (
    st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400, -0.0, math.nan, math.inf, 1e308])
)
atoms = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
names = sorted(
    {*CompletionRequest.model_fields, *ChatRequest.model_fields, *ChatRequest.neutral, "best_of", "suffix", "foo"}
)
right = {
    "model": st.just("m"),
    "prompt": texts | st.just([5, 6]) | st.lists(texts, min_size=1, max_size=3),
    "messages": st.lists(st.builds(lambda text: {"role": "user", "content": text}, texts), min_size=1, max_size=2),
    "max_tokens": st.integers(1, 60),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "n": st.integers(1, 4),
    "stop": st.just("x") | st.lists(texts, max_size=5),
    "stream": st.booleans(),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logprobs": st.booleans() | st.integers(0, 20),
}


@st.composite
def bodies(draw) -> dict:
    """A good request with some arguments left out and others of any kind."""
    body = {
        name: draw(right[name])
        for name in draw(st.sets(st.sampled_from(sorted(right.keys() - {"prompt", "messages"})))) | {"model"}
    }
    wanted = draw(st.sampled_from(["prompt", "messages"]))
    body[wanted] = draw(right[wanted])
    return body | draw(st.dictionaries(st.sampled_from(names) | texts, values, max_size=2))


@pytest.fixture(scope="module")
def engine(tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture(scope="module")
def client(tokenizer, engine, tmp_path_factory) -> TestClient:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text("{}")
    limits = {"max_tokens": MAX_TOKENS, "max_prompt_tokens": MAX_PROMPT, "max_choices": MAX_CHOICES}
    api = create_api(Answering(ServeConfig(model=path, name="m", **limits), tokenizer, engine))
    return TestClient(api, raise_server_exceptions=False, base_url="http://127.0.0.1")


def check(client, engine, path: str, content: bytes) -> None:
    engine.asked.clear()
    response = client.post(path, content=content)
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        assert engine.asked == []
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        return
    assert 1 <= len(engine.asked) <= MAX_CHOICES
    assert engine.num_open == 0
    for prompt_ids, params in engine.asked:
        assert 1 <= len(prompt_ids) <= MAX_PROMPT
        assert all(type(token) is int and token >= 0 for token in prompt_ids)
        # what an engine would refuse as a bug of ours
        assert 1 <= SamplingParams(**params).max_tokens <= MAX_TOKENS


@given(body=bodies())
@settings(max_examples=300)
def test_arguments_of_any_kind(client, engine, body):
    path = PATHS["messages" in body]
    check(client, engine, path, json.dumps(body).encode())


@given(body=bodies(), data=st.data())
@settings(max_examples=150)
def test_bodies_that_were_damaged_on_the_way(client, engine, body, data):
    content = bytearray(json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    check(client, engine, PATHS["messages" in body], bytes(content))


@given(body=st.dictionaries(st.sampled_from(["expert_memory", "kv_tokens"]) | texts, values, max_size=3))
@settings(max_examples=60)
def test_budgets_of_any_kind(client, body):
    assert client.post("/v1/raymoe/budgets", content=json.dumps(body).encode()).status_code in (200, 400)
