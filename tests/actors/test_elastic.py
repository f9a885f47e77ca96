"""Workers die, leave and join in the middle of training on a Ray cluster of several nodes, and the run goes on."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import AutoModelForCausalLM

from raymoe.actors import CHECKPOINT_FOLDER, WorkerGroup, WorkersFailed
from raymoe.actors.placement_controller import EVENTS_FILE
from raymoe.actors.ray_private import draining_nodes
from tests.actors.conftest import TINY
from tests.actors.test_training import living_actors

PATIENCE_S = 90
SEED = int(os.environ.get("RAYMOE_TEST_SEED", "0"))
# a schedule that does not ask how many steps there will be
OPTIMIZER = {"lr": 1e-3, "warmup_steps": 2, "schedule": "constant"}
# in float64: what rounding leaves must not grow to where it hides a mistake
MODEL = {"config": TINY, "dtype": "float64"}
ELASTIC = {
    "model": MODEL,
    "workers": {"min": 1, "max": 3},
    "snapshots": {"every": 4},
    "steps": 100_000,
    "heartbeat_s": 3,
    "optimizer": OPTIMIZER,
}


@pytest.fixture(scope="module")
def cluster():
    # workers cannot be placed on the head, which so never loses one
    this = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(3):
        this.add_node(num_cpus=1)
    ray.init(address=this.address, namespace="raymoe", log_to_driver=False)
    this.wait_for_nodes()
    yield this
    ray.shutdown()
    this.shutdown()


@pytest.fixture(autouse=True)
def whole(cluster):
    """Three nodes for workers, whatever the test before has taken away."""
    while len(cluster.worker_nodes) < 3:
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()


def elsewhere(states):
    """Workers on other nodes than this process."""
    here = ray.get_runtime_context().get_node_id()
    return [state for state in states if state.node != here]


class Run:
    """Reads a run's steps until something has happened."""

    def __init__(self, group):
        self.group, self.steps, self._stream = group, [], group.train()

    def read(self, number):
        for _ in range(number):
            self.steps.append(next(self._stream))

    def until(self, kind, known):
        """The first event of a kind after the `known` first ones."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for event in self.group.events[known:]:
                if event.kind == kind:
                    return event
            self.read(1)
        raise AssertionError(f"no {kind}; there were {[event.text for event in self.group.events]}")

    def with_workers(self, number):
        end = time.monotonic() + PATIENCE_S
        while self.steps[-1].workers != number:
            assert time.monotonic() < end, [event.text for event in self.group.events]
            self.read(1)


def raymoe(cluster, *arguments):
    """What the command prints, in a process of its own."""
    command = [sys.executable, "-m", "raymoe", *arguments]
    env = os.environ | {"RAY_ADDRESS": cluster.address, "COLUMNS": "160"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def undisturbed(job, num_steps):
    with WorkerGroup(job(steps=num_steps, workers=2, optimizer=OPTIMIZER, model=MODEL)) as group:
        group.start()
        return [step.loss for step in group.train()]


def check_losses(job, run):
    """Every step was done once, and its loss is that of a run in which nothing happened."""
    numbers = [step.step for step in run.steps]
    assert numbers == list(range(len(numbers)))
    losses = undisturbed(job, len(numbers))
    assert [step.loss for step in run.steps] == pytest.approx(losses, rel=1e-7)


@pytest.mark.parametrize("dense", ["replicated", pytest.param("sharded", marks=pytest.mark.slow)])
def test_a_killed_worker_is_replaced_and_one_leaves_on_request(dense, cluster, job):
    rng = random.Random(SEED)
    with WorkerGroup(job(**ELASTIC, dense=dense)) as group:
        group.start()
        assert len(group.workers) == 3
        run = Run(group)
        run.read(10)
        # in the middle of a step
        victim = rng.choice(group.states())
        time.sleep(0.02 * rng.random())
        os.kill(victim.pid, signal.SIGKILL)
        death = run.until("death", 0)
        assert death.values == {"worker": victim.member}
        back = run.until("rollback", 0)
        assert 0 <= back.values["repeats"] <= 2 * 4
        run.with_workers(2)
        joined = run.until("join", 0)
        run.with_workers(3)
        assert joined.values["stopped_s"] < 5

        # fewer, by request: nobody goes back
        shown = raymoe(cluster, "status")
        assert f"{group.run}  epoch" in shown
        assert "joined; 3 workers" in shown
        known = len(group.events)
        assert "2 workers, as soon as there is room" in raymoe(cluster, "scale", "2")
        left = run.until("leave", known)
        run.with_workers(2)
        assert not [event for event in group.events[known:] if event.kind == "rollback"]
        assert left.values["stopped_s"] < 5
        states = group.states()
        assert sum(sum(state.owned_experts) for state in states) == 2 * 8
        run.read(10)
        assert all(state.snapshot_step is not None for state in group.states())
    assert living_actors() == 0
    check_losses(job, run)


@pytest.mark.slow
def test_a_stopped_process_and_a_new_controller(cluster, job):
    rng = random.Random(SEED)
    with WorkerGroup(job(**ELASTIC)) as group:
        group.start()
        run = Run(group)
        run.read(10)
        # it answers nobody, and nothing tells its peers
        victim = rng.choice(group.states())
        os.kill(victim.pid, signal.SIGSTOP)
        death = run.until("death", 0)
        assert "has not answered for 3 s" in death.text
        run.until("rollback", 0)
        os.kill(victim.pid, signal.SIGKILL)
        run.until("join", 0)
        run.with_workers(3)

        # the controller dies, and finds its workers again
        known = len(group.events)
        ray.kill(group.controller, no_restart=False)
        found = run.until("controller", known)
        assert "found epoch" in found.text
        run.read(10)
        assert run.steps[-1].workers == 3
        known = len(group.events)
        group.scale(2)
        run.until("leave", known)
        run.with_workers(2)
    assert living_actors() == 0
    check_losses(job, run)


@pytest.mark.slow
def test_a_node_that_drains_is_left_and_one_that_is_lost_is_survived(cluster, job):
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    with WorkerGroup(job(**ELASTIC)) as group:
        group.start()
        run = Run(group)
        run.read(8)
        leaving = elsewhere(group.states())[0].node
        deadline_ms = int((time.time() + 60) * 1000)
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = GcsClient(address=cluster.address).drain_node(leaving, reason, "test", deadline_ms)
        assert accepted, why
        assert leaving in draining_nodes()
        run.until("leave", 0)
        run.with_workers(2)
        assert leaving not in {state.node for state in group.states()}
        assert "rollback" not in {event.kind for event in group.events}
        node = next(each for each in cluster.worker_nodes if each.node_id == leaving)
        cluster.remove_node(node)

        # lost at once, with what it held
        known = len(group.events)
        others = elsewhere(group.states())
        assert others, (group.states(), group.events)
        lost = others[0].node
        node = next(each for each in cluster.worker_nodes if each.node_id == lost)
        cluster.remove_node(node, allow_graceful=False)
        run.until("rollback", known)
        run.with_workers(1)
        run.read(3)

        # a node joins, and another
        known = len(group.events)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        run.until("join", known)
        run.with_workers(3)
        run.read(3)
    assert living_actors() == 0
    check_losses(job, run)


@pytest.mark.slow
def test_nobody_comes_back_to_a_node_that_was_drained_by_command(cluster, job):
    with WorkerGroup(job(**ELASTIC)) as group:
        group.start()
        run = Run(group)
        run.read(8)
        node = group.states()[1].node
        assert "workers leave node" in raymoe(cluster, "drain", node)
        run.until("leave", 0)
        run.with_workers(2)
        end = time.monotonic() + 25
        while time.monotonic() < end:
            run.read(1)
        assert {event.kind for event in group.events} == {"leave", "resumed"}
        assert node not in {state.node for state in group.states()}
    assert living_actors() == 0


@pytest.mark.slow
def test_an_owner_and_its_buddy_are_lost(cluster, job, tmp_path):
    # with no checkpoint
    with WorkerGroup(job(**ELASTIC)) as group:
        group.start()
        run = Run(group)
        run.read(9)
        for state in group.states()[:2]:
            os.kill(state.pid, signal.SIGKILL)
        with pytest.raises(
            WorkersFailed, match=r"nobody alive holds the experts of worker .*no 'checkpoint\.folder' is set"
        ):
            run.until("rollback", 0)
    # with one
    folder = tmp_path / "checkpoints"
    with WorkerGroup(job(**ELASTIC, checkpoint={"folder": str(folder), "every_steps": 5})) as group:
        group.start()
        run = Run(group)
        run.read(13)
        for state in group.states()[:2]:
            os.kill(state.pid, signal.SIGKILL)
        fallback = run.until("fallback", 0)
        assert "step-" in fallback.values["checkpoint"]
        run.until("rollback", 0)
        run.read(5)
    assert living_actors() == 0
    check_losses(job, run)


@pytest.mark.slow
def test_below_min_it_waits_and_goes_on(cluster, job):
    with WorkerGroup(job(**ELASTIC | {"workers": 3})) as group:
        group.start()
        run = Run(group)
        run.read(6)
        # somebody else takes the place of the one that dies
        blocker = ray.remote(num_cpus=1)(Sleeper)
        state = group.states()[2]
        there = NodeAffinitySchedulingStrategy(state.node, soft=False)
        waiting = blocker.options(scheduling_strategy=there).remote()
        os.kill(state.pid, signal.SIGKILL)
        ray.get(waiting.ping.remote(), timeout=PATIENCE_S)
        timer = threading.Timer(4, ray.kill, [waiting])
        timer.start()
        run.until("rollback", 0)
        told = [event for event in group.events if event.kind == "waiting"]
        assert told
        assert "1 more workers of 1 CPUs" in told[0].text
        run.with_workers(3)
        run.read(3)
    check_losses(job, run)


class Sleeper:
    def ping(self):
        return True


DRIVER = """
import sys, time, pickle, ray
from raymoe.actors import WorkerGroup
ray.init(address=sys.argv[1], namespace="raymoe", log_to_driver=False)
job = pickle.load(open(sys.argv[2], "rb"))
with WorkerGroup(job) as group:
    group.start()
    for step in group.train():
        print(step.step, flush=True)
"""


@pytest.mark.parametrize("detached", [False, True])
def test_the_driver_dies(cluster, job, tmp_path, detached):
    path = tmp_path / "job.pickle"
    asked = job(**ELASTIC | {"steps": 60 if detached else 100_000, "detached": detached})
    path.write_bytes(pickle.dumps(asked))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "0\n"
    driver.kill()
    driver.wait()
    end = time.monotonic() + (PATIENCE_S if detached else 30)
    while living_actors() and time.monotonic() < end:
        time.sleep(0.2)
    assert living_actors() == 0
    checkpoint = asked.folder / CHECKPOINT_FOLDER
    assert checkpoint.is_dir() == detached
    if detached:
        told = [json.loads(line) for line in (asked.folder / EVENTS_FILE).read_text().splitlines()]
        assert [event["step"] for event in told if event["kind"] == "saved"] == [60]
        assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() == asked.total_parameters
