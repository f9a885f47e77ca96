"""Workers and controllers die or hang in the middle of training, and the run goes on."""

import os
import random
import signal
import time

import pytest
import ray

from raymoe.actors import WorkerGroup, WorkersFailed
from tests.actors.elastic.runs import ELASTIC, SEED, TOLERANCE, Run, check_losses, raymoe


@pytest.mark.parametrize("dense", ["replicated", pytest.param("sharded", marks=pytest.mark.slow)])
def test_a_killed_worker_is_replaced_and_one_leaves_on_request(dense, cluster, job, undisturbed):
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
    check_losses(undisturbed, run.steps)


@pytest.mark.slow
def test_a_stopped_process_and_a_new_controller(cluster, job, undisturbed):
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
    check_losses(undisturbed, run.steps)


@pytest.mark.slow
def test_an_owner_and_its_buddy_are_lost(cluster, job, tmp_path, undisturbed):
    # with no checkpoint
    with WorkerGroup(job(**ELASTIC)) as group:
        group.start()
        run = Run(group)
        run.read(9)
        for state in group.states()[:2]:
            os.kill(state.pid, signal.SIGKILL)
        with pytest.raises(
            WorkersFailed, match=r"nobody alive holds the part of worker .*no 'checkpoint\.folder' is set"
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
    check_losses(undisturbed, run.steps)


@pytest.mark.slow
def test_the_controller_and_all_workers_are_lost(cluster, job, tmp_path, undisturbed):
    folder = tmp_path / "checkpoints"
    with WorkerGroup(job(**ELASTIC, checkpoint={"folder": str(folder), "every_steps": 5})) as group:
        group.start()
        run = Run(group)
        run.read(13)
        states = group.states()
        ray.kill(group.controller, no_restart=False)
        for state in states:
            os.kill(state.pid, signal.SIGKILL)
        fallback = run.until("fallback", 0)
        assert fallback.text.startswith("the controller and all workers died together; back to ")
        run.read(20)
    # what nobody alive had been told of is told by nobody
    told = [step.step for step in run.steps]
    assert told == sorted(set(told))
    losses = undisturbed.losses(told[-1] + 1)
    assert [step.loss for step in run.steps] == pytest.approx([losses[step] for step in told], rel=TOLERANCE)
