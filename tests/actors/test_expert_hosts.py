"""Experts in actors: several nodes' hosts serve a model together, die, come and are replaced, and nobody's tokens change."""

import os
import signal
import threading
import time
from typing import Any

import psutil
import pytest
import ray
import torch
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from raymoe.actors.expert_directory import start_directory
from raymoe.actors.host_client import HostClient
from raymoe.config import ExpertHostsConfig
from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.tiers import CheckpointTier
from tests.inference.conftest import generate_alone, random_prompts
from tests.tiny_models import tiny_model

PATIENCE_S = 150
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


@pytest.fixture(scope="module")
def fleet(cluster, saved):
    """The directory of three hosts, of which none has room for more than half of the model."""
    directory = start_directory("hosts", saved[1], ExpertHostsConfig(count=3, memory="50%"), "float32")
    assert ray.get(directory.wait.remote(PATIENCE_S)) is None
    yield directory
    ray.kill(directory)


@pytest.fixture
def client(fleet):
    """An engine's, when all hosts have what they are to have and it knows."""
    settled(fleet, 3)
    this = HostClient("hosts", timeout_s=1.0)
    until(knows_all(this), "all experts are known")
    yield this
    this.close()


@pytest.fixture
def make_engine(saved, monkeypatch, tiers_in_order):
    """Engines that are closed at the end of the test, with slow files, for a tiny expert is read faster than a call is answered."""
    engines = []
    read = CheckpointTier.read

    def read_slowly(self, layer, expert, out):
        time.sleep(0.05)
        return read(self, layer, expert, out)

    monkeypatch.setattr(CheckpointTier, "read", read_slowly)

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


def facts_of(directory) -> dict[str, Any]:
    found: Any = ray.get(directory.facts.remote())
    return found


def settled(directory, count: int):
    """The hosts' facts once there are so many and each holds all it is to."""

    def check():
        facts = facts_of(directory)
        return facts["hosts"] if facts["is_settled"] and len(facts["hosts"]) == count else None

    return until(check, f"{count} hosts hold their experts")


def knows_all(client):
    """The engine's directory has every expert."""
    return lambda: all(client.holder(layer, expert) is not None for layer in range(LAYERS) for expert in range(EXPERTS))


def tokens_of(engine):
    return engine.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=()))


def tiers_of(engine):
    return {tier["name"]: tier for tier in engine.stats()["tiers"]}


def test_three_nodes_serve_a_model_that_fits_none_of_them(fleet, client, make_engine, wanted):
    found = settled(fleet, 3)
    assert len({host["node"] for host in found.values()}) == 3
    assert [host["held"] for host in found.values()] == [16, 16, 16]
    engine = make_engine(client)
    assert tokens_of(engine) == wanted
    tiers = tiers_of(engine)
    assert tiers["file"]["reads"] == 0
    assert tiers["hosts"]["reads"] > 50
    assert tiers["hosts"]["failures"] == 0
    facts = engine.stats()["tier_facts"]["hosts"]
    assert facts["given"] >= tiers["hosts"]["reads"]
    assert not any(host["is_here"] for host in facts["hosts"].values())


class Generating:
    """The prompts' tokens again and again on a thread; leaving it compares them all."""

    def __init__(self, engine, wanted):
        self._engine, self._wanted, self._over = engine, wanted, threading.Event()
        self.results, self.errors = [], []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        until(lambda: self.results or self.errors, "tokens come")
        return self

    def _run(self):
        try:
            while not self._over.is_set():
                self.results.append(tokens_of(self._engine))
        except Exception as error:
            self.errors.append(error)

    def more(self, count=2):
        """Waits until so many more answers are complete."""
        goal = len(self.results) + count
        until(lambda: len(self.results) >= goal or self.errors, "tokens come")

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        assert not self.errors
        assert all(result == self._wanted for result in self.results)


def test_rows_are_sent_and_tokens_stay(client, make_engine, wanted):
    until(lambda: all(client.speed(n) for n in client.facts()["hosts"]), "the way to the hosts is measured")
    engine = make_engine(client, on_miss="send")
    # whatever this machine's calls cost: as if experts were large
    engine._sending._expert_bytes = [10**10] * LAYERS
    assert tokens_of(engine) == wanted
    sent = engine.stats()["sent"]
    assert sent["experts"] > 20
    assert sent["failures"] == 0


def test_hosts_leave_and_join_and_few_have_to_do_without(fleet, client, make_engine, wanted):
    version = client.facts()["version"]
    engine = make_engine(client)
    with Generating(engine, wanted) as generating:
        ray.get(fleet.scale.remote(2))
        until(lambda: len(client.facts()["hosts"]) == 2, "the engine knows of it")
        generating.more()
        ray.get(fleet.scale.remote(3))
        settled(fleet, 3)
        until(lambda: len(client.facts()["hosts"]) == 3, "the engine knows of it")
        generating.more()
    assert [host["held"] for host in client.facts()["hosts"].values()] == [16, 16, 16]
    assert client.facts()["version"] > version
    tiers = tiers_of(engine)
    assert tiers["hosts"]["failures"] == 0
    # what a host gave up just before another one had it
    assert tiers["file"]["reads"] < tiers["hosts"]["reads"] / 10
    assert facts_of(fleet)["deaths"] == 0


def test_a_host_that_dies_is_made_up_for_and_replaced(fleet, client, make_engine, wanted):
    before = settled(fleet, 3)
    victim = min(before)
    engine = make_engine(client)
    with Generating(engine, wanted) as generating:
        os.kill(before[victim]["pid"], signal.SIGKILL)
        generating.more()
        until(lambda: victim not in facts_of(fleet)["hosts"], "it is given up")
        settled(fleet, 3)
        until(knows_all(client), "all experts are known again")
        reads = tiers_of(engine)["file"]["reads"]
        generating.more()
        assert tiers_of(engine)["file"]["reads"] == reads
    assert facts_of(fleet)["deaths"] == 1


@pytest.mark.slow
def test_a_node_that_drains_is_left_before_it_goes(cluster, fleet, client, make_engine, wanted):
    before = settled(fleet, 3)
    deaths, leaving = facts_of(fleet)["deaths"], before[min(before)]["node"]
    engine = make_engine(client)
    cluster.add_node(num_cpus=1)
    with Generating(engine, wanted) as generating:
        deadline_ms = int((time.time() + PATIENCE_S) * 1000)
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = GcsClient(address=cluster.address).drain_node(leaving, reason, "test", deadline_ms)
        assert accepted, why
        until(lambda: leaving not in {host["node"] for host in settled(fleet, 3).values()}, "its host is elsewhere")
        until(knows_all(client), "all experts are known again")
        generating.more()
    assert tiers_of(engine)["hosts"]["failures"] == 0
    cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id == leaving))
    settled(fleet, 3)
    assert facts_of(fleet)["deaths"] == deaths


@pytest.mark.slow
def test_a_host_that_does_not_answer_is_passed_over_and_asked_again(fleet, client, make_engine, wanted):
    pid = min(settled(fleet, 3).values(), key=lambda host: host["pid"])["pid"]
    engine = make_engine(client)
    with Generating(engine, wanted) as generating:
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: client.facts()["slow_calls"], "it is noticed")
            generating.more()
        finally:
            os.kill(pid, signal.SIGCONT)
        settled(fleet, 3)
        until(knows_all(client), "all experts are known again")
        generating.more()
    # some of what it had was with another host too, and the files have all
    tiers = tiers_of(engine)
    assert tiers["hosts"]["failures"] + client.facts()["slow_calls"] > 0


@pytest.mark.slow
def test_hosts_end_with_who_owns_their_directory(cluster, saved):
    @ray.remote(num_cpus=0)
    class Owner:
        def start(self):
            self.directory = start_directory("owned", saved[1], ExpertHostsConfig(count=1, num_cpus=0), "float32")
            assert ray.get(self.directory.wait.remote(PATIENCE_S)) is None
            return os.getpid()

    owner: Any = Owner.remote()  # pyright: ignore[reportFunctionMemberAccess]
    pid: Any = ray.get(owner.start.remote())
    directory = ray.get_actor("owned", "raymoe")
    pids = [host["pid"] for host in settled(directory, 1).values()]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not any(psutil.pid_exists(each) for each in pids), "the hosts have ended")
    with pytest.raises(ValueError, match="owned"):
        ray.get_actor("owned", "raymoe")


@pytest.mark.slow
def test_a_budget_that_holds_nothing_is_told(cluster, saved):
    directory = start_directory("small", saved[1], ExpertHostsConfig(count=1, memory="1KiB", num_cpus=0), "float32")
    why = ray.get(directory.wait.remote(PATIENCE_S))
    assert "expert_hosts.memory: 1KiB is 1024 bytes, less than one expert takes" in why
    ray.kill(directory)
