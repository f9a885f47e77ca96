"""Replays against a search of all that could have been done."""

from functools import cache as remember
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.inference.eviction import GlobalLru, LeastRecentlyUsed
from raymoe.inference.eviction_expected import ExpectedUse
from raymoe.inference.eviction_frequency import LeastFrequentlyUsed, Plec
from raymoe.inference.replay import belady, replay

POLICIES = [LeastRecentlyUsed, GlobalLru, LeastFrequentlyUsed, Plec, ExpectedUse]
LAYERS, EXPERTS = 2, 4

traces = st.lists(
    st.tuples(*[st.sets(st.integers(0, EXPERTS - 1), max_size=2).map(sorted) for _ in range(LAYERS)]),
    min_size=1,
    max_size=5,
)


def fewest(trace, slots):
    """By trying every choice of what stays after every layer."""
    visits = [frozenset((layer, e) for e in wanted) for step in trace for layer, wanted in enumerate(step)]

    @remember
    def cost(time, resident):
        if time == len(visits):
            return 0
        there, missing = resident | visits[time], visits[time] - resident
        best = None
        for size in range(min(len(there), slots) + 1):
            for kept in map(frozenset, combinations(sorted(there), size)):
                found = cost(time + 1, kept)
                best = found if best is None else min(best, found)
        return len(missing) + best

    return cost(0, frozenset())


@given(trace=traces, slots=st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_belady_is_the_best_if_experts_may_pass_without_a_slot(trace, slots):
    assert belady(trace, slots).misses == fewest(trace, slots)


@given(trace=traces, slots=st.integers(1, 9), policy=st.sampled_from(POLICIES))
@settings(deadline=None)
def test_everything_is_counted_and_nobody_beats_belady(trace, slots, policy):
    wanted = sum(len(layer) for step in trace for layer in step)
    counts, least = replay(trace, policy, slots), belady(trace, slots)
    assert counts.hits + counts.misses == least.hits + least.misses == wanted
    distinct = len({(i, e) for step in trace for i, layer in enumerate(step) for e in layer})
    assert distinct <= least.misses
    assert least.misses <= counts.misses
    if slots >= distinct:
        assert counts.misses == least.misses == distinct


def with_topics(steps, layers, experts, choices, seed):
    """Made up: a token takes mostly what the one before took, and mostly experts that its text likes."""
    rng = np.random.default_rng(seed)
    likes = rng.dirichlet(np.full(experts, 0.3), size=layers)
    trace, last = [], [rng.choice(experts, choices, replace=False) for _ in range(layers)]
    for _ in range(steps):
        for layer in range(layers):
            fresh = rng.choice(experts, choices, replace=False, p=0.9 * likes[layer] + 0.1 / experts)
            last[layer] = np.unique(np.where(rng.random(choices) < 0.4, last[layer][:choices], fresh))
            if len(last[layer]) < choices:
                last[layer] = np.concatenate([last[layer], np.setdiff1d(np.arange(experts), last[layer])])[:choices]
        trace.append([sorted(map(int, wanted)) for wanted in last])
    return trace


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_expected_use_is_better_than_recency(share):
    trace = with_topics(400, 8, 32, 4, seed=1)
    slots = int(share * 8 * 32)
    ours, recent = replay(trace, ExpectedUse, slots).misses, replay(trace, LeastRecentlyUsed, slots).misses
    assert ours < 0.95 * recent


def test_what_is_predicted_stays():
    trace = with_topics(200, 4, 16, 2, seed=2)

    def oracle(step, layer):
        coming = trace[step][layer + 1] if layer < 3 else trace[min(step + 1, 199)][0]
        return {(layer + 1) % 4: dict.fromkeys(coming, 1.0)}

    assert replay(trace, ExpectedUse, 16, oracle).misses < replay(trace, ExpectedUse, 16).misses


def test_a_slot_is_the_least():
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        replay([[[1]]], LeastRecentlyUsed, 0)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        belady([[[1]]], 0)
