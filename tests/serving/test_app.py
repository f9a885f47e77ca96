"""The whole application on Ray Serve, over real HTTP, with OpenAI's own client."""

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import ray
import torch
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from transformers import AutoModelForCausalLM

from raymoe.config import ServeConfig
from raymoe.errors import RunFailed
from raymoe.serving import build_app, serving
from raymoe.serving import generation_pb2 as pb
from raymoe.serving.engine import Engine
from raymoe.serving.generation_pb2_grpc import GenerationStub

PROMPTS = ["def double(x):", "return", "caf\u00e9", "x + x", "\u4f60\u597d", "(x", "Gr", "def"]


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def config(model_path) -> ServeConfig:
    return ServeConfig(
        model=model_path,
        expert_memory="50%",
        max_batch_tokens=64,
        kv_tokens=2048,
        max_tokens=200,
        port=0,
        grpc_port=free_port(),
    )


@pytest.fixture(scope="module")
def url(cluster, config):
    with serving(config) as url:
        yield url
    assert not serve.status().proxies


@pytest.fixture
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def greedy_text(model_path, tokenizer):
    """prompt -> the text of transformers' own greedy answer."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)

    def answer(prompt: str, max_tokens: int) -> str:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def status(url: str) -> dict:
    (engine,) = httpx.get(f"{url}/v1/raymoe/status").json()["engines"]
    return engine


def wait_until_idle(url: str, timeout_s: float = 10.0) -> dict:
    deadline_s = time.monotonic() + timeout_s
    while (found := status(url))["requests_running"] or found["kv_pages_held"]:
        assert time.monotonic() < deadline_s, "the engine still works on a request that nobody waits for"
        time.sleep(0.05)
    return found


def test_serve_run_builds_the_application_from_strings(model_path):
    arguments = {"model": str(model_path), "expert_memory": "25%", "engines": "2"}
    app = call_user_app_builder_with_args_if_necessary(build_app, arguments)
    assert app._bound_deployment.name == "Gateway"


def test_a_port_that_is_taken_is_refused(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = pytest.raises(RunFailed, match=rf"cannot listen on 127\.0\.0\.1:{port} \(Address already in use\)")
        with refused, serving(config.model_copy(update={"port": port})):
            pass


def test_what_cannot_start_says_why_and_leaves_nothing(cluster, config):
    broken = config.model_copy(update={"expert_memory": "1KiB"})
    with pytest.raises(RunFailed, match=r"^expert_memory: 1KiB .* smallest budget that works"), serving(broken):
        pass
    assert not serve.status().proxies


def test_one_cluster_serves_once(url, config):
    with pytest.raises(RunFailed, match="runs Serve already"), serving(config.model_copy(update={"grpc_port": None})):
        pass


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_completion_whole_and_streamed(client, greedy_text):
    asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == greedy_text(PROMPTS[0], 12)
    assert whole.usage.completion_tokens <= 12
    *parts, usage = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.usage == whole.usage


def test_a_chat_whole_and_streamed(client):
    asked = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 12,
        "seed": 7,
    }
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_eight_at_once_get_the_same_as_alone(url, greedy_text):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": "tiny", "max_tokens": 20, "temperature": 0}

            async def whole(prompt: str) -> str:
                return (await client.completions.create(**asked, prompt=prompt)).choices[0].text

            async def streamed(prompt: str) -> str:
                stream = await client.completions.create(**asked, prompt=prompt, stream=True)
                return "".join([part.choices[0].text async for part in stream])

            # every second one streams
            jobs = [(streamed if row % 2 else whole)(prompt) for row, prompt in enumerate(PROMPTS)]
            return await asyncio.gather(*jobs)

    assert asyncio.run(ask_all()) == [greedy_text(prompt, 20) for prompt in PROMPTS]


def test_bad_requests_are_openais_errors(client):
    with pytest.raises(openai.BadRequestError, match="gives up to 8 choices") as error:
        client.completions.create(model="tiny", prompt="x", n=9)
    assert error.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: foo"):
        client.completions.create(model="tiny", prompt="x", extra_body={"foo": 1})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    # the model's own limit, which only the engine knows, comes before the stream begins
    with pytest.raises(openai.BadRequestError, match="the model has 256 positions"):
        client.completions.create(model="tiny", prompt="x " * 100, max_tokens=200, stream=True)


def test_a_client_that_leaves_its_stream_frees_the_request(client, url):
    cancelled = status(url)["requests_cancelled"]
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=200, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    assert wait_until_idle(url)["requests_cancelled"] == cancelled + 1


def test_clients_that_do_not_wait_free_their_requests(url):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "temperature": 0}
    cancelled = status(url)["requests_cancelled"]

    async def ask_and_leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            jobs = [asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) for _ in range(4)]
            while (await client.get(f"{url}/v1/raymoe/status")).json()["engines"][0]["requests_running"] != 4:
                assert not any(job.done() for job in jobs)
            for job in jobs:
                job.cancel()

    asyncio.run(ask_and_leave())
    assert wait_until_idle(url)["requests_cancelled"] == cancelled + 4


def test_metrics_are_where_the_pointer_says(url):
    address = httpx.get(f"{url}/metrics").text.splitlines()[-1].removeprefix("# ")
    assert "ray_" in httpx.get(address).text


def test_health_and_status(url, config):
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "engines": 1}
    found = status(url)
    assert found["budget_bytes"] == found["expert_bytes"] * found["slots"] == found["expert_bytes"] * 8
    assert found["resident_experts"] <= found["slots"]
    assert 0 < found["hit_rate"] < 1
    assert found["requests_error"] == 0
    assert found["kernels"].keys() == {"torch"}
    history = httpx.get(f"{url}/v1/raymoe/status", params={"history": True}).json()["engines"][0]["history"]
    assert sum(window["misses"] for window in history) <= found["misses"]


@pytest.fixture
def channel(url, config):
    with grpc.insecure_channel(f"127.0.0.1:{config.grpc_port}") as channel:
        yield channel


def test_grpc_says_what_http_says(channel, client):
    server = GenerationStub(channel)
    assert server.Models(pb.ModelsRequest()).models == ["tiny"]
    asked = {"max_tokens": 8, "seed": 4, "n": 2, "logprobs": 1}
    prompt = pb.CompleteRequest(model="tiny", text=PROMPTS[0], sampling=pb.Sampling(**asked))
    truth = client.completions.create(model="tiny", prompt=PROMPTS[0], **asked)
    whole = server.Complete(prompt)
    assert [one.text for one in whole.choices] == [one.text for one in truth.choices]
    assert [one.text for one in whole.choices[0].logprobs] == truth.choices[0].logprobs.tokens
    said = ["", ""]
    *chunks, last = server.StreamComplete(prompt)
    for chunk in chunks:
        said[chunk.choice.index] += chunk.choice.text
    assert (said, last.usage) == ([one.text for one in whole.choices], whole.usage)
    tokens = pb.CompleteRequest(model="tiny", tokens=pb.Tokens(ids=[5, 6]), sampling=pb.Sampling(max_tokens=1))
    assert server.Complete(tokens).usage.prompt_tokens == 2

    chat = pb.ChatRequest(model="tiny", messages=[pb.Message(role="user", content="hi")], sampling=pb.Sampling(seed=7))
    text = server.Chat(chat).choices[0].text
    assert text == "".join(chunk.choice.text for chunk in server.StreamChat(chat))
    truth = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], seed=7)
    assert text == truth.choices[0].message.content


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (pb.CompleteRequest(model="tiny"), "INVALID_ARGUMENT", "you must provide a prompt parameter"),
        (pb.CompleteRequest(model="other", text="x"), "NOT_FOUND", "does not exist"),
        (
            pb.CompleteRequest(model="tiny", text="x", sampling=pb.Sampling(temperature=float("nan"))),
            "INVALID_ARGUMENT",
            "temperature",
        ),
        (
            pb.CompleteRequest(model="tiny", text="x", sampling=pb.Sampling(max_tokens=200, deadline_s=0.001)),
            "DEADLINE_EXCEEDED",
            "deadline",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_grpc_errors_are_status_codes(channel, request_, code, message, stream):
    server = GenerationStub(channel)
    with pytest.raises(grpc.RpcError) as error:
        list(server.StreamComplete(request_)) if stream else server.Complete(request_)
    assert error.value.code().name == code
    assert message in error.value.details()


def test_a_grpc_client_that_leaves_frees_its_request(channel, url):
    cancelled = status(url)["requests_cancelled"]
    request = pb.CompleteRequest(model="tiny", text="x", sampling=pb.Sampling(max_tokens=200, temperature=0))
    stream = GenerationStub(channel).StreamComplete(request)
    next(stream)
    stream.cancel()
    assert wait_until_idle(url)["requests_cancelled"] == cancelled + 1


def test_the_grpc_example_finds_its_way_by_reflection(url, config, greedy_text):
    client = Path(__file__).parents[2] / "examples" / "grpc" / "client.py"

    def run(*arguments: str) -> str:
        command = [sys.executable, str(client), "--address", f"127.0.0.1:{config.grpc_port}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "raymoe.v1.Generation" in run("--list").splitlines()
    assert run("--max-tokens", "12", PROMPTS[0]).startswith(greedy_text(PROMPTS[0], 12))


def test_an_engine_decodes_with_the_triton_kernels(url, config):
    """In the interpreter; the environment reaches the replica through its runtime env."""
    env = {"RAYMOE_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    handle = serve.run(
        Engine.options(ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": env}}).bind(config),
        name="kernels",
        route_prefix=None,
    )
    events = list(handle.options(stream=True).generate.remote([5, 6, 7], {"max_tokens": 3, "temperature": 0.0}))
    assert events[-1].finish_reason in ("length", "stop")
    assert handle.status.remote().result()["kernels"]["triton"] > 0
    serve.delete("kernels")
