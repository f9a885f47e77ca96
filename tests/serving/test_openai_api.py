import json

import pytest

from raymoe.serving.openai_answers import ChatAnswer, CompletionAnswer, Piece, Usage
from raymoe.serving.openai_api import ApiError, ChatRequest, CompletionRequest, parse_request

HI = [{"role": "user", "content": "hi"}]


def completion(**arguments) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": "x"} | arguments).encode())


def chat(**arguments) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps({"model": "m", "messages": HI} | arguments).encode())


@pytest.mark.parametrize(
    ("prompt", "taken"),
    [
        ("x", ("x",)),
        (["x"], ("x",)),
        ([1, 2], ([1, 2],)),
        ([[1, 2]], ([1, 2],)),
        ([7], ([7],)),
        (["x", "y"], ("x", "y")),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_forms_of_a_prompt(prompt, taken):
    assert completion(prompt=prompt).prompt == taken


def test_parts_of_a_message_are_joined():
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert chat(messages=[message]).messages[0].content == "ab"


@pytest.mark.parametrize(("stop", "taken"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
def test_forms_of_stop(stop, taken):
    assert completion(stop=stop).stop == taken


def test_what_is_left_out_is_left_to_the_engine():
    assert completion().sampling(16) == {"max_tokens": 16}
    assert completion(temperature=0, seed=3, top_k=4, top_p=0.5).sampling(16) == {
        "max_tokens": 16,
        "temperature": 0,
        "seed": 3,
        "top_k": 4,
        "top_p": 0.5,
    }


def test_stop_strings_and_log_probabilities_go_to_the_engine():
    assert completion(stop=["a", "b"], logprobs=0).sampling(9) == {"max_tokens": 9, "stop": ("a", "b"), "logprobs": 0}
    assert chat(logprobs=True).sampling(9) == {"max_tokens": 9, "logprobs": 0}
    assert chat(logprobs=True, top_logprobs=5).sampling(9) == {"max_tokens": 9, "logprobs": 5}
    assert chat(logprobs=False, top_logprobs=0).sampling(9) == {"max_tokens": 9}


def test_arguments_that_ask_for_nothing_are_taken():
    plain = completion(
        best_of=1,
        echo=False,
        logprobs=None,
        metadata={},
        service_tier="auto",
        store=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        user="u",
    )
    assert plain.sampling(9) == completion().sampling(9) == {"max_tokens": 9}
    talk = chat(
        n=1, tools=[], logprobs=False, response_format={"type": "text"}, tool_choice="none", parallel_tool_calls=True
    )
    assert talk.sampling(9) == chat().sampling(9) == {"max_tokens": 9}


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"deadline_s": 0}, "deadline_s", "greater than 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"seed": 1 << 64}, "seed", "less than"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when 'stream' is true"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "\ud800"}, "prompt", "no character"),
        ({"stop": "\udfff"}, "stop", "no character"),
        ({"prompt": [1 << 40]}, "prompt", "token ids"),
        ({"prompt": ""}, "prompt", "not empty"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": [1, -2]}, "prompt", "token ids"),
        ({"prompt": [True]}, "prompt", "token ids"),
        ({"prompt": ["a", ""]}, "prompt", "a list of these"),
        ({"prompt": ["a", [1]] * 2 + [5]}, "prompt", "a list of these"),
        ({"model": 3}, "model", "valid string"),
        ({"echo": True, "logprobs": 0}, "echo", "not supported by raymoe yet"),
        ({"metadata": {"a": "b"}}, "metadata", "not supported by raymoe yet"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"suffix": "x"}, "suffix", "not supported by raymoe yet"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported by raymoe yet"),
    ],
)
def test_bad_completion_arguments_are_named(arguments, param, message):
    with pytest.raises(ApiError, match=message) as error:
        completion(**arguments)
    assert error.value.status == 400
    body = error.value.body["error"]
    assert (body["param"], body["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1].content", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'image_url'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "give a text"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "only allowed when 'logprobs' is true"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported by raymoe yet"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported by raymoe yet"),
    ],
)
def test_bad_chat_arguments_are_named(arguments, param, message):
    with pytest.raises(ApiError, match=message) as error:
        chat(**arguments)
    assert error.value.body["error"]["param"] == param


def test_unknown_arguments_are_refused_in_openais_words():
    with pytest.raises(ApiError, match=r"^Unrecognized request argument supplied: foo$"):
        completion(foo=1)
    with pytest.raises(ApiError, match=r"^Unrecognized request argument supplied: messages\[0\]\.mood$"):
        chat(messages=[{"role": "user", "content": "x", "mood": "good"}])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ('{"prompt": "x"}'.encode("utf-16"), "not valid JSON"),
        (b'{"model": "m", "prompt": [' + b"9" * 5000 + b"]}", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"model": "m", "prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x"}', "you must provide a model parameter"),
        (b'{"model": "m"}', "you must provide a prompt parameter"),
    ],
)
def test_bad_bodies(body, message):
    with pytest.raises(ApiError, match=message):
        parse_request(CompletionRequest, body)


def test_an_error_can_always_be_sent():
    with pytest.raises(ApiError) as error:
        completion(**{"\ud800": 1})
    assert json.dumps(error.value.body, ensure_ascii=False).encode()


def test_shapes_of_the_answers():
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    whole = CompletionAnswer("1", "m").whole([Piece("hi", "stop", [])], usage)
    assert whole["object"] == "text_completion"
    assert whole["choices"] == [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    answer = ChatAnswer("1", "m")
    assert answer.whole([Piece("hi", "length", [])], usage)["choices"][0]["message"]["content"] == "hi"
    assert answer.opening(0)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert answer.chunk(2, Piece("a", None, []))["choices"][0] == {
        "index": 2,
        "delta": {"content": "a"},
        "logprobs": None,
        "finish_reason": None,
    }
    assert answer.chunk(0, Piece("", "stop", []))["choices"][0]["delta"] == {}
    assert answer.usage_chunk(usage)["choices"] == []
    assert "usage" not in answer.opening(0)
    assert ChatAnswer("1", "m", tells_usage=True).opening(0)["usage"] is None
