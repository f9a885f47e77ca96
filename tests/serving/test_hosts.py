"""The application with experts in actors: they come with it, serve, and go with it."""

import logging
import time
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve

from raymoe.config import ExpertHostsConfig, ServeConfig
from raymoe.errors import RunFailed
from raymoe.serving import serving

PATIENCE_S = 150


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(model_path) -> ServeConfig:
    return ServeConfig(
        model=model_path,
        expert_memory="20%",
        max_batch_tokens=64,
        kv_tokens=2048,
        max_tokens=200,
        port=0,
        expert_hosts=ExpertHostsConfig(count=1),
    )


def hosts_of(app_name: str) -> list[int]:
    """Their processes."""
    facts: Any = ray.get(ray.get_actor(f"{app_name}/expert-directory", "raymoe").facts.remote())
    return [host["pid"] for host in facts["hosts"].values() if host["is_settled"]]


def until(check) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_hosts_come_serve_and_go_with_the_application(cluster, config):
    with serving(config) as url:
        until(lambda: hosts_of("raymoe"))
        pids = hosts_of("raymoe")

        def status():
            (engine,) = httpx.get(f"{url}/v1/raymoe/status").json()["engines"]
            return engine, {tier["name"]: tier for tier in engine["tiers"]}

        until(lambda: status()[1]["node"] and status()[0]["tier_facts"]["node"]["mapped_hosts"] == 1)
        before = status()[1]
        asked = {"model": "tiny", "prompt": "def double(x):", "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200
        after = status()[1]
        # one machine is one node: nothing has to be sent
        assert after["node"]["reads"] > before["node"]["reads"]
        assert after["file"]["reads"] == before["file"]["reads"]
    assert not serve.status().proxies
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.mark.slow
def test_hosts_that_cannot_be_say_why(cluster, config):
    small = config.model_copy(update={"expert_hosts": config.expert_hosts.model_copy(update={"memory": "1KiB"})})
    with (
        pytest.raises(RunFailed, match=r"expert_hosts: no host could be started: .*1KiB is 1024 bytes"),
        serving(small),
    ):
        pass
