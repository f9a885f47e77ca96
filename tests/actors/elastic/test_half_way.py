"""Deaths at the worst moments: while the others regroup, while somebody joins, while state is sent or written."""

import itertools
import os
import signal
import time

import pytest
import ray
from transformers import AutoModelForCausalLM

from raymoe.actors import WorkerGroup
from raymoe.training.checkpoint import latest
from tests.actors.elastic.runs import ELASTIC, Run, check_losses, set_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FOUR = ELASTIC | {"workers": {"min": 1, "max": 4}}


def kill(states, *ranks):
    for state in states:
        if state.rank in ranks:
            os.kill(state.pid, signal.SIGKILL)


def dead(group, known=0):
    """Numbers of the workers that died."""
    return [event.values["worker"] for event in group.events[known:] if event.kind == "death"]


def test_two_at_once_and_one_more_while_the_others_regroup(cluster, job, traps, undisturbed):
    set_nodes(cluster, 4)
    with WorkerGroup(job(**FOUR, env=traps.env)) as group:
        group.start()
        run = Run(group)
        run.read(10)
        # a rank's buddy is the next one: neither of the two is the other's
        kill(group.states(), 0, 2)
        run.until("rollback", 0)
        assert sorted(dead(group)) == [0, 2]
        run.with_workers(2)
        run.with_workers(4)

        # ranks are 1, 3 and two new ones; the third dies as the first's experts are given back
        known, states = run.known, group.states()
        members = [state.member for state in states]
        traps.set("rollback", members[2])
        kill(states, 0)
        run.until("rollback", known)
        assert traps.is_sprung("rollback", members[2])
        assert run.kinds(known)[:3] == ["death", "death", "rollback"]
        assert dead(group, known) == [members[0], members[2]]
        run.with_workers(2)
        run.with_workers(4)
        run.read(5)
        assert "fallback" not in run.kinds()
    check_losses(undisturbed, run.steps)


def test_deaths_while_somebody_joins(cluster, job, traps, undisturbed):
    with WorkerGroup(job(**ELASTIC, env=traps.env)) as group:
        group.start()
        run = Run(group)
        run.read(10)
        # one who comes dies alone, in its rehearsal; training does not notice
        traps.set("rehearse", 3)
        kill(group.states(), 1)
        run.until("unfit", 0)
        assert run.kinds().count("rollback") == 1
        # the next one dies as experts move to it
        traps.set("move", 4)
        run.when(lambda: 4 in dead(group))
        run.until("join", 0)
        run.with_workers(3)
        assert {state.member for state in group.states()} == {0, 2, 5}

        # now an old one dies as experts move to a new one: who came is kept, not forgotten
        known = run.known
        traps.set("move", 0)
        kill(group.states(), 1)
        run.when(lambda: 0 in dead(group, known))
        run.with_workers(3)
        run.read(5)
        assert "fallback" not in run.kinds()
    check_losses(undisturbed, run.steps)


@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
def test_a_death_before_all_have_met(place, cluster, job, traps, undisturbed):
    """The others wait for one that will not come, the first rank of all at the place where they meet."""
    with WorkerGroup(job(**ELASTIC, env=traps.env)) as group:
        group.start()
        run = Run(group)
        run.read(10)
        kill(group.states(), 2)
        run.until("rollback", 0)
        traps.set("meet", place)
        died = run.until("death", run.known)
        assert died.values["worker"] == place
        run.with_workers(3)
        run.read(5)
        assert "fallback" not in run.kinds()
        assert run.kinds().count("rollback") == 2
    assert max(later.at_s - earlier.at_s for earlier, later in itertools.pairwise(run.steps)) < 10
    check_losses(undisturbed, run.steps)


def test_a_death_while_somebody_leaves(cluster, job, traps, undisturbed):
    with WorkerGroup(job(**ELASTIC, env=traps.env)) as group:
        group.start()
        run = Run(group)
        run.read(10)
        # as the leaver gives its experts away
        traps.set("move", 1)
        group.scale(2)
        run.until("rollback", 0)
        run.read(5)
        assert dead(group) == [1]
        assert len(group.workers) == 2
        # and the leaver itself
        known = run.known
        traps.set("move", group.states()[1].member)
        group.scale(1)
        run.until("rollback", known)
        run.with_workers(1)
        run.read(5)
    check_losses(undisturbed, run.steps)


def test_deaths_while_a_snapshot_is_sent_and_a_checkpoint_is_written(cluster, job, traps, tmp_path, undisturbed):
    folder = tmp_path / "checkpoints"
    asked = ELASTIC | {"checkpoint": {"folder": str(folder), "every_steps": 7, "keep": 2}}
    with WorkerGroup(job(**asked, env=traps.env)) as group:
        group.start()
        run = Run(group)
        run.read(10)
        # the bytes are under way to the buddy
        traps.set("snapshot", 0)
        run.until("rollback", 0)
        run.with_workers(3)
        members = [state.member for state in group.states()]
        assert members == [1, 2, 3]
        # a rank's file is not there
        known = run.known
        traps.set("checkpoint", members[1])
        run.until("rollback", known)
        assert dead(group, known) == [members[1]]
        run.with_workers(3)
        # all files are there, and it has no name yet
        known = run.known
        traps.set("commit", members[0])
        run.until("rollback", known)
        assert dead(group, known) == [members[0]]
        done = run.steps[-1].step
        run.when(lambda: (newest := latest(folder)) is not None and int(newest.name.partition("-")[2]) > done)
        assert "fallback" not in run.kinds()
    assert {path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir()} == {"step"}
    check_losses(undisturbed, run.steps)


def test_a_death_while_the_model_is_saved(cluster, job, traps, tmp_path, undisturbed):
    asked = job(**ELASTIC | {"steps": 30, "workers": 3}, env=traps.env)
    with WorkerGroup(asked) as group:
        group.start()
        run = Run(group)
        run.read(30)
        traps.set("save", 1)
        group.save(tmp_path / "saved")
        assert traps.is_sprung("save", 1)
        assert len(group.workers) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert model.num_parameters() == asked.total_parameters
    check_losses(undisturbed, run.steps)


def test_the_controller_dies_while_an_epoch_is_formed(cluster, job, traps, undisturbed):
    with WorkerGroup(job(**ELASTIC, env=traps.env)) as group:
        group.start()
        run = Run(group)
        run.read(10)
        states = group.states()
        traps.set("rollback", 2, "wait")
        kill(states, 0)
        until = time.monotonic() + 20
        while not traps.waits("rollback", 2):
            assert time.monotonic() < until
            time.sleep(0.02)
        ray.kill(group.controller, no_restart=False)
        traps.release("rollback", 2)
        run.until("controller", 0)
        run.with_workers(3)
        run.read(5)
    check_losses(undisturbed, run.steps)
