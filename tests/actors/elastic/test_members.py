"""Nodes come, drain and are lost, and runs wait for room."""

import os
import signal
import threading
import time

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymoe.actors import WorkerGroup
from raymoe.actors.ray_private import draining_nodes
from tests.actors.elastic.runs import ELASTIC, PATIENCE_S, Run, check_losses, raymoe


def elsewhere(states):
    """Workers on other nodes than this process."""
    here = ray.get_runtime_context().get_node_id()
    return [state for state in states if state.node != here]


@pytest.mark.slow
def test_a_node_that_drains_is_left_and_one_that_is_lost_is_survived(cluster, job, undisturbed):
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
    check_losses(undisturbed, run.steps)


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_leaves_its_experts_and_another_comes(cluster, job, undisturbed):
    with WorkerGroup(job(**ELASTIC)) as group:
        group.start()
        run = Run(group)
        run.read(8)
        told = group.states()[1]
        os.kill(told.pid, signal.SIGTERM)
        left = run.until("leave", 0)
        assert left.values["worker"] == told.member
        run.until("join", 0)
        run.with_workers(3)
        run.read(3)
        # all at once: who comes learns from one of them first
        before = group.states()
        for state in before:
            os.kill(state.pid, signal.SIGTERM)
        run.when(lambda: not {state.member for state in before} & {state.member for state in group.states()})
        run.with_workers(3)
        assert not {"rollback", "death"} & set(run.kinds())
    check_losses(undisturbed, run.steps)


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


@pytest.mark.slow
def test_below_min_it_waits_and_goes_on(cluster, job, undisturbed):
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
    check_losses(undisturbed, run.steps)


class Sleeper:
    def ping(self):
        return True
