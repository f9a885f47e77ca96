"""The gateway over a scripted engine: HTTP, tokens and text, without Ray and without a model."""

import asyncio
import json
import re

import pytest
from starlette.testclient import TestClient

from raymoe.config import ServeConfig
from raymoe.inference.requests import TokenRoute
from raymoe.serving.answers import Answering
from raymoe.serving.events import Event
from raymoe.serving.openai_api import ApiError, overloaded, unavailable
from raymoe.serving.routes import create_api

RARE = "\u9b31"


class ScriptedEngine:
    """Answers every request with the same text, in tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.asked: list[tuple[list[int], dict]] = []
        self.is_closed = False
        self.num_open = 0
        self.is_alive = True
        self.say("hello")

    def say(self, text, reason="length", step=1):
        tokens = self.tokenizer(text)["input_ids"]
        if reason == "stop":
            tokens.append(self.tokenizer.eos_token_id)
        parts = [tokens[at : at + step] for at in range(0, len(tokens), step)]
        self.events = [Event([]), *(Event(part) for part in parts[:-1]), Event(parts[-1], reason)]
        self.num_tokens = len(tokens)

    async def generate(self, prompt_ids, params, in_steps, up_to):
        self.in_steps, self.up_to = in_steps, up_to
        self.asked.append((prompt_ids, params))
        self.num_open += 1
        try:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                if asyncio.iscoroutine(event):
                    await event
                    continue
                await asyncio.sleep(0)
                yield event
        finally:
            self.is_closed = True
            self.num_open -= 1

    async def set_budgets(self, budgets):
        if budgets.get("kv_tokens") == 1:
            raise ApiError("kv_tokens: 1 is too few")
        self.budgets = budgets

    def metrics_endpoints(self):
        return ["http://10.0.0.1:8080/metrics"]

    async def status(self, history=False):
        return [{"is_alive": self.is_alive} | ({"history": []} if history else {})]


@pytest.fixture
def engine(tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def client(tokenizer, engine, tmp_path) -> TestClient:
    (tmp_path / "config.json").write_text("{}")
    config = ServeConfig(
        model=tmp_path, name="m", max_tokens=50, max_prompt_tokens=20, max_choices=3, max_body_bytes=4096
    )
    return TestClient(
        create_api(Answering(config, tokenizer, engine)), raise_server_exceptions=False, base_url="http://127.0.0.1"
    )


def complete(client, **arguments):
    return client.post("/v1/completions", json={"model": "m", "prompt": "ab"} | arguments)


def chat(client, **arguments):
    return client.post(
        "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "hi"}]} | arguments
    )


def chunks(response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response) -> dict:
    return response.json()["error"]


def test_a_completion(client, engine, tokenizer):
    body = complete(client, seed=5, temperature=0).json()
    assert body["choices"][0] == {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": engine.num_tokens,
        "total_tokens": 2 + engine.num_tokens,
    }
    assert engine.asked == [(tokenizer("ab")["input_ids"], {"max_tokens": 16, "temperature": 0, "seed": 5})]
    assert engine.is_closed


@pytest.mark.parametrize(("arguments", "in_steps"), [({}, False), ({"stream": True}, True), ({"stop": "x"}, False)])
def test_the_engine_tells_every_token_only_where_it_matters(client, engine, arguments, in_steps):
    complete(client, **arguments)
    assert engine.in_steps is in_steps


def test_token_ids_are_a_prompt(client, engine):
    assert complete(client, prompt=[7, 8, 9]).status_code == 200
    assert engine.asked[0][0] == [7, 8, 9]


def test_a_chat_goes_through_the_template(client, engine, tokenizer):
    body = chat(client).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert tokenizer.decode(engine.asked[0][0]) == "<|user|>\nhi\n<|assistant|>\n"
    # as many tokens as there is room for, up to the server's limit
    assert (engine.asked[0][1]["max_tokens"], engine.up_to) == (50, True)


def test_a_model_without_a_template_has_no_chat(client, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    response = chat(client)
    assert response.status_code == 400
    assert "no chat template" in error_of(response)["message"]


def test_what_the_template_refuses_is_a_bad_request(client):
    response = chat(client, messages=[{"role": "tool", "content": "42"}])
    assert response.status_code == 400
    assert "unknown role tool" in error_of(response)["message"]


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_says_the_same_as_the_whole(client, engine, ask):
    engine.say(f"caf\u00e9 {RARE}! fin")
    found = chunks(ask(client, stream=True, stream_options={"include_usage": True}))
    *parts, last, usage = found
    assert all(part["usage"] is None for part in (*parts, last))
    choices = [part["choices"][0] for part in parts]
    texts = [choice["text"] if ask is complete else choice["delta"]["content"] for choice in choices]
    assert "".join(texts) == f"caf\u00e9 {RARE}! fin"
    assert len(texts) > 3
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
    assert [choice["finish_reason"] for choice in choices] == [None] * len(choices)
    assert last["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], engine.num_tokens)
    assert len({part["id"] for part in found}) == 1
    assert engine.is_closed


def test_a_chat_stream_opens_with_the_role(client):
    assert chunks(chat(client, stream=True))[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(client, engine, ask, stream):
    response = ask(client, n=3, seed=5, stream=stream)
    assert [params["seed"] for _, params in engine.asked] == [5, 6, 7]
    text = (lambda one: one["text"]) if ask is complete else (lambda one: one["message"]["content"])
    if not stream:
        assert [(one["index"], text(one)) for one in response.json()["choices"]] == [(i, "hello") for i in range(3)]
        assert response.json()["usage"]["completion_tokens"] == 3 * engine.num_tokens
        return
    said, reasons = ["", "", ""], [None, None, None]
    for chunk in chunks(response):
        (choice,) = chunk["choices"]
        said[choice["index"]] += choice["text"] if ask is complete else choice["delta"].get("content", "")
        assert reasons[choice["index"]] is None
        reasons[choice["index"]] = choice["finish_reason"]
    assert (said, reasons) == (["hello"] * 3, ["length"] * 3)


def test_a_list_of_prompts_has_choices_for_each(client, engine, tokenizer):
    body = complete(client, prompt=["ab", "cde"], echo=True).json()
    assert [one["text"] for one in body["choices"]] == ["abhello", "cdehello"]
    asked = [prompt_ids for prompt_ids, _ in engine.asked]
    assert asked == [tokenizer("ab")["input_ids"], tokenizer("cde")["input_ids"]]
    assert body["usage"]["prompt_tokens"] == sum(map(len, asked))


def test_an_echo_is_no_answer(client, engine, tokenizer):
    """Stop strings are looked for in what follows it, and it is streamed once."""
    engine.say("one two")
    assert complete(client, prompt="two", echo=True, stop="two").json()["choices"][0]["text"] == "twoone "
    found = chunks(complete(client, prompt=tokenizer("ab")["input_ids"], echo=True, stream=True))
    assert "".join(part["choices"][0]["text"] for part in found) == "abone two"


@pytest.mark.parametrize("stream", [False, True])
def test_one_choice_that_fails_ends_the_others(client, engine, stream):
    engine.events = [Event([]), Event([65]), Event([], "error", error="the engine has ended")]
    response = complete(client, n=2, stream=stream)
    if stream:
        assert chunks(response)[-1]["error"]["message"] == "the engine has ended"
    else:
        assert response.status_code == 503
    assert engine.num_open == 0


def test_usage_is_streamed_only_on_request(client):
    assert all("usage" not in chunk for chunk in chunks(complete(client, stream=True)))


def test_the_end_token_is_not_text(client, engine):
    engine.say("hello", reason="stop")
    body = complete(client).json()
    assert body["choices"][0]["text"] == "hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == engine.num_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_request(client, engine, stream):
    engine.say("one two three four")
    response = complete(client, stop=["thr", "zzz"], stream=stream)
    if stream:
        found = chunks(response)
        assert "".join(part["choices"][0]["text"] for part in found) == "one two "
        assert found[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("one two ", "stop")
    assert engine.is_closed


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_completes_a_stop_string_is_cut_within(client, engine, tokenizer, stream):
    """The engine ends with the token; what that token says before the stop string is still the answer's."""
    tokens = tokenizer("caf\u00e9 x")["input_ids"]
    engine.events = [Event([]), *(Event([token]) for token in tokens[:-1])]
    engine.events.append(Event(tokens[-1:], "stop", stop_string="x"))
    assert tokenizer.decode(tokens[-1:]) == " x"
    response = complete(client, stop="x", stream=stream)
    found = chunks(response) if stream else [response.json()]
    assert "".join(part["choices"][0]["text"] for part in found) == "caf\u00e9 "
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_that_only_begins_is_text(client, engine):
    engine.say("one two thr")
    assert complete(client, stop="three").json()["choices"][0]["text"] == "one two thr"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "status", "message"),
    [
        (Event([], refusal="the KV cache holds 8 tokens"), 400, "the KV cache holds 8 tokens"),
        (Event([], error="the engine has ended"), 503, "the engine has ended"),
        (unavailable("no engine could answer"), 503, "no engine could answer"),
        (overloaded(), 429, "too many requests are waiting"),
    ],
)
def test_what_the_engine_turns_down_has_a_status(client, engine, first, status, message, stream):
    engine.events = [first]
    response = complete(client, stream=stream)
    assert response.status_code == status
    assert message in error_of(response)["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_an_engine_that_fails_on_the_way(client, engine):
    engine.events = [Event([]), Event([65]), Event([], "error", error="the engine has ended")]
    assert complete(client).status_code == 503
    last = chunks(complete(client, stream=True))[-1]
    assert last["error"]["message"] == "the engine has ended"


def test_a_bug_is_a_500_in_the_same_form(client, engine):
    engine.events = [RuntimeError("secret detail")]
    response = complete(client)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["type"] == "server_error"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ({"model": "other"}, 404, "this server has 'm'"),
        ({"max_tokens": 51}, 400, "gives up to 50"),
        ({"prompt": [5] * 21}, 400, "takes up to 20"),
        ({"n": 4}, 400, "gives up to 3 choices"),
        ({"n": 2, "prompt": ["a", "b"]}, 400, "gives up to 3 choices"),
        ({"foo": 1}, 400, "Unrecognized request argument supplied: foo"),
    ],
)
def test_bad_requests_never_reach_the_engine(client, engine, arguments, status, message):
    response = complete(client, **arguments)
    assert response.status_code == status
    assert message in error_of(response)["message"]
    assert engine.asked == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [0, 2])
def test_a_deadline_ends_the_request(client, engine, at, stream):
    engine.events.insert(at, asyncio.sleep(30))
    response = complete(client, deadline_s=0.05, stream=stream)
    error = chunks(response)[-1]["error"] if stream and at else error_of(response)
    assert (error["code"], error["param"]) == ("deadline_exceeded", "deadline_s")
    assert response.status_code == (200 if stream and at else 504)
    assert engine.num_open == 0


def test_bodies_are_bounded(client):
    response = client.post("/v1/completions", content=b" " * 4097)
    assert response.status_code == 413
    assert "larger than" in error_of(response)["message"]


def test_models(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["m"]
    assert client.get("/v1/models/m").json()["id"] == "m"
    assert error_of(client.get("/v1/models/x"))["code"] == "model_not_found"


def test_health_follows_the_engine(client, engine):
    assert client.get("/health").json() == {"status": "ok", "engines": 1}
    engine.is_alive = False
    assert client.get("/health").status_code == 503


def test_budgets_go_to_the_engines(client, engine):
    answer = client.post("/v1/raymoe/budgets", json={"expert_memory": "25%", "kv_tokens": 512})
    assert answer.json()["engines"] == [{"is_alive": True}]
    assert engine.budgets == {"expert_memory": "25%", "kv_tokens": 512}
    for body, message in (({"kv_tokens": 1}, "too few"), ({"kv": 1}, "kv"), ({"expert_memory": -5}, "expert_memory")):
        refused = client.post("/v1/raymoe/budgets", json=body)
        assert refused.status_code == 400
        assert message in error_of(refused)["message"]


def test_the_page_is_all_there_and_asks_nobody_else(client):
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in re.findall(r'(?:src|href)="(/[^"]*)"', page.text):
        assert client.get(name).status_code == 200, name
    for path in ("/", "/page.css", "/page.js"):
        assert not re.search(r"https?://|//[a-z]+\.", client.get(path).text.replace("http://www.w3.org/2000/svg", ""))


@pytest.mark.parametrize("stream", [False, True])
def test_routes_of_tokens_are_told_on_request(client, engine, tokenizer, stream):
    tokens = tokenizer(RARE)["input_ids"]
    assert len(tokens) > 1
    routes = [TokenRoute(token, [[(at, "hit"), (5, "fetched")]]) for at, token in enumerate(tokens)]
    engine.events = [Event([])] + [
        Event([token], "length" if route is routes[-1] else None, routes=[route])
        for token, route in zip(tokens, routes, strict=True)
    ]
    response = complete(client, routes=True, stream=stream)
    assert engine.asked[0][1]["routes"] is True
    parts = chunks(response) if stream else [response.json()]
    told = [route for part in parts for route in part["choices"][0].get("routes", ())]
    assert [route["token"] for route in told] == tokens
    assert told[0]["layers"] == [[[0, "hit"], [5, "fetched"]]]
    assert "".join(part["choices"][0]["text"] for part in parts) == RARE


def test_metrics_point_to_where_they_are(client):
    *comments, last = client.get("/metrics").text.splitlines()
    assert last == "# http://10.0.0.1:8080/metrics"
    assert all(line.startswith("# ") for line in comments)


def test_status_shows_every_engine(client):
    assert client.get("/v1/raymoe/status").json() == {"model": "m", "engines": [{"is_alive": True}]}
    assert client.get("/v1/raymoe/status?history=true").json()["engines"][0]["history"] == []


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
def test_wrong_addresses_answer_in_the_same_form(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert path in error_of(response)["message"]


def test_the_description_of_the_api_names_our_arguments(client):
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "prompt", "top_k", "stop", "stream_options"} <= set(schema["properties"])
