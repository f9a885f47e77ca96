"""Snapshots in memory: which of them count, where a run may go back to, and how often one is worth it."""

import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.training.shadow import Key, Layout, Shadow
from raymoe.training.snapshot import Held, SnapshotsLost, choose_step, snapshot_interval

ALL = (0, 1, 2)


def held(epoch: int, steps: dict[int, list[int]], members=ALL) -> list[Held]:
    """By member, the steps at which its part is here."""
    return [Held(member, step, epoch, members) for member, its in steps.items() for step in its]


def test_the_newest_step_that_is_whole():
    found = choose_step({0: held(1, {0: [4, 6], 2: [4]}), 1: held(1, {1: [4, 6], 0: [6]})})
    assert (found.step, found.epoch, found.members, found.holders) == (4, 1, ALL, {0: 0, 1: 1, 2: 0})


def test_its_own_is_taken_where_it_lives():
    found = choose_step({2: held(1, {2: [3], 1: [3], 0: [3]}), 1: held(1, {1: [3], 2: [3]})})
    assert found.holders == {0: 2, 1: 1, 2: 2}


def test_epochs_are_not_mixed():
    # step 6 was done twice, by other ranks: no part of one fits the other
    mixed = {0: held(1, {0: [4, 6], 1: [4], 2: [4]}), 2: held(2, {2: [6]}, (0, 2)) + held(1, {2: [4]})}
    found = choose_step(mixed)
    assert (found.step, found.epoch, set(found.holders)) == (4, 1, {0, 1, 2})


def test_what_is_lost_is_named():
    with pytest.raises(SnapshotsLost, match=r"worker 1\b.*step 6"):
        choose_step({0: held(1, {0: [6]}), 2: held(1, {2: [6]})})
    with pytest.raises(SnapshotsLost, match="nobody alive holds a snapshot"):
        choose_step({0: [], 1: []})


@given(st.dictionaries(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))), min_size=1))
def test_a_choice_holds_what_it_says(by_holder):
    members = (0, 1, 2, 3)
    everything = {
        holder: [Held(member, step, 1, members) for member, step in which] for holder, which in by_holder.items()
    }
    whole = [
        step
        for step in range(4)
        if all(any((member, step) in which for which in by_holder.values()) for member in members)
        # somebody's own: it alone has what all ranks have alike
        and any((holder, step) in which for holder, which in by_holder.items())
    ]
    if not whole:
        with pytest.raises(SnapshotsLost):
            choose_step(everything)
        return
    found = choose_step(everything)
    assert found.step == max(whole)
    assert set(found.holders) == set(members)
    for member, holder in found.holders.items():
        assert (member, found.step) in by_holder[holder]
        assert holder == member or (member, found.step) not in by_holder.get(member, [])


def layout_of(tensors: dict) -> Layout:
    return Layout.of(1, ALL, 0, {"next_step": 3}, tensors, {("own", "cpu"): torch.zeros(3, dtype=torch.uint8)})


def test_a_writer_killed_half_way_leaves_no_snapshot():
    tensors: dict[Key, torch.Tensor] = {("expert", 0, e, "parameter"): torch.full((1001,), float(e)) for e in range(3)}
    layout = layout_of(tensors)
    shadow = Shadow.of_size(layout.num_bytes, is_shared=True)
    everything: dict[Key, torch.Tensor] = tensors | {("own", "cpu"): torch.arange(3, dtype=torch.uint8)}
    shadow.write(3, layout, everything)
    assert shadow.descriptor is not None
    holder = Shadow.mapped(os.getpid(), shadow.descriptor, shadow.inode)
    assert holder.step == 3
    assert all(torch.equal(holder.tensors()[key], value) for key, value in everything.items())
    child = os.fork()
    if child == 0:
        # one tensor is missing: it dies after the others have been written
        del everything[("expert", 0, 2, "parameter")]
        try:
            shadow.write(5, layout, everything)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert holder.step is None


def test_memory_outlives_its_maker_and_has_no_name():
    before = set(os.listdir("/dev/shm"))
    layout = layout_of({("expert", 0, 0, "parameter"): torch.arange(5.0)})
    shadow = Shadow.of_size(layout.num_bytes, is_shared=True)
    shadow.write(4, layout, {("expert", 0, 0, "parameter"): torch.arange(5.0), ("own", "cpu"): torch.ones(3)})
    assert shadow.descriptor is not None
    holder = Shadow.mapped(os.getpid(), shadow.descriptor, shadow.inode)
    with pytest.raises(OSError, match="is not the memory that was meant"):
        Shadow.mapped(os.getpid(), shadow.descriptor, shadow.inode + 1)
    shadow.close()
    del shadow
    assert holder.shared_tensors().keys() == {("expert", 0, 0, "parameter")}
    assert torch.equal(holder.shared_tensors()["expert", 0, 0, "parameter"], torch.arange(5.0))
    assert set(os.listdir("/dev/shm")) <= before


@given(
    st.floats(0, 1), st.integers(0, 10**9), st.floats(1e6, 1e10), st.integers(0, 100), st.floats(1e-3, 10), st.floats(0.001, 1)
)  # fmt: skip
def test_the_shortest_interval_within_the_share(take_s, sent, rate, overlap, step_s, share):
    every = snapshot_interval(take_s, sent, rate, overlap, step_s, share)
    cost_s = take_s + sent / rate * (1 - overlap / 100)
    assert every >= 1
    assert cost_s / (every * step_s) <= share * (1 + 1e-9)
    assert every == 1 or cost_s / ((every - 1) * step_s) > share * (1 - 1e-9)
