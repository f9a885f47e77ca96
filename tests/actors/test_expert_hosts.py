"""Experts in actors: several nodes' hosts serve a model together, die, come and are replaced, and nobody's tokens change."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from raymoe.actors.expert_directory import start_directory
from raymoe.actors.host_client import HostClient
from raymoe.config import ExpertHostsConfig
from raymoe.inference import InferenceEngine, SamplingParams
from tests.inference.conftest import generate_alone, random_prompts
from tests.tiny_models import tiny_model

PATIENCE_S = 60
LAYERS, EXPERTS = 2, 16
PROMPTS = random_prompts([5, 9, 3], seed=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a tiny model whose experts are twice as many as usual, the directory it is saved in)"""
    model, path = tiny_model("olmoe", num_experts=EXPERTS, num_experts_per_tok=4), tmp_path_factory.mktemp("olmoe")
    model.save_pretrained(path)
    return model, path


@pytest.fixture(scope="module")
def wanted(saved):
    """The tokens of transformers' own `generate`."""
    torch.set_num_threads(1)
    return [generate_alone(saved[0], prompt, 24) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def cluster():
    # hosts cannot be placed on the head, so each has a node of its own
    this = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(3):
        this.add_node(num_cpus=1)
    ray.init(address=this.address, namespace="raymoe", log_to_driver=False)
    this.wait_for_nodes()
    yield this
    ray.shutdown()
    this.shutdown()


@pytest.fixture
def hosts(cluster, saved):
    """Starts a directory with its hosts; gone at the end of the test."""
    started = []

    def start(name: str, **config):
        started.append(start_directory(name, saved[1], ExpertHostsConfig(**config), "float32"))
        assert ray.get(started[-1].wait.remote(PATIENCE_S)) is None
        return started[-1]

    yield start
    for directory in started:
        ray.kill(directory)


@pytest.fixture
def make_engine(saved):
    """Engines that are closed at the end of the test."""
    engines = []

    def make(client, **options):
        settings = {"expert_memory": "15%", "max_batch_tokens": 64, "kv_tokens": 1024, "predictors": ()}
        engines.append(InferenceEngine(saved[1], remote=client, device="cpu", **(settings | options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def until(check, what: str):
    """What `check` returns as soon as it is true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := check()):
        assert time.monotonic() < deadline_s, f"after {PATIENCE_S} s still not: {what}"
        time.sleep(0.1)
    return found


def settled(directory, count: int):
    """The hosts' facts once there are so many and each holds all it is to."""

    def check():
        found = ray.get(directory.facts.remote())["hosts"]
        return found if len(found) == count and all(h["is_settled"] and h["wanted"] for h in found.values()) else None

    return until(check, f"{count} hosts hold their experts")


def knows_all(client):
    """The engine's directory has every expert."""
    return lambda: all(client.holder(layer, expert) is not None for layer in range(LAYERS) for expert in range(EXPERTS))


def tokens_of(engine):
    return engine.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=()))


def tiers_of(engine):
    return {tier["name"]: tier for tier in engine.stats()["tiers"]}


def test_three_nodes_serve_a_model_that_fits_none_of_them(hosts, make_engine, wanted):
    directory = hosts("three", count=3, memory="40%")
    found = settled(directory, 3)
    assert len({host["node"] for host in found.values()}) == 3
    assert all(host["held"] <= 0.4 * LAYERS * EXPERTS for host in found.values())
    client = HostClient("three")
    until(knows_all(client), "all experts are known")
    engine = make_engine(client)
    assert tokens_of(engine) == wanted
    tiers = tiers_of(engine)
    assert tiers["file"]["reads"] == 0
    assert tiers["hosts"]["reads"] > 50
    assert tiers["hosts"]["failures"] == 0
    assert engine.stats()["tier_facts"]["hosts"]["given"] == tiers["hosts"]["reads"]
