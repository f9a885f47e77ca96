"""Workers die, join and leave in the middle of training; losses and parameters are those of a run in which nothing happened."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raymoe.training.snapshot import SnapshotsLost
from tests.training.equality import Case, model_of, one_process
from tests.training.mortals import Mortals

STEPS = 12
oracle = functools.cache(one_process)


@pytest.fixture
def run_of(tmp_path):
    def make(case: Case, **options) -> Mortals:
        model_of(case.family, case.dtype).save_pretrained(tmp_path / "model")
        return Mortals(case, tmp_path / "model", tmp_path, **options)

    return make


def check(run: Mortals, case: Case, path) -> None:
    run.ask("write", str(path / "out"))
    parameters = AutoModelForCausalLM.from_pretrained(path / "out", dtype=case.dtype).state_dict()
    for name, value in oracle(*case.oracle).items():
        error = ((parameters[name].double() - value.double()).norm() / value.double().norm()).item()
        assert error <= case.tolerance, f"{name} off by {error:.1e}"


@pytest.mark.parametrize("policy", ["fssdp", "ep", "smartmoe", "lazarus"])
def test_three_two_three_two(policy, run_of, tmp_path):
    case = Case(policy=policy, steps=STEPS)
    with run_of(case) as run:
        run.create(0, 1, 2)
        run.start(0, 1, 2)
        assert run.run(STEPS, kill=(1, 5, "backward")) == [0, 2]
        source = run.regroup(0, 2)
        assert (source.step, source.holders[0], source.holders[2]) == (4, 0, 2)
        assert source.holders[1] in (0, 2)
        assert run.run(7) == [0, 2]
        run.create(3)
        run.rehearse(3)
        run.join(3)
        assert run.run(9) == [0, 2, 3]
        run.part(0)
        assert run.run(STEPS) == [2, 3]
        owners = run.ask("owners")
        assert np.array_equal(owners[2], owners[3])
        if policy != "lazarus":
            # which makes owners of its own
            assert np.ptp(np.bincount(owners[2].flatten(), minlength=2)) <= 1
        assert sorted(run.losses) == list(range(STEPS))
        # of four epochs, the last one's five and at most those of the one before
        assert set(run.ask("groups").values()) <= set(range(5, 11))
        check(run, case, tmp_path)


def test_sharded_dense_parameters_follow(run_of, tmp_path):
    case = Case(config={"dense": "sharded"}, steps=STEPS)
    with run_of(case) as run:
        run.create(0, 1, 2)
        run.start(0, 1, 2)
        assert run.run(STEPS, kill=(1, 5, "backward")) == [0, 2]
        assert run.regroup(0, 2).step == 4
        assert run.run(7) == [0, 2]
        run.create(3)
        run.ask("snap")
        assert run.regroup(0, 2, 3).step == 7
        assert run.run(9) == [0, 2, 3]
        run.ask("snap")
        run.kill(0)
        assert run.regroup(2, 3).step == 9
        assert run.run(STEPS) == [2, 3]
        assert sorted(run.losses) == list(range(STEPS))
        check(run, case, tmp_path)


def test_restored_bit_for_bit(run_of):
    case = Case(dtype=torch.bfloat16, steps=STEPS)
    with run_of(case) as run:
        run.create(0, 1, 2)
        run.start(0, 1, 2)
        assert run.run(STEPS, kill=(2, 7, "forward")) == [0, 1]
        source = run.regroup(0, 1)
        assert source.step == 6
        shadows, now = run.ask("shadow_bits", 6), run.ask("bits")
        owned = {}
        for each in shadows.values():
            owned |= each
        for member in (0, 1):
            same = [name for name in now[member] if name in owned]
            assert len(same) > 20
            for name in same:
                assert np.array_equal(now[member][name], owned[name]), name


@pytest.mark.parametrize(("phase", "at", "from_step"), [("forward", 4, 4), ("backward", 6, 6), ("take", 6, 4)])
def test_kills_between_nodes(phase, at, from_step, run_of, tmp_path):
    case = Case(steps=8, dtype=torch.float64)
    with run_of(case, node_of=lambda member: f"node-{member}") as run:
        run.create(0, 1, 2)
        run.start(0, 1, 2)
        assert run.run(8, kill=(0, at, phase)) == [1, 2]
        # the newest may not have reached everyone yet
        assert run.regroup(1, 2).step in (from_step, from_step - 2)
        assert run.run(8) == [1, 2]
        check(run, case, tmp_path)


def test_deaths_in_a_row(run_of, tmp_path):
    case = Case(steps=8)
    with run_of(case) as run:
        run.create(0, 1, 2)
        run.start(0, 1, 2)
        assert run.run(8, kill=(1, 4, "backward")) == [0, 2]
        before = run.regroup(0, 2)
        # in the new epoch's first step; each has kept the other's part since it entered
        assert run.run(8, kill=(0, before.step, "forward")) == [2]
        source = run.regroup(2)
        assert (source.step, source.members) == (before.step, (0, 2))
        assert set(source.holders.values()) == {2}
        assert run.run(8) == [2]
        check(run, case, tmp_path)


def test_an_owner_and_its_buddy(run_of):
    case = Case(steps=6)
    with run_of(case) as run:
        run.create(0, 1, 2)
        run.start(0, 1, 2)
        run.run(4)
        holders = {each.member for member, held in run.ask("held").items() if member == 2 for each in held}
        (lost,) = {0, 1} - holders
        run.kill(0, 1)
        run.members = (2,)
        with pytest.raises(SnapshotsLost, match=f"worker {lost}"):
            run.regroup(2)
