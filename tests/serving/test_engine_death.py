"""Engines that are killed under a whole application: nobody's answer is lost."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import ray
from ray import serve

from raymoe.config import ServeConfig
from raymoe.serving import serving

PATIENCE_S = 90
ASKED = {"model": "tiny", "prompt": "def double(x):", "max_tokens": 200, "seed": 11, "temperature": 1.0}


@pytest.fixture(scope="module")
def url(model_path):
    config = ServeConfig(
        model=model_path,
        # an expert at a time from its file: steps that take a while
        expert_memory="10%",
        expert_readers=0,
        predictors=(),
        max_batch_tokens=64,
        kv_tokens=2048,
        max_tokens=200,
        engines=2,
        max_ongoing_requests=2,
        max_queued_requests=12,
        port=0,
    )
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with serving(config) as url:
        until(lambda: len(engines(url)) == 2)
        yield url
    ray.shutdown()


@pytest.fixture
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def engines(url: str) -> list[dict]:
    return httpx.get(f"{url}/v1/raymoe/status", timeout=30).json()["engines"]


def until(check) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def kill_at_work(url: str) -> int:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (at_work := [one["pid"] for one in engines(url) if one["requests_running"]]):
        assert time.monotonic() < deadline_s
    os.kill(at_work[0], signal.SIGKILL)
    return at_work[0]


def test_a_stream_goes_on_at_another_engine_with_the_same_tokens(client, url):
    truth = client.completions.create(**ASKED)
    assert truth.usage.completion_tokens > 50
    text, usage, victim, last_s, longest_s = "", None, None, time.monotonic(), 0.0
    for part in client.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}):
        longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
        usage = part.usage
        for choice in part.choices:
            text += choice.text
        if victim is None and len(text) > 3:
            victim = kill_at_work(url)
    assert text == truth.choices[0].text
    assert usage == truth.usage
    print(f"longest time without a token: {longest_s:.3f} s")
    # there are as many as before again, and the dead one is not among them
    until(lambda: len(engines(url)) == 2)
    assert victim not in {one["pid"] for one in engines(url)}


def test_whole_answers_begin_again_and_more_than_fit_are_told_when_to_come_back(client, url):
    truth = client.completions.create(**ASKED).choices[0].text

    def ask(_: int) -> str | tuple:
        try:
            return client.completions.create(**ASKED).choices[0].text
        except openai.APIStatusError as error:
            return error.status_code, error.response.headers.get("retry-after"), error.response.text

    with ThreadPoolExecutor(32) as pool:
        asking = [pool.submit(ask, row) for row in range(32)]
        kill_at_work(url)
        answers = [one.result() for one in asking]
    refused = [answer for answer in answers if answer != truth]
    assert all(answer[:2] == (429, "1") and "queue_full" in answer[2] for answer in refused), refused
    # Serve counts those that are on their way to an engine among the twelve that may wait
    assert answers.count(truth) >= 12


def test_a_user_may_want_an_error_instead(client, url):
    until(lambda: len(engines(url)) == 2)
    gateway = serve.get_deployment_handle("Gateway", "raymoe")
    gateway.broadcast("reconfigure", {"on_engine_death": "fail"}).results(timeout_s=30)
    stream = client.completions.create(**ASKED, stream=True)
    next(iter(stream))
    kill_at_work(url)
    with pytest.raises(openai.APIError, match="the engine that was answering has died"):
        list(stream)
    gateway.broadcast("reconfigure", {}).results(timeout_s=30)


def test_answers_that_have_begun_are_ended_when_the_application_is_taken_down(client, url):
    """And what still waits for an engine is told so at once."""
    truth = client.completions.create(**ASKED).choices[0].text
    stream = client.completions.create(**ASKED, stream=True)
    text = next(iter(stream)).choices[0].text

    def ask(_: int) -> str:
        try:
            return client.completions.create(**ASKED).choices[0].text
        except openai.APIStatusError as error:
            return error.response.text

    with ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(ask, row) for row in range(10)]
        # each takes longer, and two engines have two at a time
        time.sleep(0.3)
        gone = pool.submit(serve.delete, "raymoe")
        text += "".join(part.choices[0].text for part in stream)
        answers = [one.result(timeout=PATIENCE_S) for one in asking]
        gone.result(timeout=PATIENCE_S)
    assert text == truth
    assert all("the server is being taken down" in answer for answer in answers if answer != truth), answers
    assert any(answer != truth for answer in answers)
