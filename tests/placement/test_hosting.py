"""Who holds what while a model is served: everything that there is room for, nothing twice before that, and few moves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.hosting import holdings, host_owners


@st.composite
def cases(draw):
    num_experts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    num_hosts = draw(st.integers(1, 5))
    shape = len(num_experts), max(num_experts)
    heat = np.array(draw(st.lists(st.integers(0, 5), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
    capacity = draw(st.lists(st.integers(1, sum(num_experts)), min_size=num_hosts, max_size=num_hosts))
    owners = host_owners(None, [None] * num_hosts, num_experts)
    return owners, capacity, heat.reshape(shape), num_experts


@given(cases())
def test_rooms_are_used_and_nothing_is_held_twice_before_everything_is_held_once(case):
    owners, capacity, heat, num_experts = case
    held = holdings(owners, capacity, heat, num_experts)
    everything = {(layer, expert) for layer, count in enumerate(num_experts) for expert in range(count)}
    for keys, room in zip(held, capacity, strict=True):
        assert len(set(keys)) == len(keys) == min(room, len(everything))
        assert set(keys) <= everything
        assert [heat[key] for key in keys] == sorted((heat[key] for key in keys), reverse=True)
    once = set().union(*held)
    assert len(once) == min(sum(capacity), len(everything))


def test_three_hosts_of_forty_percent():
    num_experts = [10, 10, 10]
    owners = host_owners(None, [None] * 3, num_experts)
    heat = np.zeros((3, 10))
    heat[1, 7] = 5
    held = holdings(owners, [12, 12, 12], heat, num_experts)
    assert set().union(*held) == {(layer, expert) for layer in range(3) for expert in range(10)}
    assert sum((1, 7) in keys for keys in held) == 2
    assert sorted(map(len, held)) == [12, 12, 12]


def test_a_death_and_a_join_move_few():
    num_experts = [12, 12]
    before = host_owners(None, [None] * 3, num_experts)
    after = host_owners(before, [0, 2], num_experts)
    assert ((before == 0) <= (after == 0)).all()
    assert ((before == 2) <= (after == 1)).all()
    joined = host_owners(after, [0, 1, None], num_experts)
    assert [(joined == host).sum() for host in range(3)] == [8, 8, 8]
    assert ((after != joined) <= (joined == 2)).all()
